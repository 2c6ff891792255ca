"""The private names of PyTorch that the op needs, in one place.

What a torch upgrade may break stands here.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame as _eval_frame
from torch._C._dynamo.guards import TensorGuards
from torch._jit_internal import is_scripting as is_scripting
from torch.autograd import forward_ad
from torch.autograd.function import Function, _SingleLevelFunction
from torch.nn.modules import module as _module

DispatchKey = torch._C.DispatchKey
_innermost_transform = torch._C._functorch.peek_interpreter_stack


class SingleLevelFunction(_SingleLevelFunction):
    """`autograd.Function` for one level of torch.func, as an Autograd-key kernel is called.

    Its apply takes 11 us where Function's takes 30: it does not inspect signatures.
    """

    # Compiled autograd looks these up on every Function, and only Function has them.
    _compiled_autograd_key = Function._compiled_autograd_key
    # Inherited; torch's private base has it without saying so.
    apply: ClassVar[Callable[..., Any]]


def below_autograd() -> contextlib.AbstractContextManager[object]:
    """Dispatches ops below the Autograd key: to the next level of torch.func or to a kernel."""
    return torch._C._AutoDispatchBelowAutograd()


def constant_to_dynamo(function: Callable[..., Any]) -> None:
    """Makes Dynamo call `function` while it traces, and take the result for a constant.

    As torch.compiler.assume_constant_result, which imports Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exporting() -> bool:
    """Whether torch.export traces; Dynamo of torch 2.11 itself would say so of any compilation."""
    return torch.compiler.is_exporting()


constant_to_dynamo(exporting)


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export traces, by either of its exporters."""
    return torch.onnx.is_in_onnx_export()


constant_to_dynamo(exporting_to_onnx)


def compiled_by_torchscript(function: Callable[..., Any], instead: Callable[..., Any]) -> None:
    """Has TorchScript, which does not know all of Python, compile `instead` of `function`."""
    function.__prepare_scriptable__ = lambda: instead  # type: ignore[attr-defined]


def hide_from_dynamo(function: Callable[..., Any]) -> None:
    """Makes Dynamo run `function`, and what it calls, as it stands.

    Where a compiled function falls back to eager, as it does under a transform of torch.func,
    Dynamo compiles what that calls, and would take a kernel's launcher for a function of tensors.
    torch.compiler.disable would do as well, but it imports Dynamo, and takes time in each call.
    """
    skip = _eval_frame._FrameExecStrategy(
        _eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.SKIP
    )
    _eval_frame.set_code_exec_strategy(function.__code__, skip)


def wanted(ctx: Any) -> Sequence[bool]:
    """Within a Function's backward: of which of its arguments the gradient is wanted now.

    `ctx.needs_input_grad` says which may ever be: `torch.autograd.grad(loss, input)` wants no
    weight's. While compiled autograd traces, all that may be are.
    """
    needed: Sequence[bool] = ctx.needs_input_grad
    if torch.compiler.is_dynamo_compiling():
        return needed
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # one for each needed
    return [need and _will_run(next(nodes)) for need in needed]


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it refuses to say so of leaves that torch.autograd.grad was asked for
        return True


def default_store() -> Any:
    """That of the default process group, by which its ranks have found each other."""
    return torch.distributed.distributed_c10d._get_default_store()


def break_graph_at(function: Callable[..., Any]) -> None:
    """Has compiled functions call `function` as it stands, between two graphs.

    As torch.compiler.disable, which imports Dynamo.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    hide_from_dynamo(function)


def unwrapped(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """`op` without its Python wrapper, 0.2 us a call: for eager code, with plain tensors."""
    return op._op


def excluding(key: DispatchKey) -> contextlib.AbstractContextManager[object]:
    """Dispatches ops past `key`."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def _bits(*keys: DispatchKey) -> int:
    bits = 0
    for key in keys:
        bits |= torch._C.DispatchKeySet(key).raw_repr()
    return bits


# Whether below the Autograd key anything but the device's own kernel wants a call: lazy negation, a
# subclass, a mode, a transform. Each of them has a key; `keys.raw_repr() & BEYOND_PLAIN` tells.
BEYOND_PLAIN = ~_bits(
    DispatchKey.CPU,
    DispatchKey.CUDA,
    DispatchKey.AutogradCPU,
    DispatchKey.AutogradCUDA,
    DispatchKey.ADInplaceOrView,
)
_BEYOND_PLAIN_BY_THREAD = BEYOND_PLAIN & ~_bits(DispatchKey.BackendSelect)  # always there
_AUTOGRAD = _bits(DispatchKey.AutogradCPU, DispatchKey.AutogradCUDA)


def plain(*tensors: Tensor) -> bool:
    """Whether nothing wants a call with `tensors` but autograd and the device's own kernel."""
    added = torch._C._dispatch_tls_local_include_set().raw_repr()
    taken = torch._C._dispatch_tls_local_exclude_set().raw_repr()
    return not any(
        (torch._C._dispatch_keys(tensor).raw_repr() | added) & ~taken & _BEYOND_PLAIN_BY_THREAD
        for tensor in tensors
    )


def above_autograd() -> bool:
    """Whether calls get to autograd: not in inference mode, nor below the Autograd key."""
    return not torch._C._dispatch_tls_local_exclude_set().raw_repr() & _AUTOGRAD


def alike(*tensors: Tensor) -> Callable[..., bool]:
    """A function that says whether as many tensors are like these, in a third of a microsecond.

    It is what Dynamo guards compiled code with, and compares types, dispatch keys, those that the
    thread adds and takes included, dtypes, devices, requires_grad, shapes and strides. It keeps no
    tensor. It must not be asked about nested tensors, and does not see what `watched` does.
    """
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


_torch_functions_watched: Callable[[], bool] = torch._C._is_torch_function_mode_enabled
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled
_hooks_allowed: Callable[[], bool] = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


def watched() -> bool:
    """Whether a mode or a profiler is to see every op, or tangents go with tensors."""
    return (
        forward_ad._current_level >= 0  # a transform's level has a dispatch key besides
        or _torch_functions_watched()
        or _dispatch_modes() > 0
        or _profiled()
    )


def autocast_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, as autocast makes it for its own ops: one copy of a parameter a region.

    Autocast's cache has no function that reads it. But a product of no rows has it look there, or
    put a copy there, and saves that copy for its backward.
    """
    if (
        dtype == tensor.dtype
        or tensor.dtype != torch.float32
        or not (tensor.requires_grad and tensor.is_leaf)
        or type(tensor) not in PLAIN
        or tensor.dim() not in (2, 3)
        or not tensor.numel()
        or not torch.is_autocast_cache_enabled()
        or not _hooks_allowed()
        or transforming()
        or tracing() is not None
        or (_torch_functions_watched() or _dispatch_modes() > 0)  # which would see the product
    ):
        return tensor.to(dtype)
    saved: list[Tensor] = []

    def keep(one: Tensor) -> Tensor:
        saved.append(one)
        return one

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, keep)
    try:
        with torch.inference_mode(False), torch.enable_grad(), hooks:
            torch.matmul(_no_rows(tensor.shape[:-1], dtype, tensor.device), tensor)
    except RuntimeError:  # the copy there is of another dtype: of a region around this one
        return tensor.to(dtype)
    return next(one for one in saved if one.numel())


@functools.lru_cache
def _no_rows(columns: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    shape = (*columns[:-1], 0, columns[-1])
    return torch.empty(shape, dtype=dtype, device=device, requires_grad=True)


# `torch.backends.cuda.matmul.fp32_precision`, in a fifth of the time.
float32_matmul_precision = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")
_onednn_precision = functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "matmul")
_onednn_enabled: Callable[[], bool] = torch._C._get_mkldnn_enabled


def product_settings() -> tuple[str, str, bool, int]:
    """How float32 products are formed on GPUs and on CPUs, whether oneDNN may, a CPU's threads."""
    threads = torch.get_num_threads()
    return float32_matmul_precision(), _onednn_precision(), _onednn_enabled(), threads


def float32_precision_on_cpu() -> str:
    """How PyTorch forms float32 products on a CPU: "ieee", also where unset, "tf32" or "bf16"."""
    precision = _onednn_precision()
    return precision if precision in ("tf32", "bf16") else "ieee"


_distributed: Any = torch.distributed
_world = _distributed.distributed_c10d._world if _distributed.is_available() else None
# The default process group, or None.
default_group: Callable[[], object] = functools.partial(getattr, _world, "_default_pg", None)


Linear = torch.nn.modules.linear.Linear  # also where torch.nn.Linear has come to be another


def _is_pytorchs(forward: Any) -> bool:
    return getattr(forward, "__globals__", None) is vars(torch.nn.modules.linear)


_forward = Linear.forward if _is_pytorchs(Linear.forward) else None


def linear_is_patched() -> bool:
    """Whether something has been put in the place of `nn.Linear.forward`, on the class."""
    forward = Linear.forward
    return forward is not _forward and not _is_pytorchs(forward)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling `module` calls anything besides its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


@contextlib.contextmanager
def without_accumulation_hooks(parameters: Sequence[Tensor]) -> Any:
    """Within it, no hook is called when a parameter's gradient is there: some step optimizers."""
    found = [one._post_accumulate_grad_hooks for one in parameters]
    kept = [(hooks, dict(hooks)) for hooks in found if hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def own_random_state(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Puts torch's random numbers back at its end."""
    devices = [] if device.index is None or device.type != "cuda" else [device.index]
    return torch.random.fork_rng(devices)


def uncompiled() -> contextlib.AbstractContextManager[object]:
    """Within it, compiled functions run as if they were not."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and it takes a second
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


# Whether autocast is on, for any kind of device.
autocasting: Callable[[], bool] = torch._C._is_any_autocast_enabled
# Whether a transform of torch.func is active.
transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
# Whether one of its arguments is a tensor that requires a gradient.
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
# What torch.jit.trace records to; None where it does not trace.
tracing: Callable[[], object] = torch._C._get_tracing_state


# Tensors that are what they seem.
PLAIN = frozenset({Tensor, torch.nn.Parameter})
# Subclasses of Tensor that pass an op on to plain tensors of this rank: filled by
# `know_distributed`, as to import them takes most of a second.
DISTRIBUTED: set[type] = set()


def know_distributed() -> None:
    """Fills `DISTRIBUTED`: sharded tensors, and results of collectives that are on their way."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    DISTRIBUTED.update((DTensor, AsyncCollectiveTensor))


def shard_by_all_arguments(op: torch._ops.OpOverload) -> None:
    """Has DTensor look up the sharding of a call of `op` by all its arguments.

    As registered by `register_sharding`, calls that differ in a bool, in a string or in which
    tensor is None would be given one sharding.
    """
    from torch.distributed.tensor import DTensor

    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op].static_argnum = 0


def forward_ad_active() -> bool:
    """Whether tensors may carry tangents.

    Compiled code enters a level past Python's count of them, within a transform of torch.func.
    """
    if forward_ad._current_level >= 0:
        return True
    interpreter = _innermost_transform()
    return interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Jvp


constant_to_dynamo(forward_ad_active)  # compiled autograd traces the backward that asks


@contextlib.contextmanager
def next_level_differentiates() -> Any:
    """Within a Function's forward, lets the next level of torch.func record gradients.

    A Function's forward runs with both grad modes off; without this, second derivatives would
    silently be zero.
    """
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


@contextlib.contextmanager
def next_level_in_forward_mode(*saved: Any) -> Any:
    """Within a Function's jvp, lets the next level of forward mode carry tangents too.

    jvp runs with forward mode off; without this, forward-over-forward derivatives would silently be
    zero. Yields the primals of `saved`: with their tangents they would ask for this level again.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        # Not forward_ad.unpack_dual, which goes by Python's count of levels (forward_ad_active);
        # PyTorch has one level of its own, 0, and torch.func's others lie in its wrappers.
        yield tuple(
            None if tensor is None else torch._VF._unpack_dual(tensor, level=0)[0]
            for tensor in saved
        )


@contextlib.contextmanager
def one_level_allowed() -> Any:
    """Within it, SingleLevelFunctions can be applied inside a transform."""
    previous = torch._C._functorch.get_single_level_autograd_function_allowed()
    torch._C._functorch.set_single_level_autograd_function_allowed(True)
    try:
        yield
    finally:
        torch._C._functorch.set_single_level_autograd_function_allowed(previous)
