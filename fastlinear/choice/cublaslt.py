"""cuBLASLt's product with the activation in its epilogue, as PyTorch has it: relu and gelu_tanh.

It gives the output alone: with a gradient that is enough for relu.
"""

import torch
from torch import Tensor

NAME = "epilogue"
PRODUCTS = ("output",)


def why_not(
    product: str, device: torch.device, dtype: torch.dtype, activation: str | None, bias: bool
) -> str | None:
    """What it cannot take of such a layer's product, in words; None where it takes all."""
    if product not in PRODUCTS:
        return "the fused epilogue computes outputs alone"
    if device.type != "cuda":
        return "the fused epilogue is cuBLASLt's, for GPUs"
    if activation not in ("relu", "gelu_tanh"):
        return "the fused epilogue has relu and gelu_tanh alone"
    if not bias:
        return "the fused epilogue adds a bias"
    return None if dtype != torch.float64 else "the fused epilogue has no float64"


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
