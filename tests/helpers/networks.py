"""Networks of ours and of `nn.Linear`, operands of a call, and the ops that one makes."""

from collections.abc import Callable
from typing import Any

import torch
from oracle import normal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlinear

Function = Callable[..., Any]


class Ops(TorchDispatchMode):
    """Records the names of the ops that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        self.called.append(str(op))
        return op(*arguments, **(keywords or {}))


def operands(device: torch.device, *, requires_grad: bool = True) -> list[Tensor]:
    """input (4, 3), weight (2, 3), bias (2,), in float64."""
    shapes = ((4, 3), (2, 3), (2,))
    return [normal(shape, torch.float64, device).requires_grad_(requires_grad) for shape in shapes]


def network(linear: type[nn.Linear], device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(linear(3, 5), nn.GELU(), linear(5, 2)).to(device, dtype)


def twins(
    device: torch.device, dtype: torch.dtype = torch.float64
) -> tuple[nn.Sequential, nn.Sequential]:
    """One network of `fastlinear.Linear`, and the same of `nn.Linear`."""
    ours, theirs = network(fastlinear.Linear, device, dtype), network(nn.Linear, device, dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def loss_and_gradients(model: nn.Module, input: Tensor) -> tuple[Tensor, ...]:
    loss = model(input).square().sum()
    return loss, *torch.autograd.grad(loss, tuple(model.parameters()))


def targets(graph: torch.fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes]
