"""Each layer of ours, and the same by PyTorch's functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear
from fastlinear.ops.elementwise import ACTIVATIONS

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: fastlinear.Linear(4, 3),
    "no bias": lambda: fastlinear.Linear(4, 3, bias=False),
    "relu": lambda: fastlinear.Linear(4, 3, activation="relu"),
    "gelu": lambda: fastlinear.Linear(4, 3, activation="gelu"),
    "batched": lambda: fastlinear.BatchedLinear(2, 4, 3),
    "batched, silu": lambda: fastlinear.BatchedLinear(2, 4, 3, activation="silu"),
    "gated": lambda: fastlinear.GatedLinear(4, 3),
    "gated, no bias": lambda: fastlinear.GatedLinear(4, 3, bias=False),
}

every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def by_pytorch(layer: Any) -> Callable[[Tensor], Tensor]:
    """`layer` by PyTorch's functions, with the same parameters."""
    if isinstance(layer, fastlinear.GatedLinear):
        gate, up = layer.gate_proj, layer.up_proj
        return lambda input: (
            ACTIVATIONS[layer.activation](F.linear(input, gate.weight, gate.bias))
            * F.linear(input, up.weight, up.bias)
        )
    act = (lambda output: output) if layer.activation is None else ACTIVATIONS[layer.activation]
    if isinstance(layer, fastlinear.BatchedLinear):
        return lambda input: act(
            torch.baddbmm(layer.bias.unsqueeze(1), input, layer.weight.transpose(1, 2))
        )
    return lambda input: act(F.linear(input, layer.weight, layer.bias))


def called(layer: Any, device: torch.device) -> Any:
    """The layer's output, and the gradients of whatever it was computed from."""
    input = torch.randn(5, 4, device=device, requires_grad=True)
    output = layer(input)
    output.square().sum().backward()
    return output, input.grad, [parameter.grad for parameter in layer.parameters()]
