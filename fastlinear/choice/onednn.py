"""oneDNN's linear with the activation fused, for CPUs: the op that Inductor takes.

For 16 to 1024 rows it takes up to a third of the time of F.linear and the activation; for small
layers up to eight times as long. So it is taken where it was measured to be faster, and only there.
"""

import torch
from torch import Tensor

NAME = "onednn"
# (its name, its numbers, its algorithm) by the activation; not its relu, which makes 0 of NaN.
_FUSED: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
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
    if activation not in _FUSED and activation != "relu":
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
            above 0. Any strides are right; it takes its time where they are not contiguous.
        activation: None, or one that `why_not` has nothing against.
    """
    if bias is not None:
        bias = bias.contiguous()  # it is read as if it were
    name, numbers, algorithm = _FUSED[None if activation == "relu" else activation]
    computed = torch.ops.mkldnn._linear_pointwise(input, weight, bias, name, numbers, algorithm)
    return computed.relu_() if activation == "relu" else computed
