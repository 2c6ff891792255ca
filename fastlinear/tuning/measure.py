"""The rows of a call: each of its products by PyTorch and by what may be faster, timed in turn.

A call is told by the key of its row: of "training" or, where no gradient is wanted, of "output".
Something else than PyTorch's way is entered where it is as exact, faster on the device or for the
caller, by more than the measurements scatter, and slower at neither.
"""

import contextlib
import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear.choice import backend, table
from fastlinear.choice.launchers import kernels_run_on, launchers
from fastlinear.choice.table import BY_ROWS, LIBRARIES, OPERANDS, PYTORCH, Candidate, Key, Row
from fastlinear.functional import linear
from fastlinear.kernels.configs.choose import ranked
from fastlinear.kernels.configs.choose_pair import ranked_pairs
from fastlinear.kernels.configs.products import KERNEL_OF, traits_of
from fastlinear.ops import implementations
from fastlinear.ops.elementwise import ACTIVATIONS
from fastlinear.tuning.stopwatch import Call, Measure, Times

CANDIDATES = 10  # kernels a product, by modelled time
PAIRS = 3  # for both gradients in one launch
# How many times PyTorch's error may be, as a root mean square. On CPUs F.linear adds in blocks, and
# oneDNN in one run, as most do: that errs by some twice as much in sums of some thousand terms.
TIMES_THE_ERROR = 2.5
# Bytes of operands that calls on a CPU take in turn, so that a weight comes from memory as often as
# in a model of several layers; and how many layers at most.
COLD_BYTES, MOST_COPIES = 2**26, 8

Results = Callable[[], tuple[Tensor, ...]]


def on_cpu(device: torch.device) -> bool:
    """Whether there is one clock, the caller's, and no kernel."""
    return device.type == "cpu" and not kernels_run_on(device)


def keys_of(call: Key, device: torch.device) -> list[Key]:
    """Those of a call's products that there is a choice for, and at last its own."""
    if call.product == "output":
        return [call]
    wanted, output = call.wanted.split(), call._replace(product="output", wanted="")
    of_input = output._replace(product="grad_input", activation=None, bias=False)
    of_weight = of_input._replace(product="grad_weight", bias="bias" in wanted)
    gradients = [of_input] * ("input" in wanted) + [of_weight] * ("weight" in wanted)
    if not kernels_run_on(device):
        gradients = [key for key in gradients if libraries_for(key, device)]
    elif len(gradients) == 2:
        gradients.append(of_weight._replace(product="gradients"))
    return [output, *gradients, call]


def libraries_for(key: Key, device: torch.device) -> list[Candidate]:
    """The libraries that take such a product."""
    return [name for name in LIBRARIES if table.is_there(name, key, device)]


class Products:
    """A call's products, by PyTorch and by what may be faster, and what they should come to."""

    def __init__(self, call: Key, device: torch.device, rows: int | None = None) -> None:
        """rows: how many, of those that `call.m` stands for; None is that."""
        self.call, self.device, self.rows = call, device, rows or call.m
        n, k, m, dtype = call.n, call.k, self.rows, getattr(torch, call.dtype)
        self.input, self.weight, bias, self.grad = (
            torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (n, k), (n,), (m, n))
        )
        self.bias = bias if call.bias else None
        self.grad_bias = "bias" in call.wanted.split()

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.input, self.weight, self.bias

    def called(self, product: str, by_pytorch: bool) -> Call:
        """The output or, of "training", a step, as a user has it by PyTorch or by `linear`."""
        if product != "training":
            return self._forward(*self.operands, by_pytorch)
        wanted = self.call.wanted.split()
        given = [
            None if one is None else one.detach().requires_grad_(name in wanted)
            for name, one in zip(OPERANDS, self.operands, strict=True)
        ]
        leaves = [one for one in given if one is not None and one.requires_grad]
        forward = self._forward(given[0], given[1], given[2], by_pytorch)
        return lambda: torch.autograd.grad(forward(), leaves, self.grad)

    def _forward(self, input: Any, weight: Any, bias: Any, by_pytorch: bool) -> Callable[[], Any]:
        # What there is to ask is asked before the call, which is timed.
        activation = self.call.activation
        if not by_pytorch:
            return lambda: linear(input, weight, bias, activation)
        if activation is None:
            return lambda: F.linear(input, weight, bias)
        applied = ACTIVATIONS[activation]
        return lambda: applied(F.linear(input, weight, bias))

    def exact(self, product: str) -> tuple[Tensor, ...]:
        """What it should come to: PyTorch's in float64."""
        exact = copy.copy(self)
        exact.input, exact.weight = self.input.double(), self.weight.double()
        exact.bias = None if self.bias is None else self.bias.double()
        # An activation can hold as much of its own as the gradient, which the output has no use of.
        exact.grad = self.grad if product == "output" else self.grad.double()
        return exact.by_pytorch(product)()

    def by_pytorch(self, product: str) -> Results:
        input, weight, grad = self.input, self.weight, self.grad
        output = self._forward(*self.operands, by_pytorch=True)
        calls: dict[str, Results] = {
            "output": lambda: (output(),),
            "grad_input": lambda: (grad @ weight,),
            "grad_weight": lambda: (grad.mT @ input,),
            "gradients": lambda: (grad @ weight, grad.mT @ input),
        }
        if self.grad_bias:
            calls["grad_weight"] = lambda: (grad.mT @ input, grad.sum(0))
            calls["gradients"] = lambda: (grad @ weight, grad.mT @ input, grad.sum(0))
        return calls[product]

    def by_kernel(self, product: str, config: Candidate | None) -> Results:
        """By a kernel in a configuration, None being the launcher's choice, or by a library.

        With BY_ROWS it is both gradients, each as its row in use says.
        """
        operands, grad, activation = self.operands, self.grad, self.call.activation
        of_weight, with_bias = (grad, self.input), self.grad_bias
        last = None if with_bias else -1  # no grad_bias
        if config == BY_ROWS:
            return lambda: implementations.backward(*of_weight, self.weight, with_bias, False)[
                :last
            ]
        calls: dict[str, Results]
        if isinstance(config, str):
            library = LIBRARIES[config]
            calls = {
                "output": lambda: (library.output(*operands, activation),),
                "grad_input": lambda: (library.grad_input(grad, self.weight),),
                "grad_weight": lambda: library.grad_weight(*of_weight, with_bias)[:last],
            }
            return calls[product]
        forward, backward, backward_weight = launchers()[:3]
        how: dict[str, Any] = {"precision": self.call.precision, "config": config}
        calls = {
            "output": lambda: (forward.linear_forward(*operands, **how),),
            "grad_input": lambda: (backward.linear_backward_input(grad, self.weight, **how),),
            "grad_weight": lambda: backward_weight.linear_backward_weight(
                *of_weight, with_bias, **how
            )[:last],
            "gradients": lambda: backward.linear_backward(
                *of_weight, self.weight, with_bias, **how
            )[:last],
        }
        if activation is not None:
            calls["output"] = lambda: forward.linear_activation_forward(
                *operands, activation, False, **how
            )[:1]
        return calls[product]

    def key(self, product: str) -> Key:
        return next(key for key in keys_of(self.call, self.device) if key.product == product)

    def configs(self, product: str) -> list[Candidate]:
        """The kernels' best, as modelled."""
        key = self.key(product)
        target = launchers().forward.launch.target_of(self.device)
        n, k, dtype = key.n, key.k, getattr(torch, key.dtype)
        traits = traits_of(product, n, k, key.m, dtype, key.precision, target, key.activation)
        if product == "gradients":
            return [pair for pair, _ in ranked_pairs(1, self.rows, n, k, traits)[:PAIRS]]
        if transposed := product == "grad_input":
            n, k = k, n
        choices = ranked(KERNEL_OF[product], 1, self.rows, n, k, traits, transposed)
        return [choice.config for choice in choices[:CANDIDATES]]


def bytes_of(call: Key, rows: int) -> int:
    """At most, of all that is held at once: when a result is compared with the truth.

    Of each element that is an operand, PyTorch's result and a kernel's, and in float64 the truth, a
    result and their difference.
    """
    elements = rows * call.k + call.n * call.k + rows * call.n
    return elements * (3 * getattr(torch, call.dtype).itemsize + 3 * 8)


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


def exact_calls(products: Products, product: str) -> dict[Candidate, Call]:
    """The calls for a product, by candidate, that give what they should."""
    exact, theirs = products.exact(product), products.by_pytorch(product)()
    call = products.call
    terms = {"output": call.k, "grad_input": call.n, "grad_weight": call.m}
    most = terms.get(product, max(call.m, call.n))
    candidates = libraries_for(products.key(product), products.device)
    if kernels_run_on(products.device):
        candidates += products.configs(product)
    calls: dict[Candidate, Call] = {}
    for config in candidates:
        computed = products.by_kernel(product, config)
        try:
            if as_exact(computed(), theirs, exact, most):
                calls[config] = computed
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton has many of its own
            print(
                f"left out, as it fails: {product} of {table.in_words(call)} by {config}: {error}"
            )
    return calls


def measure_call(
    call: Key, rows: int, device: torch.device, measure: Measure, known: dict[Key, Row]
) -> Iterator[Row]:
    """The rows that are not known yet: those of a call's products, and then its own.

    Each is known from then on.
    """
    keys = keys_of(call, device)
    if all(key in known for key in keys):
        return
    # Neither autocast nor the caller's random numbers have a say in what is measured.
    with torch.autocast(device.type, enabled=False), internals.own_random_state(device):
        products = Products(call, device, rows)
        for number, key in enumerate(keys):
            if key not in known:
                parts = [known[one] for one in keys[:number]]
                known[key] = _measured(products, key, measure, parts)
                yield known[key]


def _measured(products: Products, key: Key, measure: Measure, parts: list[Row]) -> Row:
    """The row of `key`; `parts` are those of the products before."""
    product, device = key.product, products.device

    def call_of(candidate: Candidate) -> Callable[[Products], Call]:
        """What makes its call: of an output and a step a user's, who waits for the way there."""
        if product in ("output", "training"):
            return lambda one: one.called(product, by_pytorch=candidate == PYTORCH)
        if candidate == PYTORCH:
            return lambda one: one.by_pytorch(product)
        return lambda one: one.by_kernel(product, candidate)

    calls = {} if product == "training" else exact_calls(products, product)
    others = {"training": parts, "gradients": parts[1:]}.get(product, [])
    if any(row.candidate != PYTORCH for row in others):
        calls[BY_ROWS] = call_of(BY_ROWS)(products)
    times: Times = {}
    best = next(iter(calls), PYTORCH)
    if not on_cpu(device):
        native = call_of(PYTORCH) if product == "training" else lambda one: one.by_pytorch(product)
        timed = {PYTORCH: native(products)} | {str(one): call for one, call in calls.items()}
        with _trial(device, parts, key, BY_ROWS):
            times = measure(timed, "device")
        best = min(calls, key=lambda one: statistics.median(times[str(one)]), default=PYTORCH)
    chosen = [one for one in dict.fromkeys((best, BY_ROWS)) if one in calls]
    with _trial(device, parts, key, best), torch.set_grad_enabled(product == "training"):
        waited = {str(one): _in_turn(products, call_of(one)) for one in (PYTORCH, *chosen)}
        walls = measure(waited, "wall")
    times = times or walls
    for one in chosen:
        than = [PYTORCH] if one == BY_ROWS else [other for other in walls if other != str(one)]
        if all(wins(str(one), other, times, walls) for other in than):
            return _row(key, one, times, walls)
    return _row(key, PYTORCH, times, walls)


def _in_turn(first: Products, call_of: Callable[[Products], Call]) -> Call:
    """The call of `first`, on a CPU with the operands of several such layers in turn."""
    if first.device.type != "cpu":
        return call_of(first)
    size = first.input.nbytes + first.weight.nbytes + first.grad.nbytes
    copies = min(MOST_COPIES, max(1, COLD_BYTES // size))
    again = (Products(first.call, first.device, first.rows) for _ in range(copies - 1))
    calls = itertools.cycle([call_of(one) for one in (first, *again)])
    return lambda: next(calls)()


@contextlib.contextmanager
def _trial(
    device: torch.device, parts: Iterable[Row], key: Key, candidate: Candidate
) -> Iterator[None]:
    """Within it tables say `parts` and `candidate` alone, and backend "auto" goes by them."""
    backend.use_tables({device: (*parts, Row(*key, candidate, 1.0, 1.0, 1.0, 1.0))})
    try:
        with backend.use_backend("auto"):
            yield
    finally:
        backend.use_tables()


def faster(times: list[float], than: list[float]) -> bool:
    """Whether the times are less in three of four rounds, in which all calls took turns."""
    gained = sorted(theirs - ours for ours, theirs in zip(times, than, strict=True))
    return gained[len(gained) // 4] > 0


def wins(one: str, other: str, times: Times, walls: Times) -> bool:
    """Whether one is faster than the other on a clock, and slower on none."""
    clocks = times, walls
    slower = any(faster(clock[other], clock[one]) for clock in clocks)
    return not slower and any(faster(clock[one], clock[other]) for clock in clocks)


def _row(key: Key, candidate: Candidate, times: Times, walls: Times) -> Row:
    found = (clock[str(one)] for clock in (times, walls) for one in (candidate, PYTORCH))
    return Row(*key, candidate, *(round(statistics.median(one), 3) for one in found))
