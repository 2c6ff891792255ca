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


def check_activation(activation: object, optional: bool = True) -> None:
    """Raises ValueError, naming the choices, unless `activation` is one of ACTIVATIONS.

    Or None, where it is optional.
    """
    if activation not in ACTIVATIONS and not (optional and activation is None):
        raise ValueError(
            f"activation must be {'None or ' if optional else ''}one of "
            f"{', '.join(map(repr, ACTIVATIONS))}, but is {activation!r}"
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


def check_main_grad(main_grad: object, weight: Shape, like: torch.Tensor) -> None:
    """Raises RuntimeError unless the gradient of a weight can be added to `main_grad`.

    Args:
        main_grad: what has to be a contiguous tensor in the dtype that products are summed in.
        weight: its shape.
        like: an operand of the product, for dtype and device.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(main_grad, torch.Tensor):
        came = f"is {type(main_grad).__name__}"
    elif (main_grad.dtype, main_grad.device) != (dtype, like.device):
        came = f"is {main_grad.dtype} on {main_grad.device}"
    elif main_grad.shape != torch.Size(weight):
        came = f"has shape {tuple(main_grad.shape)}"
    elif not main_grad.is_contiguous():
        came = f"has strides {main_grad.stride()}"
    else:
        return
    raise RuntimeError(
        f"weight.main_grad has to be a contiguous {dtype} tensor of weight's shape "
        f"{tuple(weight)} on {like.device}, but it {came}"
    )


def check_saved_shape(saved: Shape, grad_output: Shape) -> None:
    """Raises RuntimeError unless what an activation's gradient is taken from has its shape."""
    if tuple(saved) != tuple(grad_output):
        raise RuntimeError(
            "fastlinear::linear_activation_backward takes saved of grad_output's shape, "
            f"but saved is {tuple(saved)} and grad_output {tuple(grad_output)}"
        )


def check_gated_shapes(
    input: Shape,
    gate_weight: Shape,
    up_weight: Shape,
    gate_bias: Shape | None,
    up_bias: Shape | None,
) -> None:
    """Raises RuntimeError unless both weights fit the input and each other, and biases fit them."""
    fits = (
        len(input) >= 1
        and len(gate_weight) == 2
        and tuple(gate_weight) == tuple(up_weight)
        and input[-1] == gate_weight[-1]
        and all(
            bias is None or tuple(bias) == tuple(gate_weight[:1]) for bias in (gate_bias, up_bias)
        )
    )
    if not fits:
        given = {
            "input": input,
            "gate_weight": gate_weight,
            "up_weight": up_weight,
            "gate_bias": gate_bias,
            "up_bias": up_bias,
        }
        shapes = ", ".join(
            f"{name} {None if shape is None else tuple(shape)}" for name, shape in given.items()
        )
        raise RuntimeError(
            "gated_linear takes input (*, in_features), both weights (out_features, in_features) "
            f"and biases (out_features,), but the shapes are: {shapes}"
        )


def check_gated_backward_shapes(
    grad_output: Shape,
    gate: Shape,
    up: Shape,
    input: Shape | None,
    gate_weight: Shape | None,
    up_weight: Shape | None,
) -> None:
    """Raises RuntimeError unless the shapes are those of `gated_linear`'s operands and outputs."""
    weights = [tuple(weight) for weight in (gate_weight, up_weight) if weight is not None]
    fits = (
        len(grad_output) >= 1
        and tuple(gate) == tuple(up) == tuple(grad_output)
        and (input is None or (len(input) > 0 and input[:-1] == grad_output[:-1]))
        and len(weights) in (0, 2)
        and all(weight == weights[0] for weight in weights)
        and all(len(weight) == 2 and weight[0] == grad_output[-1] for weight in weights)
    )
    if not fits:
        shapes = [
            None if shape is None else tuple(shape)
            for shape in (grad_output, gate, up, input, gate_weight, up_weight)
        ]
        raise RuntimeError(
            "fastlinear::gated_linear_backward takes grad_output, gate and up (*, N), input (*, K) "
            "and both weights (N, K) or neither, but grad_output is {}, gate {}, up {}, input {}, "
            "gate_weight {}, up_weight {}".format(*shapes)
        )
