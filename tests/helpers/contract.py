"""What is done to a layer in tests of the contract, with `nn.Linear` or with ours."""

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# forward runs; the other tests are about the module alone, which no backend changes
runs = pytest.mark.usefixtures("backend")

Deed = Callable[[Any], Any]


def reloaded(thing: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def forward_and_backward(layer: nn.Module, input: Tensor) -> Any:
    input = input.to(next(layer.parameters())).detach().requires_grad_()
    output = layer(input)
    output.backward(torch.randn(output.shape).to(output))
    return output, input.grad, list(layer.parameters())


MASKS = list(itertools.product([False, True], repeat=3))

LEADING = {"1-D": (), "2-D": (4,), "3-D": (2, 3), "no rows": (0,), "no rows, 3-D": (2, 0)}


def masked(
    Linear: Any, mask: tuple[bool, bool, bool], leading: tuple[int, ...], device: torch.device
) -> tuple[nn.Linear, Tensor]:
    """A layer and an input, of which those require gradients that (input, weight, bias) says."""
    layer = Linear(5, 3, device=device)
    layer.weight.requires_grad_(mask[1])
    layer.bias.requires_grad_(mask[2])
    return layer, torch.randn(*leading, 5).to(device).requires_grad_(mask[0])


def x(layer: nn.Linear, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape or (4, 5)).to(layer.weight.device, dtype or layer.weight.dtype)


def loaded(layer: nn.Linear, **tensors: Tensor) -> Any:
    return layer.load_state_dict(tensors)


def fresh(layer: nn.Linear) -> nn.Linear:
    return type(layer)(5, 3, device=layer.weight.device)
