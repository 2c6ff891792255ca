"""What the kernels take: activations, and shapes, dtypes and devices that belong together.

Nothing here imports Triton, so that shapes are checked the same way where there is none.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

Activation = Literal[
    "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "leaky_relu", "relu_squared"
]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

# Whose gradient is taken from the output, which the next layer mostly keeps anyway. The others'
# needs the pre-activation.
FROM_OUTPUT = frozenset({"relu", "sigmoid", "tanh", "leaky_relu"})

Shape = Sequence[Any]  # of int, or of SymInt while a graph is traced


def check_activation(activation: object) -> None:
    """Raises ValueError, naming the choices, unless `activation` is None or one of ACTIVATIONS."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be None or one of {', '.join(map(repr, ACTIVATIONS))}, "
            f"but is {activation!r}"
        )


def check_same_kind(**operands: Any) -> None:
    """Raises RuntimeError unless operands share a device and one of the kernels' dtypes.

    Args:
        operands: by their names in the message, what has a dtype and a device, or None.
    """
    given = {name: operand for name, operand in operands.items() if operand is not None}
    first = next(iter(given.values()))
    if first.dtype not in DTYPES or any(
        (operand.dtype, operand.device) != (first.dtype, first.device) for operand in given.values()
    ):
        kinds = ", ".join(
            f"{name} is {operand.dtype} on {operand.device}" for name, operand in given.items()
        )
        raise RuntimeError(
            "the kernels take float16, bfloat16, float32 or float64, one dtype on one device, "
            f"but {kinds}"
        )


def check_forward_shapes(input: Shape, weight: Shape, bias: Shape | None) -> None:
    """Raises RuntimeError unless shapes are those of one layer or of B layers.

    One layer is (*, K), (N, K), (N,); B layers are (B, M, K), (B, N, K), (B, N).
    """
    batched = len(weight) == 3
    fits = (
        len(weight) in (2, 3)
        and len(input) >= 1
        and (not batched or (len(input) == 3 and input[0] == weight[0]))
        and input[-1] == weight[-1]
        and (bias is None or tuple(bias) == tuple(weight[:-1]))
    )
    if not fits:
        raise RuntimeError(
            "fastlinear::linear takes input (*, K), weight (N, K), bias (N,), "
            "or input (B, M, K), weight (B, N, K), bias (B, N), "
            f"but input is {tuple(input)}, weight {tuple(weight)}, "
            f"bias {None if bias is None else tuple(bias)}"
        )


def check_backward_shapes(
    grad_output: Shape, input: Shape | None, weight: Shape | None, batched: bool
) -> None:
    """Raises RuntimeError unless input has grad_output's leading shape, and weight its features."""
    dims = 3 if batched else 2
    fits = (
        len(grad_output) >= 1
        and (not batched or len(grad_output) == 3)
        and (input is None or (len(input) > 0 and input[:-1] == grad_output[:-1]))
        and (weight is None or (len(weight) == dims and weight[-2] == grad_output[-1]))
        and (weight is None or not batched or weight[0] == grad_output[0])
    )
    if not fits:
        shapes = [None if shape is None else tuple(shape) for shape in (input, weight)]
        raise RuntimeError(
            "fastlinear::linear_backward takes grad_output (*, N), input (*, K), weight (N, K), or "
            "(B, M, N), (B, M, K), (B, N, K) if batched, "
            f"but grad_output is {tuple(grad_output)}, input {shapes[0]}, weight {shapes[1]}"
        )


def check_saved_shape(saved: Shape, grad_output: Shape) -> None:
    """Raises RuntimeError unless what an activation's gradient is taken from has its shape."""
    if tuple(saved) != tuple(grad_output):
        raise RuntimeError(
            "fastlinear::linear_activation_backward takes saved of grad_output's shape, "
            f"but saved is {tuple(saved)} and grad_output {tuple(grad_output)}"
        )
