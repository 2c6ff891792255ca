"""Models to convert, and what is compared before and after."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlinear import convert, revert

runs = pytest.mark.usefixtures("backend")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))


def kinds(model: nn.Module) -> dict[str, str]:
    """Where each layer's class is from."""
    return {
        name: type(layer).__mro__[parametrize.is_parametrized(layer)].__module__.partition(".")[0]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


def result(model: nn.Module, input: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    model.zero_grad()
    input = input.detach().requires_grad_()
    output = model(input)
    output.pow(2).sum().backward()
    return [output, input.grad, *(parameter.grad for parameter in model.parameters())]


def assert_runs_as_before(model: nn.Module, device: torch.device) -> None:
    """Converts `model`, and fails unless it then computes what it did, by the backend at hand."""
    model = model.to(device, torch.float64)
    input = torch.randn(4, 5, dtype=torch.float64).to(device)
    before = result(model, input)
    assert convert(model).converted
    torch.testing.assert_close(result(model, input), before)
    assert revert(model).converted
    torch.testing.assert_close(result(model, input), before)


class Subclass(nn.Linear):
    """Means something else by its forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()
