"""oneDNN's linear with the activation fused, and the gradients of a linear, for CPUs.

The linear is the op that Inductor takes; the gradient of the input is that of oneDNN's own tensors.
For 16 to 1024 rows each takes down to a third of the time of PyTorch's; for small layers up to
eight times as long. So it is taken where it was measured to be faster, and only there.
"""

import torch
from torch import Tensor

NAME = "onednn"
PRODUCTS = ("output", "grad_input", "grad_weight")
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


def takes(
    product: str, device: torch.device, dtype: torch.dtype, activation: str | None, bias: bool
) -> bool:
    """Whether it computes such a layer's product, by itself, here and now."""
    mkldnn = torch.ops.mkldnn
    if product not in PRODUCTS or device.type != "cpu":
        return False
    if not torch._C._get_mkldnn_enabled() or not hasattr(mkldnn, "_linear_pointwise"):
        return False  # this PyTorch has no oneDNN, or does without
    if product != "output":
        return dtype == torch.float32
    if activation not in _FUSED and activation != "relu":
        return False
    return (
        dtype == torch.float32
        or (dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported())
    )


def output(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """`activation(input @ weight.T + bias)`, summed in float32; called below autograd.

    Args:
        input, weight, bias: strided CPU tensors of one dtype, (*, K), (N, K) and (N,), with K and N
            above 0. Any strides are right; it takes its time where they are not contiguous.
        activation: None, or one that it `takes`.
    """
    if bias is not None:
        bias = bias.contiguous()  # it is read as if it were
    name, numbers, algorithm = _FUSED[None if activation == "relu" else activation]
    computed = torch.ops.mkldnn._linear_pointwise(input, weight, bias, name, numbers, algorithm)
    return computed.relu_() if activation == "relu" else computed


def grad_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """`grad_output @ weight`, summed in float32; called below autograd.

    Args:
        grad_output, weight: strided CPU tensors of float32, (*, N) and (N, K), with N and K above
            0.
    """
    sizes = (*grad_output.shape[:-1], weight.shape[1])
    rows = grad_output.reshape(-1, weight.shape[0])
    compute = torch.ops.aten.mkldnn_linear_backward_input
    computed = compute((rows.shape[0], sizes[-1]), rows.to_mkldnn(), weight).to_dense()
    return torch.ops.aten._unsafe_view(computed, sizes)


def grad_weight(grad_output: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """`grad_output.mT @ input`, and the sum of grad_output over its rows, if bias; as `grad_input`.

    It is the linear of both, transposed: oneDNN's own gradient of a weight is copied into the
    result, and glibc may give memory for two weights at once back to the system, to be cleared anew
    at each call: 5.6 ms where this takes 0.8, 3072 x 768 of 64 rows on two threads of an EPYC.

    Args:
        grad_output, input: strided CPU tensors of float32, (*, N) and (*, K), with N and K above 0.
    """
    outputs, inputs = (one.reshape(-1, one.shape[-1]) for one in (grad_output, input))
    of_bias = outputs.sum(0) if bias else None
    if not len(outputs):  # which oneDNN has no sum of
        return outputs.mT @ inputs, of_bias
    columns = outputs.mT.contiguous(), inputs.mT.contiguous()
    return torch.ops.mkldnn._linear_pointwise(*columns, None, *_FUSED[None]), of_bias
