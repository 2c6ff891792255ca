"""What `python -m fastlinear tune` measures: a layer's products, by PyTorch and by the kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlinear import backend, by_table, lookup
from fastlinear.activations import ACTIVATIONS
from fastlinear.functional import linear
from fastlinear.kernels import tables
from fastlinear.kernels.choose import ranked
from fastlinear.kernels.choose_pair import ranked_pairs
from fastlinear.kernels.tables import Candidate, Key
from fastlinear.stopwatch import Call

CANDIDATES = 10  # kernels a product, by modelled time
PAIRS = 3  # for both gradients in one launch


Operands = tuple[Tensor, Tensor, Tensor | None]  # input, weight, bias
Results = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Layer:
    """What is measured: `m` rows through a layer."""

    dtype: torch.dtype
    tf32: bool
    activation: str | None
    bias: bool
    n: int
    k: int
    m: int

    @property
    def precision(self) -> str:
        return backend.table_precision(self.dtype)

    @property
    def bytes(self) -> int:
        """At most, of all that is held at once: when a result is compared with the truth.

        Of each element that is an operand, PyTorch's result and a kernel's, and in float64 the
        truth, a result and their difference.
        """
        elements = self.m * self.k + self.n * self.k + self.m * self.n
        return elements * (3 * self.dtype.itemsize + 3 * 8)

    def __str__(self) -> str:
        dtype = "tf32" if self.tf32 else lookup.name_of(self.dtype)
        words = [dtype, f"{self.n}x{self.k}", self.activation, None if self.bias else "no bias"]
        return " ".join(filter(None, [*words, f"{self.m} rows"]))

    def key(self, product: str) -> Key:
        """Of a product's row: "grad_input" has neither activation nor bias."""
        name = lookup.name_of(self.dtype)
        activation = self.activation if product in ("output", "training") else None
        bias = self.bias and product != "grad_input"
        return Key(product, name, self.precision, activation, bias, self.n, self.k, self.m)


class Products:
    """A layer's products, by PyTorch and by the kernels, and what they should come to."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.layer, self.device = layer, device
        n, k, m, dtype = layer.n, layer.k, layer.m, layer.dtype
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
        kernels, layer = backend.launchers(), self.layer
        how: dict[str, Any] = {"precision": layer.precision, "config": config}
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
        return lambda: by_table.gradients(*operands, bias)

    @property
    def _operands(self) -> Operands:
        return self.input, self.weight, self.bias

    def configs(self, product: str) -> list[Candidate]:
        """The kernels' best, as modelled."""
        layer = self.layer
        sizes = (layer.m, layer.n, layer.k)
        target = backend.launchers().forward.launch.target_of(self.device)
        traits = tables.traits_of(layer.key(product), target)
        if product == "gradients":
            return [pair for pair, _ in ranked_pairs(1, *sizes, traits)[:PAIRS]]
        if product == "grad_input":
            sizes = (layer.m, layer.k, layer.n)
        choices = ranked(tables.KERNEL_OF[product], 1, *sizes, traits, product == "grad_input")
        return [choice.config for choice in choices[:CANDIDATES]]

    def step(self, by_pytorch: bool) -> Call:
        """Forward and backward by PyTorch or `fastlinear.linear`, however it goes about them."""
        leaves = [one.clone().requires_grad_() for one in self._operands if one is not None]
        bias = None if self.bias is None else leaves[2]
        forward = self._forward((leaves[0], leaves[1], bias), by_pytorch)
        return lambda: torch.autograd.grad(forward(), leaves, self.grad)

    def public(self, by_pytorch: bool) -> Call:
        """The output by PyTorch or `fastlinear.linear`."""
        return self._forward(self._operands, by_pytorch)
