"""The row of a table for each product of a layer, by measuring it.

Something else than PyTorch's way is entered where it is as exact, faster on the device or for the
caller, by more than the measurements scatter, and slower at neither.
"""

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlinear import backend
from fastlinear.choice import table
from fastlinear.choice.table import BY_ROWS, PYTORCH, Candidate, Key, Row
from fastlinear.tuning.products import Layer, Products, in_turn
from fastlinear.tuning.stopwatch import Call, Measure

# How many times PyTorch's error may be, as a root mean square. On CPUs F.linear adds in blocks, and
# oneDNN in one run, as most do: that errs by some twice as much in sums of some thousand terms.
TIMES_THE_ERROR = 2.5


def as_exact(results: Any, native: Any, exact: tuple[Tensor, ...], terms: int) -> bool:
    """Whether no result is farther from the truth than PyTorch's, but for what rounding makes.

    That is by TIMES_THE_ERROR, and half a rounding, as a root mean square; no element by twice that
    at the largest. In float64 the truth itself is off by the roundings of sums of so many terms.
    """
    for result, theirs, truth in zip(results, native, exact, strict=True):
        rounding = torch.finfo(result.dtype).eps / 2
        if result.dtype == torch.float64:
            rounding *= 2 * math.sqrt(terms)
        errors = _sizes(result.double() - truth)  # one at a time: each is a tensor in float64
        their_errors, values = _sizes(theirs.double() - truth), _sizes(truth)
        for times, error, their_error, value in zip(
            (1, 2), errors, their_errors, values, strict=True
        ):
            # NaN is not less.
            if not error <= times * (TIMES_THE_ERROR * their_error + rounding * value):
                return False
    return True


def _sizes(values: Tensor) -> tuple[float, float]:
    """The root mean square, and the largest."""
    norm = torch.linalg.vector_norm
    return norm(values).item() / math.sqrt(max(1, values.numel())), norm(values, math.inf).item()


def faster(times: list[float], than: list[float]) -> bool:
    """Whether the times are less in three of four rounds, in which all calls took turns."""
    gained = sorted(theirs - ours for ours, theirs in zip(times, than, strict=True))
    return gained[len(gained) // 4] > 0


def wins(
    device: list[float], wall: list[float], their_device: list[float], their_wall: list[float]
) -> bool:
    """Whether a kernel is faster than PyTorch on one clock, and slower on neither."""
    if faster(their_device, device) or faster(their_wall, wall):
        return False
    return faster(device, their_device) or faster(wall, their_wall)


def measure_layer(
    layer: Layer, device: torch.device, measure: Measure, known: dict[Key, Row]
) -> Iterator[Row]:
    """The rows of a layer that are not known yet; those of its products, and then of all."""
    keys = [layer.key(product, device) for product in layer.products(device)]
    if all(key in known for key in keys):
        return
    products = Products(layer, device)
    rows: list[Row] = []
    for key in keys:
        row = known.get(key)
        if row is None:
            if key.product == "training":
                row = _measure_training(products, key, measure, rows)
            elif key.product == "gradients":
                row = _measure_gradients(products, key, measure, rows[1:])
            else:
                row = _measure_product(products, key, measure)
            yield row
        rows.append(row)


def _exact_calls(products: Products, product: str) -> dict[Candidate, Call]:
    """The calls for a product, by candidate, that give what they should."""
    exact, theirs = products.exact(product), products.by_pytorch(product)()
    layer = products.layer
    terms = {"output": layer.k, "grad_input": layer.n, "grad_weight": layer.m}
    most = terms.get(product, max(layer.m, layer.n))
    calls: dict[Candidate, Call] = {}
    for config in products.candidates(product):
        call = products.by_kernel(product, config)
        try:
            if as_exact(call(), theirs, exact, most):
                calls[config] = call
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton has many of its own
            print(f"left out, as it fails: {product} of {layer} by {config}: {error}")
    return calls


def _measure_product(products: Products, key: Key, measure: Measure) -> Row:
    product, native = key.product, products.by_pytorch(key.product)
    calls = _exact_calls(products, product)
    if on_cpu(products):
        return _measure_on_cpu(products, key, measure, next(iter(calls), PYTORCH), [])
    times = measure({PYTORCH: native} | {str(one): call for one, call in calls.items()}, "device")
    if not calls:
        walls = measure({PYTORCH: native}, "wall")
        return _row(key, PYTORCH, times[PYTORCH], walls[PYTORCH], times[PYTORCH], walls[PYTORCH])
    best = _least(calls, times)
    if product == "output":
        # What a caller waits for is the way through the op too.
        public = products.public
        both = {PYTORCH: public(by_pytorch=True), str(best): public(by_pytorch=False)}
        with _trial(products.device, [_unmeasured(key, best)]), torch.no_grad():
            walls = measure(both, "wall")
    else:
        walls = measure({PYTORCH: native, str(best): calls[best]}, "wall")
    measured = (times[str(best)], walls[str(best)], times[PYTORCH], walls[PYTORCH])
    return _row(key, best if wins(*measured) else PYTORCH, *measured)


def _measure_gradients(products: Products, key: Key, measure: Measure, rows: list[Row]) -> Row:
    """One launch for both, if it is faster than PyTorch and than the rows of each."""
    pairs = _exact_calls(products, key.product)
    calls: dict[str, Call] = {PYTORCH: products.by_pytorch(key.product)}
    apart = PYTORCH
    if any(row.candidate != PYTORCH for row in rows):
        apart = BY_ROWS
        calls[apart] = products.apart()
    with _trial(products.device, rows):
        times = measure(calls | {str(pair): call for pair, call in pairs.items()}, "device")
        best: Candidate = apart
        if pairs:
            best = _least(pairs, times)
            calls[str(best)] = pairs[best]
        walls = measure(calls, "wall")
    of_best, of_apart, of_pytorch = (
        (times[str(one)], walls[str(one)]) for one in (best, apart, PYTORCH)
    )
    if best != apart and wins(*of_best, *of_apart) and wins(*of_best, *of_pytorch):
        return _row(key, best, *of_best, *of_pytorch)
    return _row(key, apart, *of_apart, *of_pytorch)


def _measure_training(products: Products, key: Key, measure: Measure, rows: list[Row]) -> Row:
    ours = BY_ROWS if any(row.candidate != PYTORCH for row in rows) else PYTORCH
    if on_cpu(products):
        return _measure_on_cpu(products, key, measure, ours, rows)
    calls = {PYTORCH: products.step(by_pytorch=True)}
    if ours != PYTORCH:
        calls[ours] = products.step(by_pytorch=False)
    with _trial(products.device, [*rows, _unmeasured(key, ours)]):
        times, walls = measure(calls, "device"), measure(calls, "wall")
    measured = (times[ours], walls[ours], times[PYTORCH], walls[PYTORCH])
    return _row(key, ours if ours != PYTORCH and wins(*measured) else PYTORCH, *measured)


def on_cpu(products: Products) -> bool:
    """Whether there is one clock, the caller's, and no kernel."""
    return products.device.type == "cpu" and not backend.kernels_run_on(products.device)


def _measure_on_cpu(
    products: Products, key: Key, measure: Measure, candidate: Candidate, rows: list[Row]
) -> Row:
    """The row of an output or a step, by way of `fastlinear.linear`: what a caller waits for."""
    way = Products.public if key.product == "output" else Products.step
    calls = {PYTORCH: in_turn(products, lambda one: way(one, by_pytorch=True))}
    if candidate != PYTORCH:
        calls[str(candidate)] = in_turn(products, lambda one: way(one, by_pytorch=False))
    grad = key.product != "output"
    with (
        _trial(products.device, [*rows, _unmeasured(key, candidate)]),
        torch.set_grad_enabled(grad),
    ):
        times = measure(calls, "wall")
    ours, theirs = times[str(candidate)], times[PYTORCH]
    won = candidate != PYTORCH and faster(ours, theirs)
    return _row(key, candidate if won else PYTORCH, ours, ours, theirs, theirs)


def _least(calls: Iterable[Candidate], times: dict[str, list[float]]) -> Candidate:
    return min(calls, key=lambda one: statistics.median(times[str(one)]))


def _unmeasured(key: Key, candidate: Candidate) -> Row:
    return table.row(key, candidate, 1.0, 1.0, 1.0, 1.0)


@contextlib.contextmanager
def _trial(device: torch.device, rows: Iterable[Row]) -> Iterator[None]:
    """Within it `rows` are all that tables say, and backend "auto" goes by them."""
    backend.use_tables({device: tuple(rows)})
    try:
        with backend.use_backend("auto"):
            yield
    finally:
        backend.use_tables()


def _row(
    key: Key,
    candidate: Candidate,
    device: list[float],
    wall: list[float],
    their_device: list[float],
    their_wall: list[float],
) -> Row:
    """`key`'s row with the medians; PyTorch's, where that is the candidate, in both places."""
    if candidate == PYTORCH:
        device, wall = their_device, their_wall
    medians = (statistics.median(one) for one in (device, their_device, wall, their_wall))
    return table.row(key, candidate, *(round(one, 3) for one in medians))
