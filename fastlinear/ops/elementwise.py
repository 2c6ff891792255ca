"""Activations and their gradients by PyTorch's own functions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda output: F.gelu(output, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "relu_squared": lambda output: F.relu(output).square(),
}


def activated(output: Tensor, activation: str | None) -> Tensor:
    """`activation(output)`; output itself where there is no activation."""
    return output if activation is None else ACTIVATIONS[activation](output)


def _silu_gradient(grad: Tensor, input: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(input)
    return grad * sigmoid * (1 + input * (1 - sigmoid))


# By activation, the gradient of the pre-activation from the output's and what was saved, the output
# or the pre-activation (FROM_OUTPUT): PyTorch's own, which have derivatives in turn.
_aten = torch.ops.aten
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, output: _aten.threshold_backward(grad, output, 0),
    "gelu": lambda grad, input: _aten.gelu_backward(grad, input),
    "gelu_tanh": lambda grad, input: _aten.gelu_backward(grad, input, approximate="tanh"),
    # Not silu_backward, which has no derivative.
    "silu": _silu_gradient,
    "sigmoid": lambda grad, output: _aten.sigmoid_backward(grad, output),
    "tanh": lambda grad, output: _aten.tanh_backward(grad, output),
    "leaky_relu": lambda grad, output: _aten.leaky_relu_backward(grad, output, 0.01, True),
    # Cut off as in relu's own, so that no infinite gradient becomes NaN where relu is 0.
    "relu_squared": lambda grad, input: _aten.threshold_backward(
        grad * (2 * F.relu(input)), input, 0
    ),
}
