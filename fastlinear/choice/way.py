"""The way of a call: what computes it, decided once for calls that are alike.

`find` is what `linear` asks first: it compares operands with those of earlier calls, in all that
PyTorch dispatches by and all that a plan depends on. `takes_ours` decides for backend "auto", and
`of_output`, `of_product` and `of_pair` for each product of the ops, by what tables say.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlinear import _torch_internals as internals
from fastlinear.choice import backend, known, running
from fastlinear.choice.known import LARGEST_CACHE, Found
from fastlinear.choice.table import LIBRARIES, PYTORCH, Candidate, Key
from fastlinear.kernels.configs.config import BackwardConfig

WAYS_A_SHAPE = 8  # operands of the same shapes may differ in strides, dtype and requires_grad


class Way(NamedTuple):
    """What `linear` does for operands that are `alike`, if nothing watches.

    requires_grad: whether a gradient of one of them may be wanted.
    output: what computes it from them; None where PyTorch does it all.
    recorded: what the ops' Functions compute by.
    """

    alike: Callable[..., bool]
    requires_grad: bool
    output: Callable[..., Any] | None
    recorded: Callable[..., Any] | None


# By shapes, which nested tensors refuse to tell: `alike` must not be asked about those. Only for
# operands whose addresses divide by 16, as nearly all do.
_ways: dict[Any, list[Way]] = {}


def find(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Way | None:
    """The way of operands like these, if one is remembered."""
    # Every call takes the time that this takes: hence no function for each of its parts.
    grad = backend.current == "auto" and torch.is_grad_enabled()  # tables know steps apart
    settings = backend.settings()
    if bias is None:
        for way in _ways.get((input.shape, weight.shape, None, activation, grad, settings), ()):
            if way.alike(input, weight):
                if way.output is None:
                    return way
                unaligned = (input.data_ptr() | weight.data_ptr()) % 16
                return None if unaligned or internals.watched() else way
        return None
    for way in _ways.get((input.shape, weight.shape, bias.shape, activation, grad, settings), ()):
        if way.alike(input, weight, bias):
            if way.output is None:
                return way
            unaligned = (input.data_ptr() | weight.data_ptr() | bias.data_ptr()) % 16
            return None if unaligned or internals.watched() else way
    return None


def remember(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    made: Callable[..., tuple[Callable[..., Any], Callable[..., Any]]] | None,
) -> None:
    """Makes a way for operands that `linear` has just taken, if there can be one.

    Args:
        input, weight, bias, activation: what it took.
        made: gives `Way.output` and `Way.recorded` for them; None where PyTorch does it all.
    """
    # First what is quickly told: where there is never a way this is in vain every time.
    addresses = input.data_ptr() | weight.data_ptr() | (0 if bias is None else bias.data_ptr())
    if addresses % 16 or internals.autocasting() or internals.watched():
        return
    operands = (input, weight) if bias is None else (input, weight, bias)
    if not internals.plain(*operands):
        return
    # Asked before the plan is made, so that a table that comes between makes it one of the past.
    grad = backend.current == "auto" and torch.is_grad_enabled()
    settings = backend.settings()
    output, recorded = (None, None) if made is None else made(input, weight, bias, activation)
    # Another thread may have changed them in the middle: then nobody knows which the plan is for.
    if settings != backend.settings():
        return
    if len(_ways) >= LARGEST_CACHE:
        _ways.clear()
    shapes = input.shape, weight.shape, None if bias is None else bias.shape
    ways = _ways.setdefault((*shapes, activation, grad, settings), [])
    if len(ways) >= WAYS_A_SHAPE:
        ways.clear()
    wanted = internals.above_autograd() and any(one.requires_grad for one in operands)
    ways.append(Way(internals.alike(*operands), wanted, output, recorded))


def faster_sizes(device: torch.device) -> set[tuple[int, int]]:
    """The (n, k) of layers for which, of some batch, another way than PyTorch's is known."""
    known.follow_group()
    return {
        (key.n, key.k)
        for key, found in known.found(device).items()
        if key.product in ("output", "training") and found.row.candidate != PYTORCH
    }


def _key(
    product: str,
    first: Tensor,
    dtype: torch.dtype,
    activation: str | None,
    bias: bool,
    n: int,
    k: int,
    m: int = 0,
    wanted: str = "",
) -> Key:
    precision = backend.table_precision(dtype, first.device)
    name = known.name_of(dtype)
    return Key(product, name, precision, activation, bias, wanted, n, k, m)


def _for_any_rows(
    device: torch.device,
    product: str,
    dtype: torch.dtype,
    activation: str | None,
    bias: bool,
    wanted: str,
    n: int,
    k: int,
) -> bool:
    """Whether another way than PyTorch's is faster for some number of rows."""
    known.follow_group()
    precision = backend.table_precision(dtype, device)  # which Dynamo guards itself
    key = Key(product, known.name_of(dtype), precision, activation, bias, wanted, n, k, 1)
    rows = {one.m for one in known.found(device)}
    found = (known.find(device, key._replace(m=m)) for m in rows)
    return any(one is not None and one.row.candidate != PYTORCH for one in found)


internals.constant_to_dynamo(_for_any_rows)


def takes_ours(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether a table says that the op is faster than PyTorch for these operands of `linear`.

    Only for plain operands that lie as they did when it was measured. A function that is compiled
    takes the op if the table says so of any number of rows, and the op decides when it runs: guards
    on rows would have it compiled again and again, and exclude a dynamic batch size.
    """
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
    wanted = wanted_of(input, weight, bias)
    product = "training" if wanted else "output"
    if compiling:
        what = device, product, dtype, activation, bias is not None, wanted
        return _for_any_rows(*what, n, k)
    m = input.numel() // k
    key = _key(product, input, dtype, activation, bias is not None, n, k, m, wanted)
    found = known.find(device, key)
    if found is None or found.row.candidate == PYTORCH:
        return False
    how = activation, bias is not None
    return _is_there(found.row.candidate, product, device, dtype, *how)


def _is_there(
    candidate: Candidate,
    product: str,
    device: torch.device,
    dtype: torch.dtype,
    activation: str | None,
    bias: bool,
) -> bool:
    """Whether a library, where that is the candidate, takes such a product here and now."""
    if not isinstance(candidate, str) or candidate not in LIBRARIES:
        return True
    return LIBRARIES[candidate].why_not(product, device, dtype, activation, bias) is None


def wanted_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Whose gradients may be wanted of a call now, as rows have it."""
    if not torch.is_grad_enabled():
        return ""
    wanted = ["input"] * input.requires_grad + ["weight"] * weight.requires_grad
    return " ".join(wanted + ["bias"] * (bias is not None and bias.requires_grad))


def row_of(
    product: str,
    first: Tensor,
    second: Tensor,
    n: int,
    k: int,
    activation: str | None = None,
    bias: bool = False,
    dtype: torch.dtype | None = None,
) -> Found | None:
    """The row for a product of `first`, which has its rows, and `second`, if there is one.

    Only of operands that lie as they did when it was measured. dtype: theirs, or what autocast
    makes of it.
    """
    if not (first.is_contiguous() and second.is_contiguous() and n * k):
        return None
    if (first.data_ptr() | second.data_ptr()) % 16:
        return None
    m = first.numel() // first.shape[-1]
    key = _key(product, first, dtype or first.dtype, activation, bias, n, k, m)
    return known.find(first.device, key)


def of_product(
    product: str,
    first: Tensor,
    second: Tensor,
    n: int,
    k: int,
    activation: str | None = None,
    bias: bool = False,
) -> Candidate | None:
    """What computes a product, as `row_of` takes it.

    PYTORCH, a library's name, a kernel in a configuration of a table's, or, with None, in that
    which the launcher chooses.
    """
    if running.only_pytorch():
        return PYTORCH
    found = row_of(product, first, second, n, k, activation, bias)
    candidate = None if found is None else found.row.candidate
    if candidate and not _is_there(candidate, product, first.device, first.dtype, activation, bias):
        candidate = None
    if running.takes_pytorch():
        return PYTORCH if candidate is None else candidate
    return None if isinstance(candidate, str) else candidate


def any_gradients(device: torch.device) -> bool:
    """Whether a table has something else than PyTorch for a gradient's product there."""
    return _any_gradients(device, known.generation, torch.get_num_threads())


@functools.lru_cache
def _any_gradients(device: torch.device, generation: int, threads: int) -> bool:
    products = ("grad_input", "grad_weight", "gradients")
    return any(
        key.product in products and found.row.candidate != PYTORCH
        for key, found in known.found(device).items()
    )


def of_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Candidate | None:
    """`of_product` of the output of a layer, or of B layers."""
    if weight.dim() != 2 or input.dim() == 0:
        return PYTORCH if running.takes_pytorch() else None
    n, k = weight.shape
    return of_product("output", input, weight, n, k, activation, bias is not None)


def of_pair(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: bool
) -> BackwardConfig | None:
    """That in which one launch computes both products of a backward, where a table says so."""
    n, k = weight.shape
    plain = grad_output.is_contiguous() and grad_output.data_ptr() % 16 == 0
    candidate = of_product("gradients", input, weight, n, k, bias=bias) if plain else None
    return candidate if isinstance(candidate, BackwardConfig) else None


def rows_of(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dtype: torch.dtype
) -> dict[str, Found]:
    """The rows that a call goes by, by product, for `explain`."""
    of_bias = bias is not None and bias.requires_grad
    asked: dict[str, tuple[str | None, bool]] = {
        "output": (activation, bias is not None),
        "grad_input": (None, False),
        "grad_weight": (None, of_bias),
    }
    if input.requires_grad and weight.requires_grad:
        asked["gradients"] = None, of_bias
    n, k = weight.shape
    rows = {
        product: row_of(product, input, weight, n, k, *what, dtype)
        for product, what in asked.items()
    }
    # With backend "triton" a row that holds no kernel has no say.
    return {
        product: found
        for product, found in rows.items()
        if found is not None
        and (backend.current == "auto" or not isinstance(found.row.candidate, str))
        and _is_there(found.row.candidate, product, input.device, dtype, *asked[product])
    }
