"""What the kernels take: activations, and shapes, dtypes and devices that belong together.

Nothing here imports Triton, so that shapes are checked the same way where there is none.
"""

import functools
import re
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


# The shapes that ops take: a letter is one size wherever it stands, * any number of dimensions;
# operands that share a shape are there together or not at all.
LAYER = ("input (*, K), weight (N, K), bias (N,)", "input (B, M, K), weight (B, N, K), bias (B, N)")
BACKWARD = ("grad_output (*, N), input (*, K), weight (N, K)",)
BACKWARD_BATCHED = ("grad_output (B, M, N), input (B, M, K), weight (B, N, K)",)
ACTIVATED = ("grad_output and saved (*, N)",)
GATED = ("input (*, K), gate_weight and up_weight (N, K), gate_bias (N,), up_bias (N,)",)
GATED_BACKWARD = (
    "grad_output, gate and up (*, N), input (*, K), gate_weight and up_weight (N, K) or neither",
)


def check_shapes(op: str, taken: tuple[str, ...], *shapes: Shape | None) -> None:
    """Raises RuntimeError unless shapes are as one of `taken` says; None is for no operand."""
    try:
        fit = _fit(taken, shapes)
    except TypeError:  # of symbols, which have no hash
        fit = _fit.__wrapped__(taken, shapes)
    if not fit:
        names = [name for name, _, _ in _parsed(taken[0])]
        found = [None if shape is None else tuple(shape) for shape in shapes]
        given = ", ".join(f"{name} {shape}" for name, shape in zip(names, found, strict=True))
        raise RuntimeError(
            f"fastlinear::{op} takes {', or '.join(taken)}, but {given.replace(' ', ' is ', 1)}"
        )


@functools.lru_cache(maxsize=4096)
def _fit(taken: tuple[str, ...], shapes: tuple[Shape | None, ...]) -> bool:
    return any(_fits(_parsed(one), shapes) for one in taken)


@functools.cache
def _parsed(taken: str) -> list[tuple[str, list[str], list[int]]]:
    """Of each operand its name, its sizes, and the positions of those that share its shape."""
    operands: list[tuple[str, list[str], list[int]]] = []
    for names, sizes in re.findall(r"([a-z_, ]+) \((.+?)\)", taken):
        together = [name for name in re.findall(r"\w+", names) if name != "and"]
        positions = list(range(len(operands), len(operands) + len(together)))
        operands += [(name, re.findall(r"[*A-Z]", sizes), positions) for name in together]
    return operands


def _fits(
    operands: list[tuple[str, list[str], list[int]]], shapes: tuple[Shape | None, ...]
) -> bool:
    found: dict[str, Any] = {}
    for (_, letters, together), shape in zip(operands, shapes, strict=True):
        if shape is None:
            if any(shapes[position] is not None for position in together):
                return False
            continue
        sizes = tuple(shape)
        if letters[0] == "*":
            leading = len(sizes) - len(letters) + 1
            sizes = (sizes[: max(0, leading)], *sizes[max(0, leading) :])
        if len(sizes) != len(letters):
            return False
        pairs = zip(letters, sizes, strict=True)
        if any(found.setdefault(letter, size) != size for letter, size in pairs):
            return False
    return True


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
