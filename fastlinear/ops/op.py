"""How a torch op of this package is made: what PyTorch may ask of one, in one place.

`define` names the op and `register` says all the rest; what shards of DTensors it takes says
sharding.py. Why an op, with an autograd.Function as its Autograd key's kernel, and not what
torch.library offers: that knows no forward mode, and no transforms of torch.func.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear._on_import import when_imported
from fastlinear.choice import backend
from fastlinear.kernels.launching.operands import DTYPES

Op = torch._ops.OpOverload

LIBRARY = torch.library.Library("fastlinear", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


def define(schema: str) -> Op:
    """The op of this schema.

    No argument may have a default: the dispatcher drops those that equal it, and vmap rules would
    miss them.
    """
    LIBRARY.define(schema, tags=TAGS)
    op: Op = getattr(torch.ops.fastlinear, schema.split("(")[0]).default
    return op


def register(
    op: Op,
    *,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    record: Callable[..., Any],
    tangents: bool = True,
    vmap: Callable[..., Any],
    flops: Callable[..., int],
    autocast: int = 0,
) -> None:
    """Registers what `op` is to PyTorch.

    Args:
        compute: takes its arguments and gives its results, on a CPU or a GPU.
        fake: gives results of their shapes, for compilers, or raises.
        record: takes whether the call is plain (BEYOND_PLAIN), and the arguments; gives results
            that can be differentiated.
        tangents: whether `record` is also for operands that may carry tangents.
        vmap: as `torch.library.register_vmap` takes it.
        flops: as `torch.utils.flop_counter.register_flop_formula` takes it.
        autocast: how many arguments autocast casts, the first, as it does those of F.linear.
    """
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(op, compute, device)
    torch.library.register_fake(op, fake, lib=LIBRARY)
    autograd = _autograd_kernel(op, compute, record, tangents)
    LIBRARY.impl(op, autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(op, vmap, lib=LIBRARY)
    for entry in (compute, autograd, vmap):
        internals.hide_from_dynamo(entry)
    if autocast:
        for key in (internals.DispatchKey.AutocastCPU, internals.DispatchKey.AutocastCUDA):
            LIBRARY.impl(op, _autocast_kernel(op, autocast, key), key.name)

    def register_flops() -> None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(op.overloadpacket)(flops)

    when_imported("torch.utils.flop_counter", register_flops)


def recorded(
    function: type[internals.SingleLevelFunction], op: Op, compute: Callable[..., Any]
) -> Callable[..., Any]:
    """What records a call of `op` as `function`, whose first argument is what computes the op."""

    def below_autograd(*arguments: Any) -> Any:
        with internals.below_autograd():
            if internals.transforming():
                with internals.next_level_differentiates():
                    return op(*arguments)
            return op(*arguments)

    def record(plain: bool, *arguments: Any) -> Any:
        if not internals.transforming():
            return function.apply(compute if plain else below_autograd, *arguments)
        with internals.one_level_allowed():
            return function.apply(compute if plain else below_autograd, *arguments)

    internals.hide_from_dynamo(function.backward)
    return record


def _autograd_kernel(
    op: Op, compute: Callable[..., Any], record: Callable[..., Any], tangents: bool
) -> Callable[..., Any]:
    def autograd(keys: Any, *arguments: Any) -> Any:
        plain = not keys.raw_repr() & internals.BEYOND_PLAIN
        if (tangents and internals.forward_ad_active()) or (
            torch.is_grad_enabled() and internals.any_requires_grad(*arguments)
        ):
            return record(plain, *arguments)
        # Where nothing between here and the device's kernel wants the call it goes there at once: a
        # second pass through the dispatcher takes as long as F.linear's whole forward.
        if plain:
            return compute(*arguments)
        with internals.below_autograd():
            return op(*arguments)

    return autograd


def _autocast_kernel(op: Op, operands: int, key: internals.DispatchKey) -> Callable[..., Any]:
    device_type = key.name.removeprefix("Autocast").lower()

    def cast_and_call(*arguments: Any) -> Any:
        cast = [_cast(operand, device_type) for operand in arguments[:operands]]
        with internals.excluding(key):
            return op(*cast, *arguments[operands:])

    internals.hide_from_dynamo(cast_and_call)
    return cast_and_call


def _cast(tensor: Tensor | None, device_type: str) -> Tensor | None:
    if tensor is None or tensor.dtype not in DTYPES:
        return tensor
    dtype = backend.dtype_under(torch.get_autocast_dtype(device_type), tensor.dtype)
    return internals.autocast_copy(tensor, dtype)
