"""What makes a kernel's mistakes visible.

An interpreter that is as strict as a GPU, poisoned outputs between guards, and loads and stores
that stay within the tensors of their launch.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlinear.kernels.launching import launch


def make_interpreter_strict() -> None:
    """Has Triton's interpreter, for the rest of the process, do as a GPU does where it does not."""
    _poison_unset_loads()
    _sum_products_exactly()
    _round_to_bfloat16()
    _refuse_overflow()
    _remember_patches()


def _poison_unset_loads() -> None:
    """Gives masked loads that set no `other` NaN where the interpreter gives 0.

    On a GPU the value is undefined. And takes boolean masks only, as Triton 3.9's interpreter does.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    load = InterpreterBuilder.create_masked_load

    def poisoned_load(self, ptrs, mask, other, *arguments, **named):  # type: ignore[no-untyped-def]
        assert np.asarray(mask.data).dtype == bool, "a mask that Triton 3.9's interpreter refuses"
        if other is None:
            dtype = ptrs.get_element_ty()
            # bfloat16 is held as bit patterns, of which all ones is a NaN as well.
            value = (
                np.nan
                if np.issubdtype(_get_np_dtype(dtype), np.floating)
                else np.iinfo(_get_np_dtype(dtype)).max
            )
            other = TensorHandle(np.full_like(ptrs.data, value, dtype=_get_np_dtype(dtype)), dtype)
        return load(self, ptrs, mask, other, *arguments, **named)

    InterpreterBuilder.create_masked_load = poisoned_load


def _sum_products_exactly() -> None:
    """Rounds each interpreted `tl.dot` once, whatever numpy's BLAS does.

    The interpreter leaves the order of a product's additions to numpy, and so to the machine; its
    error says nothing of the kernel's and would take part of the budget.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def exact_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        wide = np.longdouble if acc.data.dtype == np.float64 else np.float64
        product = np.matmul(a.data.astype(wide), b.data.astype(wide)).astype(acc.data.dtype)
        return TensorHandle(product + acc.data, acc.dtype.scalar)

    InterpreterBuilder.create_dot = exact_dot


def _round_to_bfloat16() -> None:
    """Rounds to bfloat16 to nearest, and widens denormals, as every GPU does.

    The interpreter truncates: terms all err to one side, and their sum by many times what it would
    on a GPU. It also takes a denormal for another number.
    """
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(input, input_dtype, output_dtype, rounding_mode):  # type: ignore[no-untyped-def]
        if input.dtype == np.float32 and output_dtype.is_bf16():
            wide = torch.from_numpy(np.ascontiguousarray(input))
            return wide.bfloat16().view(torch.uint16).numpy()
        if input_dtype.is_bf16() and output_dtype.is_fp32():
            return input.astype(np.uint32) << 16
        return convert(input, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = converted


def _refuse_overflow() -> None:
    """Fails where signed integers of up to 32 bits leave their type, in a sum or a product.

    A GPU goes on with a wrong address, silently. Loop variables are Python's here and reach
    further; lanes that no load or store uses count all the same. The interpreter looks too, with
    many times the work, and then drops what it found.
    """
    from triton.language.semantic import TritonSemantic

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self, lhs, rhs, binary_op):  # type: ignore[no-untyped-def]
        dtype = lhs.type.scalar
        if dtype.int_bitwidth >= 64 or dtype.is_int_unsigned():  # unsigned: bits, not addresses
            return
        operation = operations[binary_op.__name__]
        exact = operation(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        assert (exact >= dtype.get_int_min_value()).all(), f"{binary_op.__name__} overflows {dtype}"
        assert (exact <= dtype.get_int_max_value()).all(), f"{binary_op.__name__} overflows {dtype}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _remember_patches() -> None:
    """Has the interpreter look for what it replaces in Triton's language once.

    It does so at every launch, and in every function that a kernel calls.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_builtin
    patches: dict[Any, list[tuple[str, Any]]] = {}

    def patch_again(package, builder, scope):  # type: ignore[no-untyped-def]
        if package not in patches:
            before = len(scope._changes)
            patch(package, builder, scope)
            names = [name for _, name, _ in scope._changes[before:]]
            patches[package] = [(name, getattr(package, name)) for name in names]
            return
        for name, member in patches[package]:
            if getattr(package, name) is not member:  # it is, in what a kernel calls
                scope.set_attr(package, name, member)

    interpreter._patch_builtin = patch_again


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Every output and workspace starts as NaN, between guards that no kernel may write to.

    So an element that is never written, or read early, is seen, and so is a store past the end.
    """
    guard, untouched = 1024, -77.0
    buffers: list[Tensor] = []

    def allocate(like: Tensor, output: launch.Operand) -> Tensor:
        shape, dtype, device = output.shape, output.dtype, like.device
        size = math.prod(shape)
        buffer = torch.full((size + 2 * guard,), untouched, dtype=dtype, device=device)
        buffer[guard : guard + size] = float("nan")
        buffers.append(buffer)
        # A tensor of its own rather than a view: autograd treats views differently.
        return torch.empty(0, dtype=dtype, device=device).set_(
            buffer.untyped_storage(), guard, shape
        )

    allocate_unpoisoned, launch.allocate = launch.allocate, allocate
    try:
        yield
    finally:
        launch.allocate = allocate_unpoisoned
    for buffer in buffers:
        assert (buffer[:guard] == untouched).all(), "a kernel wrote before its output"
        assert (buffer[-guard:] == untouched).all(), "a kernel wrote past its output"


def extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the first past its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    farthest = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + (farthest + 1) * tensor.element_size()


@contextlib.contextmanager
def watched_addresses() -> Iterator[None]:
    """Fails where a kernel reads or writes what is no tensor's of its launch.

    In the interpreter, which has every address at hand; a GPU has only the NaN around operands.
    """
    if not launch.INTERPRETING:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    run = launch.run
    reached = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }
    tensors: list[tuple[int, int]] = []

    def noted_run(kernel: Any, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:
        tensors[:] = [extent(tensor) for tensor in pointers if tensor is not None]
        run(kernel, plan, pointers)

    def check(pointers: Any, mask: Any, what: str) -> None:
        first = pointers.data[np.asarray(mask.data).astype(bool)].astype(np.int64)
        past = first + pointers.get_element_ty().primitive_bitwidth // 8
        within = np.zeros(first.shape, dtype=bool)
        for start, end in tensors:
            within |= (first >= start) & (past <= end)
        assert within.all(), f"a kernel {what} outside of every tensor of its launch"

    def load(self: Any, pointers: Any, mask: Any, *arguments: Any, **named: Any) -> Any:
        check(pointers, mask, "reads")
        return reached["create_masked_load"](self, pointers, mask, *arguments, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask, "writes")
        return reached["create_masked_store"](self, pointers, value, mask, *others)

    def add(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask, "counts")
        return reached["create_atomic_rmw"](self, operation, pointers, value, mask, *others)

    launch.run = noted_run
    for name, watched in zip(reached, (load, store, add), strict=True):
        setattr(InterpreterBuilder, name, watched)
    try:
        yield
    finally:
        launch.run = run
        for name, unwatched in reached.items():
            setattr(InterpreterBuilder, name, unwatched)


class SeenByDispatch(TorchDispatchMode):
    """Notes the ops that get to the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.seen.append(function)
        return function(*arguments, **(options or {}))
