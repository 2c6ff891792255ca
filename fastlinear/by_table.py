"""Whether backend "auto" takes the op, and what computes each product, as tables say."""

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlinear import _torch_internals as internals
from fastlinear import backend, implementations, lookup, tuned
from fastlinear.kernels import tables
from fastlinear.kernels.configs import PYTORCH, BackwardConfig, Config
from fastlinear.kernels.tables import Key
from fastlinear.lookup import Found


def _key(
    product: str,
    dtype: torch.dtype,
    activation: str | None,
    bias: bool,
    n: int,
    k: int,
    m: int = 0,
) -> Key:
    precision = backend.table_precision(dtype)
    return Key(product, lookup.name_of(dtype), precision, activation, bias, n, k, m)


def _ranges(
    device: torch.device,
    product: str,
    dtype: torch.dtype,
    activation: str | None,
    bias: bool,
    n: int,
    k: int,
) -> tuple[tuple[int, int], ...]:
    """`lookup.ranges`, for a function that is being compiled: a constant there."""
    precision = backend.table_precision(dtype)  # which Dynamo guards itself
    lookup.follow_group()
    return lookup.ranges(
        tuned.generation, device, product, dtype, precision, activation, bias, n, k
    )


internals.constant_to_dynamo(_ranges)


class Rule(threading.local):
    """Whether the ops may take PyTorch's products too, where a table's row does not say otherwise.

    In "auto" they may; a backward goes by the backend of its forward.
    """

    auto: bool | None = None  # within `backward_of`, and None outside

    @property
    def takes_pytorch(self) -> bool:
        return backend.current == "auto" if self.auto is None else self.auto


rule = Rule()


class backward_of:
    """Context manager within which the ops go by the backend of a forward, "auto" or not."""

    def __init__(self, auto: bool) -> None:
        self.auto, self.previous = auto, rule.auto

    def __enter__(self) -> None:
        rule.auto = self.auto

    def __exit__(self, *error: object) -> None:
        rule.auto = self.previous


def kernels_win(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether a table says that the op is faster than PyTorch for these operands of `linear`.

    Only for plain operands that lie as they did when it was measured. A function that is compiled
    takes the op if the table says so of any number of rows, and the op decides when it runs: guards
    on rows would have it compiled again and again, and exclude a dynamic batch size.
    """
    # What most calls of "auto" can be told by comes first: each takes the time that this takes.
    if input.is_nested or weight.is_nested or input.dim() == 0 or weight.dim() != 2:
        return False
    compiling = torch.compiler.is_dynamo_compiling()
    # A parameter's sizes are constants there; others' may be symbols. What is exported is to run
    # without the table, and without this package.
    if compiling and (not isinstance(weight, Parameter) or internals.exporting()):
        return False
    (n, k), device = weight.shape, input.device
    if not k or input.shape[-1] != k:
        return False
    m = 0 if compiling else input.numel() // k
    if not compiling and (n, k, tables.bucket(m)) not in lookup.sizes(device):
        return False
    if input.layout != torch.strided or weight.layout != torch.strided:
        return False
    if not (input.is_contiguous() and weight.is_contiguous() and weight.device == device):
        return False
    if not compiling and (input.data_ptr() | weight.data_ptr()) % 16:
        return False
    dtype, dtypes = input.dtype, (weight.dtype, input.dtype if bias is None else bias.dtype)
    if internals.autocasting():
        autocast = backend.autocast_dtype(device.type)
        dtype = backend.dtype_under(autocast, dtype)
        dtypes = (
            backend.dtype_under(autocast, dtypes[0]),
            backend.dtype_under(autocast, dtypes[1]),
        )
    if dtypes != (dtype, dtype):
        return False
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n or bias.device != device):
        return False
    recording = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    product = "training" if recording else "output"
    ranges = _ranges(device, product, dtype, activation, bias is not None, n, k)
    return bool(ranges) if compiling else any(first <= m <= last for first, last in ranges)


def _product_candidate(
    product: str,
    first: Tensor,
    second: Tensor,
    n: int,
    k: int,
    activation: str | None = None,
    bias: bool = False,
) -> Config | str | None:
    """What computes a product of `first`, which has its rows, and `second`: PYTORCH, or a kernel.

    That is in a configuration of a table's, or, with None, in that which the launcher chooses.
    """
    found = None
    plain = first.is_contiguous() and second.is_contiguous()
    if plain and n * k and (first.data_ptr() | second.data_ptr()) % 16 == 0:
        m = first.numel() // first.shape[-1]
        key = _key(product, first.dtype, activation, bias, n, k, m)
        found = lookup.find(first.device, key)
    candidate = None if found is None else found.row.candidate
    if rule.takes_pytorch:
        return PYTORCH if candidate is None else candidate
    return None if candidate == PYTORCH else candidate


def output_candidate(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Config | str | None:
    """`_product_candidate` of a layer's output."""
    if weight.dim() != 2 or input.dim() == 0:
        return None
    n, k = weight.shape
    return _product_candidate("output", input, weight, n, k, activation, bias is not None)


def _pair(grad_output: Tensor, input: Tensor, weight: Tensor, bias: bool) -> BackwardConfig | None:
    """That in which one launch computes both products, where a table says so."""
    operands, addresses = (grad_output, input, weight), grad_output.data_ptr()
    addresses |= input.data_ptr() | weight.data_ptr()
    if addresses % 16 or not weight.numel() or not all(one.is_contiguous() for one in operands):
        return None
    n, k = weight.shape
    key = _key("gradients", weight.dtype, None, bias, n, k, input.numel() // k)
    found = lookup.find(weight.device, key)
    candidate = None if found is None else found.row.candidate
    return candidate if isinstance(candidate, BackwardConfig) else None


def _as_they_are(device_type: str) -> AbstractContextManager[object]:
    """Within it operands stay what autocast made them."""
    if not internals.autocasting():
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def gradients(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """The products as a table says; None where it says nothing of them."""
    if weight is not None and input is not None:
        pair = _pair(grad_output, input, weight, bias)
        if pair is not None:
            precision = backend.float32_precision()
            together = backend.launchers().backward.linear_backward
            return together(grad_output, input, weight, bias, precision=precision, config=pair)
    operand = weight if weight is not None else input
    if operand is None or not grad_output.dim():
        return None
    n, k = grad_output.shape[-1], operand.shape[-1]
    of_input = of_weight = None
    if weight is not None:
        of_input = _product_candidate("grad_input", grad_output, weight, n, k)
    if input is not None:
        of_weight = _product_candidate("grad_weight", grad_output, input, n, k, bias=bias)
    if of_input is None and of_weight is None:
        return None
    kernels, precision = backend.launchers(), backend.float32_precision()
    grad_input = grad_weight = grad_bias = None
    with _as_they_are(grad_output.device.type):
        if of_input == PYTORCH and weight is not None:
            grad_input = torch.matmul(grad_output, weight)
        if of_weight == PYTORCH and input is not None:
            m = input.shape[:-1].numel()
            grad_weight = grad_output.reshape(m, n).mT @ input.reshape(m, k)
            grad_bias = implementations.sum_rows(grad_output, batched=False) if bias else None
    if of_input != PYTORCH and weight is not None:
        grad_input = kernels.backward.linear_backward_input(
            grad_output, weight, precision=precision, config=of_input
        )
    if of_weight != PYTORCH and input is not None:
        grad_weight, grad_bias = kernels.backward_weight.linear_backward_weight(
            grad_output, input, bias, precision=precision, config=of_weight
        )
    return grad_input, grad_weight, grad_bias


def rows_of(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dtype: torch.dtype
) -> dict[str, Found]:
    """The rows that a call goes by, by product, for `explain`."""
    n, k = weight.shape
    if not (input.is_contiguous() and weight.is_contiguous()) or 0 in (n, k):
        return {}
    if (input.data_ptr() | weight.data_ptr()) % 16:
        return {}
    m = input.numel() // k
    bias_wanted = bias is not None and bias.requires_grad
    keys = [
        _key("output", dtype, activation, bias is not None, n, k, m),
        _key("grad_input", dtype, None, False, n, k, m),
        _key("grad_weight", dtype, None, bias_wanted, n, k, m),
    ]
    if input.requires_grad and weight.requires_grad:
        keys += [_key("gradients", dtype, None, bias_wanted, n, k, m)]
    rows = {key.product: lookup.find(input.device, key) for key in keys}
    # With backend "triton" a row that holds no kernel has no say.
    return {
        product: found
        for product, found in rows.items()
        if found is not None and (backend.current == "auto" or found.row.candidate != PYTORCH)
    }
