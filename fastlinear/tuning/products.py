"""What is measured: a layer's products, by PyTorch and by what may be faster."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlinear import backend, implementations
from fastlinear.choice import known, table
from fastlinear.choice.table import LIBRARIES, OPERANDS, Candidate, Key
from fastlinear.elementwise import ACTIVATIONS
from fastlinear.functional import linear
from fastlinear.kernels.choose import ranked
from fastlinear.kernels.choose_pair import ranked_pairs
from fastlinear.tuning.stopwatch import Call

CANDIDATES = 10  # kernels a product, by modelled time
PAIRS = 3  # for both gradients in one launch
ALL = "input weight bias"
# Bytes of operands that calls on a CPU take in turn, so that a weight comes from memory as often as
# in a model of several layers; and how many layers at most.
COLD_BYTES, MOST_COPIES = 2**26, 8


Operands = tuple[Tensor, Tensor, Tensor | None]  # input, weight, bias
Results = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Layer:
    """What is measured: rows through a layer.

    tf32: whether float32 products are to be; None is as it is set.
    m: the power of two that stands for the rows in tables.
    wanted: whose gradients a step is to have, as in "input weight bias"; "" is the output alone.
    rows: how many rows; 0 is m.
    """

    dtype: torch.dtype
    tf32: bool | None
    activation: str | None
    bias: bool
    n: int
    k: int
    m: int
    wanted: str = ALL
    rows: int = 0

    def precision(self, device: torch.device) -> str:
        return backend.table_precision(self.dtype, device)

    def products(self, device: torch.device) -> tuple[str, ...]:
        """Those that there is a choice for, before what they are parts of."""
        if not self.wanted:
            return ("output",)
        if not backend.kernels_run_on(device):
            return "output", "training"  # the gradients' products are PyTorch's
        wanted = {"grad_input": "input", "grad_weight": "weight", "gradients": "input weight"}
        return tuple(
            product
            for product in table.PRODUCTS
            if all(one in self.wanted for one in wanted.get(product, "").split())
        )

    @property
    def bytes(self) -> int:
        """At most, of all that is held at once: when a result is compared with the truth.

        Of each element that is an operand, PyTorch's result and a kernel's, and in float64 the
        truth, a result and their difference.
        """
        m = self.rows or self.m
        elements = m * self.k + self.n * self.k + m * self.n
        return elements * (3 * self.dtype.itemsize + 3 * 8)

    def __str__(self) -> str:
        dtype = "tf32" if self.tf32 else known.name_of(self.dtype)
        words = [dtype, f"{self.n}x{self.k}", self.activation, None if self.bias else "no bias"]
        return " ".join(filter(None, [*words, f"{self.rows or self.m} rows"]))

    def key(self, product: str, device: torch.device) -> Key:
        """Of a product's row: "grad_input" has neither activation nor bias."""
        name, precision = known.name_of(self.dtype), self.precision(device)
        activation = self.activation if product in ("output", "training") else None
        bias = self.bias and product != "grad_input"
        if product in ("grad_weight", "gradients"):
            bias = bias and "bias" in self.wanted
        wanted = " ".join(self.leaves) if product == "training" else ""
        return Key(product, name, precision, activation, bias, wanted, self.n, self.k, self.m)

    @property
    def leaves(self) -> list[str]:
        """Whose gradients a step has, by name."""
        has = {"input": True, "weight": True, "bias": self.bias}
        return [one for one in OPERANDS if one in self.wanted.split() and has[one]]


class Products:
    """A layer's products, by PyTorch and by what may be faster, and what they should come to."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.layer, self.device = layer, device
        n, k, m, dtype = layer.n, layer.k, layer.rows or layer.m, layer.dtype
        self.input, self.weight, bias, self.grad = (
            torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (n, k), (n,), (m, n))
        )
        self.bias = bias if layer.bias else None

    def by_pytorch(self, product: str) -> Results:
        return self._native(product, self.input, self.weight, self.bias, self.grad)

    def exact(self, product: str) -> tuple[Tensor, ...]:
        bias = None if self.bias is None else self.bias.double()
        # An activation can hold as much of its own as the gradient, which the output has no use of.
        grad = self.grad if product == "output" else self.grad.double()
        return self._native(product, self.input.double(), self.weight.double(), bias, grad)()

    def _native(
        self, product: str, input: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor
    ) -> Results:
        # What there is to ask is asked before the call, which is timed.
        if product == "output":
            output = self._forward((input, weight, bias), by_pytorch=True)
            return lambda: (output(),)
        if product == "grad_input":
            return lambda: (grad @ weight,)
        if product == "grad_weight" and bias is None:
            return lambda: (grad.mT @ input,)
        if product == "grad_weight":
            return lambda: (grad.mT @ input, grad.sum(0))
        if bias is None:
            return lambda: (grad @ weight, grad.mT @ input)
        return lambda: (grad @ weight, grad.mT @ input, grad.sum(0))

    def _forward(self, operands: Operands, by_pytorch: bool) -> Callable[[], Tensor]:
        """The output as a user has it computed, with nothing around that."""
        activation = self.layer.activation
        if not by_pytorch:
            return lambda: linear(*operands, activation)
        if activation is None:
            return lambda: F.linear(*operands)
        applied = ACTIVATIONS[activation]
        return lambda: applied(F.linear(*operands))

    def by_kernel(self, product: str, config: Candidate) -> Call:
        layer = self.layer
        if isinstance(config, str) and config in LIBRARIES:
            library = LIBRARIES[config]
            return lambda: (library.output(*self._operands, layer.activation),)
        kernels = backend.launchers()
        how: dict[str, Any] = {"precision": layer.precision(self.device), "config": config}
        if product == "output" and layer.activation is None:
            return lambda: (kernels.forward.linear_forward(*self._operands, **how),)
        if product == "output":
            activated = kernels.forward.linear_activation_forward
            return lambda: activated(*self._operands, layer.activation, False, **how)[:1]
        if product == "grad_input":
            return lambda: (kernels.backward.linear_backward_input(self.grad, self.weight, **how),)
        bias = self.bias is not None
        last = None if bias else -1  # no grad_bias
        if product == "gradients":
            together = kernels.backward.linear_backward
            return lambda: together(self.grad, self.input, self.weight, bias, **how)[:last]
        weight_gradient = kernels.backward_weight.linear_backward_weight
        return lambda: weight_gradient(self.grad, self.input, bias, **how)[:last]

    def apart(self) -> Call:
        """Both gradients, each as the row in use says."""
        operands, bias = (self.grad, self.input, self.weight), self.bias is not None
        last = None if bias else -1  # no grad_bias
        return lambda: implementations.backward(*operands, bias, False)[:last]

    @property
    def _operands(self) -> Operands:
        return self.input, self.weight, self.bias

    def candidates(self, product: str) -> list[Candidate]:
        """What else may compute a product: libraries, and the kernels' best, as modelled."""
        layer = self.layer
        found: list[Candidate] = []
        if product == "output":
            what = self.device, layer.dtype, layer.activation, layer.bias
            found += [name for name, one in LIBRARIES.items() if one.why_not(*what) is None]
        return found + (self.configs(product) if backend.kernels_run_on(self.device) else [])

    def configs(self, product: str) -> list[Candidate]:
        """The kernels' best, as modelled."""
        layer = self.layer
        sizes = (layer.rows or layer.m, layer.n, layer.k)
        target = backend.launchers().forward.launch.target_of(self.device)
        traits = table.traits_of(layer.key(product, self.device), target)
        if product == "gradients":
            return [pair for pair, _ in ranked_pairs(1, *sizes, traits)[:PAIRS]]
        if product == "grad_input":
            sizes = (sizes[0], layer.k, layer.n)
        choices = ranked(table.KERNEL_OF[product], 1, *sizes, traits, product == "grad_input")
        return [choice.config for choice in choices[:CANDIDATES]]

    def step(self, by_pytorch: bool) -> Call:
        """Forward and backward by PyTorch or `fastlinear.linear`, however it goes about them."""
        operands = {
            name: one.detach().requires_grad_(name in self.layer.leaves)
            for name, one in zip(OPERANDS, self._operands, strict=True)
            if one is not None
        }
        leaves = [one for one in operands.values() if one.requires_grad]
        given = operands["input"], operands["weight"], operands.get("bias")
        forward = self._forward(given, by_pytorch)
        return lambda: torch.autograd.grad(forward(), leaves, self.grad)

    def public(self, by_pytorch: bool) -> Call:
        """The output by PyTorch or `fastlinear.linear`."""
        return self._forward(self._operands, by_pytorch)


def in_turn(first: Products, call: Callable[[Products], Call]) -> Call:
    """On a CPU, a call that takes the operands of several such layers in turn; else of `first`."""
    layer, device = first.layer, first.device
    if device.type != "cpu":
        return call(first)
    n, k, m = layer.n, layer.k, layer.rows or layer.m
    size = (n * k + m * (n + k)) * layer.dtype.itemsize
    copies = min(MOST_COPIES, max(1, COLD_BYTES // size))
    layers = [first, *(Products(layer, device) for _ in range(copies - 1))]
    calls = itertools.cycle([call(one) for one in layers])
    return lambda: next(calls)()
