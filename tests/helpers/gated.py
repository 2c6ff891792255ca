"""What tests of gated pairs share: operands, and PyTorch's way."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import normal
from torch import Tensor

from fastlinear.ops.elementwise import ACTIVATIONS

Function = Callable[..., Any]


def reference(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    gate = F.linear(input, gate_weight, gate_bias)
    return ACTIVATIONS[activation](gate) * F.linear(input, up_weight, up_bias)


def operands(
    device: torch.device,
    shape: tuple[int, int, int] = (4, 3, 5),
    dtype: torch.dtype = torch.float64,
    mask: str = "11111",
) -> list[Tensor]:
    """input (M, K), two weights (N, K) and two biases (N,)."""
    m, n, k = shape
    sizes = ((m, k), (n, k), (n, k), (n,), (n,))
    return [
        normal(size, dtype, device).requires_grad_(needed == "1")
        for size, needed in zip(sizes, mask, strict=True)
    ]


def many(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
