"""How operands that are vmapped become those of one call: of more rows, or of more layers."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

InDims = tuple[int | None, ...]  # by argument, the vmapped dimension of those that have one


def to_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """`tensor` with its vmapped dimension first.

    Where it has none, it gets a first dimension of stride 0.
    """
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def as_layers(
    info: Any, in_dims: InDims, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Operands without the vmapped dimension, which has become, or joined, rows or layers.

    With them comes what gives their output that dimension back, in front.
    """
    input_dim, weight_dim, bias_dim = in_dims[:3]
    batched = weight.dim() - (weight_dim is not None) == 3
    input = to_front(input, input_dim, info.batch_size)
    if weight_dim is None and bias_dim is None:
        if not batched:
            return input, weight, bias, lambda output: output
        # The vmapped dimension joins the rows of each layer, so that no layer is copied.
        samples, layers, rows = input.shape[:3]
        shape = (layers, samples, rows, weight.shape[1])
        return (
            input.transpose(0, 1).flatten(1, 2),
            weight,
            bias,
            lambda output: output.reshape(shape).transpose(0, 1),
        )

    weight = to_front(weight, weight_dim, info.batch_size)
    if bias is not None:
        bias = to_front(bias, bias_dim, info.batch_size)
    leading = (*input.shape[:-1], weight.shape[-2])
    if batched:
        weight = weight.flatten(0, 1)
        bias = None if bias is None else bias.flatten(0, 1)
    layers = weight.shape[0]
    rows = math.prod(input.shape[:-1]) // max(layers, 1)
    input = input.reshape(layers, rows, input.shape[-1])
    return input, weight, bias, lambda output: output.reshape(leading)
