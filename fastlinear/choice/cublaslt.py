"""cuBLASLt's product with the activation in its epilogue, as PyTorch has it: relu and gelu_tanh.

It gives the output alone: with a gradient that is enough for relu.
"""

import torch
from torch import Tensor

NAME = "epilogue"
PRODUCTS = ("output",)


def takes(
    product: str, device: torch.device, dtype: torch.dtype, activation: str | None, bias: bool
) -> bool:
    """Whether it computes such a layer's product: on GPUs, with a bias, and not in float64."""
    fused = activation in ("relu", "gelu_tanh") and bias and dtype != torch.float64
    return product in PRODUCTS and device.type == "cuda" and fused


def output(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """`activation(input @ weight.T + bias)`, summed in float32.

    Args:
        input, weight, bias: CUDA tensors of one dtype, (*, K), (N, K) and (N,).
        activation: "relu" or "gelu_tanh"; without one it is PyTorch's plain product.
    """
    if activation is None or bias is None:
        return torch.nn.functional.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    use_gelu = activation == "gelu_tanh"
    activated = torch._addmm_activation(bias, rows, weight.t(), use_gelu=use_gelu)
    return torch.ops.aten._unsafe_view(activated, (*input.shape[:-1], weight.shape[0]))
