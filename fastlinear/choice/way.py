"""The way of a call: what computes it, decided once for calls that are alike.

`is_pytorchs` is what `linear` asks first, where there is a table. `find` compares operands with
those of earlier calls, in all that PyTorch dispatches by and all that a plan depends on.
`tables_say_so` decides for backend "auto", and `Asked` for each product of the ops, by what tables
say.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from fastlinear import _torch_internals as internals
from fastlinear.choice import backend, known, running, table
from fastlinear.choice.known import Found
from fastlinear.choice.table import PYTORCH, Candidate, Key

LARGEST_CACHE = 4096  # shapes
WAYS_A_SHAPE = 8  # operands of the same shapes may differ in strides, dtype and requires_grad


# Whether no table has a row for a call, by what most calls can be told by. And, for what is told
# sooner, with how many elements of an input a weight of so many begins to have another way than
# PyTorch's, by the tables for so many threads in this group. Whoever adds to them holds on to those
# that there were before it read a table: other tables may have come to hold since.
_pytorchs: dict[Any, bool] = {}
_least: dict[Any, dict[int, int]] = {}


def _forget() -> None:
    global _pytorchs, _least
    _pytorchs, _least = {}, {}  # another thread may be about to write to the old ones


known.watchers.append(_forget)

# Every call takes the time that looking these up takes.
_recording, _threads = torch.is_grad_enabled, torch.get_num_threads


def is_pytorchs(input: Tensor, weight: Tensor, activation: str | None) -> bool:
    """Whether a call of "auto" goes PyTorch's way, by what most calls can be told by.

    False where more has to be looked into.
    """
    try:
        elements, weights = input.numel(), weight.numel()  # half as long as their shapes
        read_by = _threads(), internals.default_group()
        least = _least.get(read_by)
        # No symbols, which would be guarded.
        told = least is not None and type(elements) is int
        if told and elements < least.get(weights, math.inf):  # type: ignore[union-attr]
            return True
        recorded = _recording() and (weight.requires_grad or input.requires_grad)
        key = elements, weights, input.dtype, input.device, activation, recorded, read_by
        answer = _pytorchs.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensors; symbols have no hash
        return True
    if answer is None:
        if internals.tracing() is not None:  # sizes are tensors there
            return True
        known.follow_group()
        answers = _pytorchs
        if least is None:
            _note_least(read_by)
        answer = not _any_row(key)
        if len(answers) >= LARGEST_CACHE:
            answers.clear()
        answers[key] = answer
    return answer


def _note_least(read_by: Any) -> None:
    noted = _least
    if torch.cuda.is_available() and not torch.cuda.is_initialized():
        return  # to ask for a GPU's name would start it
    least: dict[int, int] = {}
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (torch.device("cpu"), *gpus):
        for key in known.rows(device).faster_calls:
            elements = (key.m // 2 + 1) * key.k
            weights = key.n * key.k
            least[weights] = min(elements, least.get(weights, elements))
    noted[read_by] = least


def _any_row(call: tuple[Any, ...]) -> bool:
    """Whether a row may have such a call go another way, whatever its precision."""
    elements, weights, dtype, device, activation, recorded, _ = call
    dtypes = {table.name_of(dtype)}
    if dtype != torch.float64:  # which autocast leaves alone
        dtypes |= {"float16", "bfloat16"}
    return any(
        key.product == ("training" if recorded else "output")
        and (key.n * key.k, key.m) == (weights, table.bucket(elements // key.k))
        and key.activation == activation
        and key.dtype in dtypes
        for key in known.rows(device).faster_calls
    )


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
    operands = (input, weight) if bias is None else (input, weight, bias)
    of_bias = None if bias is None else bias.shape
    for way in _ways.get((input.shape, weight.shape, of_bias, activation, grad, settings), ()):
        if way.alike(*operands):
            if way.output is None:
                return way
            addresses = input.data_ptr() | weight.data_ptr()
            if bias is not None:
                addresses |= bias.data_ptr()
            return None if addresses % 16 or internals.watched() else way
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
    return {(key.n, key.k) for key in known.rows(device).faster_calls}


def any_gradients(device: torch.device) -> bool:
    """Whether a table has something else than PyTorch for a gradient's product there."""
    return known.rows(device).any_gradients


def tables_say_so(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Way | bool:
    """Whether backend "auto" takes the op: for plain operands, if a table says so.

    By which way, if one is remembered.
    """
    operands = (input, weight) if bias is None else (input, weight, bias)
    if backend.current != "auto" or any(type(one) not in internals.PLAIN for one in operands):
        return False
    if any(one.is_nested or one.layout != torch.strided for one in operands):
        return False
    if is_dynamo_compiling():
        return takes_ours(input, weight, bias, activation)
    found = find(input, weight, bias, activation)
    if found is not None:
        return False if found.output is None else found
    if internals.transforming() or internals.tracing() is not None:
        return False
    ours = takes_ours(input, weight, bias, activation)
    if not ours:
        remember(input, weight, bias, activation, None)
    return ours


def takes_ours(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether a table says that the op is faster than PyTorch for these operands of `linear`.

    Only for plain operands that lie as they did when it was measured. A function that is compiled
    takes the op if the table says so of any number of rows, and the op decides when it runs: guards
    on rows would have it compiled again and again, and exclude a dynamic batch size.
    """
    if input.dim() == 0 or weight.dim() != 2:
        return False
    compiling = is_dynamo_compiling()
    # A parameter's sizes are constants there; others' may be symbols. What is exported is to run
    # without the table, and without this package.
    if compiling and (not isinstance(weight, Parameter) or internals.exporting()):
        return False
    (n, k), device = weight.shape, input.device
    if not k or input.shape[-1] != k:
        return False
    if not (input.is_contiguous() and weight.is_contiguous() and weight.device == device):
        return False
    if not compiling and (input.data_ptr() | weight.data_ptr()) % 16:
        return False
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n or bias.device != device):
        return False
    dtypes = [one.dtype for one in (input, weight, bias) if one is not None]
    if internals.autocasting():
        autocast = backend.autocast_dtype(device.type)
        dtypes = [backend.dtype_under(autocast, dtype) for dtype in dtypes]
    dtype = dtypes[0]
    if dtypes != [dtype] * len(dtypes):
        return False
    layer = dtype, bias is not None, wanted_of(input, weight, bias), activation, n, k
    if compiling:
        return _for_any_rows(device, *layer)
    key = call_key(device, *layer, input.numel() // k)
    found = known.row(device, key)
    if found is None or found.row.candidate == PYTORCH:
        return False
    return table.is_there(found.row.candidate, key, device)


def wanted_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Whose gradients may be wanted of a call now, as rows have it."""
    if not torch.is_grad_enabled():
        return ""
    wanted = ["input"] * input.requires_grad + ["weight"] * weight.requires_grad
    return " ".join(wanted + ["bias"] * (bias is not None and bias.requires_grad))


def call_key(
    device: torch.device,
    dtype: torch.dtype,
    bias: bool,
    wanted: str,
    activation: str | None,
    n: int,
    k: int,
    m: int = 1,
) -> Key:
    """That of a call of `linear`, in the settings that are in force."""
    precision = backend.table_precision(dtype, device)  # which Dynamo guards itself
    return table.call(
        dtype, bias, n, k, m, wanted=wanted, activation=activation, precision=precision
    )


def _for_any_rows(device: torch.device, *call: Any) -> bool:
    """Whether another way than PyTorch's is faster for some number of rows.

    call: as `call_key` takes it, but for the rows.
    """
    known.follow_group()
    key = call_key(device, *call)
    measured = {one.m for one in known.rows(device)}
    found = (known.row(device, key._replace(m=m)) for m in measured)
    return any(one is not None and one.row.candidate != PYTORCH for one in found)


internals.constant_to_dynamo(_for_any_rows)


class Asked(NamedTuple):
    """A product of an op, of `first`, which has its rows, and `second`, of so many features.

    dtype: theirs, or what autocast makes of it; None is theirs.
    """

    product: str
    first: Tensor
    second: Tensor
    n: int
    k: int
    activation: str | None = None
    bias: bool = False
    dtype: torch.dtype | None = None

    def row(self) -> Found | None:
        """The row it goes by, if one counts: of operands that lie as they did when measured."""
        product, first, second, n, k, activation, bias, dtype = self
        if not (first.is_contiguous() and second.is_contiguous() and n * k):
            return None
        if (first.data_ptr() | second.data_ptr()) % 16:
            return None
        device, dtype = first.device, dtype or first.dtype
        name, precision = table.name_of(dtype), backend.table_precision(dtype, device)
        m = first.numel() // first.shape[-1]
        key = Key(product, name, precision, activation, bias, "", n, k, m)
        found = known.row(device, key)
        if found is None or not table.is_there(found.row.candidate, key, device):
            return None
        # With backend "triton" a row that holds no kernel has no say.
        ours = not isinstance(found.row.candidate, str)
        return found if ours or running.takes_pytorch() else None

    def candidate(self) -> Candidate | None:
        """What computes it: PYTORCH, a library, or a kernel in a configuration of a table's.

        With None it is a kernel in that which the launcher chooses.
        """
        if running.only_pytorch():
            return PYTORCH
        found = self.row()
        if found is not None:
            return found.row.candidate
        return PYTORCH if running.takes_pytorch() else None
