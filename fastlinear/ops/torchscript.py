"""The functions as TorchScript compiles them: by PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _scripted(output: Tensor, activation: str | None) -> Tensor:
    """`elementwise.ACTIVATIONS` for TorchScript, which has no dictionary of functions."""
    if activation is None:
        return output
    if activation == "relu":
        output = F.relu(output)
    elif activation == "gelu":
        output = F.gelu(output)
    elif activation == "gelu_tanh":
        output = F.gelu(output, approximate="tanh")
    elif activation == "silu":
        output = F.silu(output)
    elif activation == "sigmoid":
        output = torch.sigmoid(output)
    elif activation == "tanh":
        output = torch.tanh(output)
    elif activation == "leaky_relu":
        output = F.leaky_relu(output)
    else:
        assert activation == "relu_squared", "unknown activation"
        output = F.relu(output).square()
    return output


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    return _scripted(F.linear(input, weight, bias), activation)


def batched_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    if bias is None:
        return _scripted(torch.bmm(input, weight.mT), activation)
    return _scripted(torch.baddbmm(bias.unsqueeze(1), input, weight.mT), activation)


def gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    gate = _scripted(F.linear(input, gate_weight, gate_bias), activation)
    return gate * F.linear(input, up_weight, up_bias)
