"""Arithmetic with bounds: numbers in float64, and how far from each a right result may be.

PyTorch's own error, the budget of the other tests, may be 0 by luck where results are few. Here the
budget is what the roundings on the way can come to, whatever order a sum is taken in.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlinear.ops.elementwise import ACTIVATIONS

# The largest slope of the activations but for "relu_squared", and twice what their slopes change by
# where they do not jump.
_SLOPE, _CURVATURE = 1.2, 2.0
# Roundings of an activation, or of its derivative, computed from exponentials.
_ROUNDINGS = 8.0
# What products of pieces leave out, in roundings of float32 (`test_float32.BUDGET`), and what
# rounding both factors to TF32 takes.
_OF_A_PRODUCT = {"ieee": 0.0, "tf32": 2.0**-10, "bf16x6": 4 * 2.0**-24}


class Bounded(NamedTuple):
    """Each element is within `error` of `value`; where that is no number nothing is known of it."""

    value: Tensor
    error: Tensor

    @property
    def size(self) -> Tensor:
        """The most that each element may be from 0."""
        return self.value.abs() + self.error

    @property
    def mT(self) -> "Bounded":
        return Bounded(self.value.mT, self.error.mT)

    def rows(self) -> "Bounded":
        """(*, F) as (M, F)."""
        shape = (self.value.shape[:-1].numel(), self.value.shape[-1])
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))

    def shaped(self, shape: tuple[int, ...]) -> "Bounded":
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))


class Arithmetic(NamedTuple):
    """How the kernels compute in a dtype.

    They accumulate in float32, or in float64, where a rounding is up to `unit` of its result: twice
    that to nearest, since tensor cores cut off, and since float64 is the truth's own.
    """

    dtype: torch.dtype
    precision: str = "ieee"

    @property
    def unit(self) -> float:
        return 2.0**-52 if self.dtype == torch.float64 else 2.0**-23

    def exactly(self, tensor: Tensor) -> Bounded:
        """An operand as it is, in this dtype."""
        wide = tensor.detach().to(self.dtype).double()
        return Bounded(wide, torch.zeros_like(wide))

    def product(self, a: Bounded, b: Bounded) -> Bounded:
        """`a @ b`, in any order of additions."""
        terms = a.value.shape[-1]
        of_a_product = _OF_A_PRODUCT[self.precision] if self.dtype == torch.float32 else 0.0
        roundings = (terms + 4) * self.unit + of_a_product
        size = a.size @ b.size
        passed_on = a.error @ b.size + a.value.abs() @ b.error
        return Bounded(a.value @ b.value, passed_on + roundings * size)

    def total(self, a: Bounded) -> Bounded:
        """The sum over rows."""
        roundings = (a.value.shape[-2] + 4) * self.unit
        return Bounded(a.value.sum(-2), a.error.sum(-2) + roundings * a.size.sum(-2))

    def plus(self, a: Bounded, b: Bounded) -> Bounded:
        error = a.error + b.error
        return Bounded(a.value + b.value, error + self.unit * (a.size + b.size))

    def times(self, a: Bounded, b: Bounded) -> Bounded:
        error = a.error * b.size + a.value.abs() * b.error
        return Bounded(a.value * b.value, error + self.unit * a.size * b.size)

    def rounded(self, a: Bounded) -> Bounded:
        """`a` as a result of the dtype, which may have too few bits, or be infinite."""
        limits = torch.finfo(self.dtype)
        error = a.error + limits.eps * a.size + limits.smallest_normal * limits.eps
        return Bounded(
            a.value, error.masked_fill(a.size * (1 + limits.eps) > limits.max, torch.inf)
        )

    def activated(self, z: Bounded, activation: str) -> Bounded:
        value = ACTIVATIONS[activation](z.value)
        slope = 2 * z.size if activation == "relu_squared" else _SLOPE
        roundings = _ROUNDINGS * self.unit * (value.abs() + z.size)
        return Bounded(value, slope * z.error + roundings)

    def through(self, grad: Bounded, z: Bounded, activation: str, saved: Bounded) -> Bounded:
        """`grad * activation'(z)`, computed from `saved`, which is the output or z, as kept."""
        with torch.enable_grad():
            point = z.value.clone().requires_grad_()
            (slope,) = torch.autograd.grad(ACTIVATIONS[activation](point).sum(), point)
        uncertain = saved.error + z.error
        error = _CURVATURE * uncertain + _ROUNDINGS * self.unit * (1 + slope.abs())
        if activation in ("relu", "leaky_relu"):
            error = error + (z.value.abs() <= uncertain)
        return self.times(grad, Bounded(slope, error))
