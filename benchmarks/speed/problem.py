"""One point of the sweep: its operands, what is right, and what is timed."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.shapes import Layer
from benchmarks.speed.arms import Call
from fastlinear.ops.elementwise import ACTIVATIONS

CHECKED = 64  # rows, or features, that are computed in float64


class Problem:
    """One point's operands, and its exact results where they are checked."""

    def __init__(self, point: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        layer: Layer = point["layer"]
        rows, n, k = point["rows"], layer.out_features, layer.in_features

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype)

        self.activation: str | None = point["activation"]
        self.input = normal(rows, k).requires_grad_()
        self.weight = nn.Parameter(normal(n, k, scale=k**-0.5))  # outputs of about 1, as in models
        self.bias = nn.Parameter(normal(n)) if point["bias"] else None
        self.grad_output = normal(rows, n)
        # Some rows of output and grad_input, some features of the weight's and bias's gradients.
        self.rows = torch.randperm(rows, device=device)[:CHECKED]
        self.features = torch.randperm(n, device=device)[:CHECKED]
        self.exact = self._exact()

    def wanted(self) -> list[Tensor]:
        return [self.input, self.weight] + ([] if self.bias is None else [self.bias])

    def _exact(self) -> dict[str, Tensor]:
        """The checked part of every result, in float64."""
        weight, input = self.weight.detach(), self.input.detach()
        bias = None if self.bias is None else self.bias.detach().double()
        by_rows = input[self.rows].double() @ weight.double().t()
        by_features = input.double() @ weight[self.features].double().t()
        if bias is not None:
            by_rows, by_features = by_rows + bias, by_features + bias[self.features]
        output, grad_rows = self._activate(by_rows, self.grad_output[self.rows])
        _, grad_features = self._activate(by_features, self.grad_output[:, self.features])
        exact = {
            "output": output,
            "grad_input": grad_rows @ weight.double(),
            "grad_weight": grad_features.t() @ input.double(),
        }
        return exact if bias is None else exact | {"grad_bias": grad_features.sum(0)}

    def _activate(self, preactivation: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the gradient of the pre-activation."""
        if self.activation is None:
            return preactivation, grad_output.double()
        preactivation = preactivation.requires_grad_()
        output = ACTIVATIONS[self.activation](preactivation)
        (grad,) = torch.autograd.grad(output, preactivation, grad_output.double())
        return output.detach(), grad

    def results(self, call: Call) -> dict[str, Tensor]:
        """The checked part of what an arm gives."""
        output = call(self.input)
        gradients = torch.autograd.grad(output, self.wanted(), self.grad_output)
        named = dict(zip(("grad_input", "grad_weight", "grad_bias"), gradients, strict=False))
        return {
            "output": output.detach()[self.rows],
            "grad_input": named["grad_input"][self.rows],
            **{
                name: named[name][self.features]
                for name in ("grad_weight", "grad_bias")
                if name in named
            },
        }


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each result; infinite where there is a NaN or another shape."""
    found = {}
    for name, truth in exact.items():
        fits = results[name].shape == truth.shape
        error = (results[name].double() - truth).abs().max().item() if fits else math.inf
        found[name] = math.inf if math.isnan(error) else error
    return found


def why_wrong(problem: Problem, found: dict[str, float], native: dict[str, float]) -> str | None:
    """What an arm of these errors gets wrong, or None.

    Its errors may be twice nn.Linear's and four roundings at the size of the largest result; in
    plain float32 and float64, where additions round as products do, one more a root of their
    number, as they pile up in a running sum.
    """
    dtype = problem.input.dtype
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    rounding = 2.0**-10 if tf32 else torch.finfo(dtype).eps
    additions = max(*problem.weight.shape, len(problem.input))
    roundings = 4 + (additions**0.5 if dtype.itemsize > 2 and not tf32 else 0)
    for name, error in found.items():
        budget = 2 * native[name] + roundings * rounding * problem.exact[name].abs().max().item()
        if error > budget:
            return f"{name} is off by {error:.2g}, nn.Linear by {native[name]:.2g}"
    return None


def step(problem: Problem, call: Call, mode: str) -> Callable[[], object]:
    """What is timed of `call` in `mode`."""

    def forward() -> object:
        with torch.no_grad():
            return call(problem.input)

    wanted, grad_output = problem.wanted(), problem.grad_output
    if mode == "forward":
        return forward
    if mode == "forward+backward":
        return lambda: torch.autograd.grad(call(problem.input), wanted, grad_output)
    output = call(problem.input)
    return lambda: torch.autograd.grad(output, wanted, grad_output, retain_graph=True)
