"""oneDNN's linear with the activation fused, for CPUs: the op that Inductor takes.

For 16 to 1024 rows it takes up to a third of the time of F.linear and the activation; for small
layers up to eight times as long. So it is taken where it was measured to be faster, and only there.
"""

import torch
from torch import Tensor

NAME = "onednn"
# (its name, its numbers, its algorithm) by the activation.
_FUSED: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
    "sigmoid": ("sigmoid", [], ""),
    "tanh": ("tanh", [], ""),
    "leaky_relu": ("leaky_relu", [0.01], ""),
}


def why_not(
    device: torch.device, dtype: torch.dtype, activation: str | None, bias: bool
) -> str | None:
    """What it cannot take of such a layer, in words; None where it takes all."""
    mkldnn = torch.ops.mkldnn
    if device.type != "cpu":
        return "oneDNN's linear is for CPUs"
    if not torch._C._get_mkldnn_enabled() or not hasattr(mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN, or does without"
    if activation not in _FUSED:
        return f"oneDNN has no {activation}"
    if (
        dtype == torch.float32
        or (dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported())
    ):
        return None
    return f"oneDNN has no linear in {dtype} on this CPU"


def output(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """`activation(input @ weight.T + bias)`, summed in float32; called below autograd.

    Args:
        input, weight, bias: strided CPU tensors of one dtype, (*, K), (N, K) and (N,), with K and N
            above 0 and any strides.
        activation: None, or one that `why_not` has nothing against.
    """
    name, numbers, algorithm = _FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, name, numbers, algorithm)
