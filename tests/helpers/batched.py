"""What tests of batched layers share: shapes, operands, and PyTorch's way."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import (
    normal,
)
from torch import Tensor, nn

import fastlinear

through_the_kernels = pytest.mark.parametrize("backend", ["triton"], indirect=True)

Function = Callable[..., Any]


def reference(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is None:
        return torch.bmm(input, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), input, weight.mT)


def operands(
    device: torch.device,
    shape: tuple[int, int, int, int] = (2, 4, 3, 5),
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
) -> list[Tensor]:
    """input (B, M, K), weight (B, N, K), bias (B, N), for (B, M, N, K)."""
    layers, rows, outputs, inputs = shape
    shapes = ((layers, rows, inputs), (layers, outputs, inputs), (layers, outputs))
    return [normal(one, dtype, device).requires_grad_(requires_grad) for one in shapes]


def with_gradients(function: Function, inputs: list[Tensor], grad_output: Tensor) -> Any:
    output = function(*inputs)
    wanted = [one for one in inputs if one.requires_grad]
    return output, torch.autograd.grad(output, wanted, grad_output.to(output.dtype))


def assert_alike(inputs: list[Tensor], function: Function = fastlinear.batched_linear) -> None:
    """Output and gradients are the reference's."""
    grad_output = torch.randn_like(reference(*inputs))
    ours = with_gradients(function, inputs, grad_output)
    torch.testing.assert_close(ours, with_gradients(reference, inputs, grad_output))
    assert ours[0].is_contiguous()


def members(device: torch.device) -> tuple[fastlinear.BatchedLinear, list[nn.Linear]]:
    """A module of three layers, 5 to 2 features, in float64, and the same of nn.Linear."""
    linears = [nn.Linear(5, 2, device=device, dtype=torch.float64) for _ in range(3)]
    return fastlinear.BatchedLinear.from_linears(linears), linears


def one_by_one(linears: list[nn.Linear]) -> Callable[[Tensor], Tensor]:
    return lambda input: torch.stack(
        [layer(one) for layer, one in zip(linears, input, strict=True)]
    )


def made(make: Callable[[], Any]) -> tuple[Any, list[str], Tensor]:
    """What was made, the warnings it gave, and the random numbers it left."""
    torch.manual_seed(torch.initial_seed())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = make()
    return result, [str(warning.message) for warning in caught], torch.get_rng_state()
