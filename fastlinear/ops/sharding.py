"""How the ops run on DTensors: which placements of operands give which placements of outputs.

A row holds placements of outputs and of tensor arguments over one dimension of a device mesh;
DTensor combines rows over all dimensions. Where none fits operands as they lie, it moves them to
the cheapest that does. The rows are those of a product:

- everything is replicated;
- layers are sharded, where there are B of them;
- rows are sharded, by any leading dimension of the input: data and sequence parallel. Sums over
  rows, grad_weight and grad_bias, are then partial;
- out_features are sharded, column-wise. The sum over them, grad_input, is then partial;
- in_features are sharded, row-wise. The sum over them, the output, is then partial, and part of a
  sum cannot be activated: a forward op with an activation has no such row.

Importing this imports torch.distributed.tensor: `fastlinear` does so as soon as someone else has.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from fastlinear import _torch_internals as internals
from fastlinear.kernels.launching.operands import FROM_OUTPUT
from fastlinear.ops import gated
from fastlinear.ops import linear as autograd

Placements = list[Placement]
Row = tuple[Placements, Placements]
RowsOf = Callable[..., list[Row]]

WHOLE = Replicate()


def _register(op: torch._ops.OpOverload) -> Callable[[RowsOf], RowsOf]:
    """Registers what the decorated function gives for the arguments of `op`.

    Arguments that are tensors come as tensor-like objects with their global shape. A row places
    every one that there can be.
    """

    def register(rows_of: RowsOf) -> RowsOf:
        def of_those_given(*arguments: Any) -> list[tuple[Placements, list[Placement | None]]]:
            rows = []
            for outputs, placements in rows_of(*arguments):
                pairs = zip(arguments, placements, strict=False)
                given = [None if argument is None else placement for argument, placement in pairs]
                rows.append((outputs, given))
            return rows

        register_sharding(op)(of_those_given)
        internals.shard_by_all_arguments(op)
        return rows_of

    return register


def _forward(input: Any, weight: Any) -> list[Row]:
    """Of an output, an input, a weight and a bias: all rows but the row-wise one."""
    layers = weight.ndim - 2  # dimensions of them, 0 or 1
    last = input.ndim - 1
    rows: list[Row] = [([WHOLE], [WHOLE, WHOLE, WHOLE])]
    if layers:
        rows.append(([Shard(0)], [Shard(0), Shard(0), Shard(0)]))
    rows += [([Shard(dim)], [Shard(dim), WHOLE, WHOLE]) for dim in range(layers, last)]
    rows.append(([Shard(last)], [WHOLE, Shard(layers), Shard(layers)]))
    return rows


def _backward(
    grad_output: Any, input: Any, weight: Any, bias: bool, layers: int, by_columns: bool = True
) -> list[Row]:
    """Of grad_input, grad_weight and grad_bias, and of grad_output, an input and a weight."""
    last = grad_output.ndim - 1
    rows: list[Row] = [([WHOLE, WHOLE, WHOLE], [WHOLE, WHOLE, WHOLE])]
    if layers:
        rows.append(([Shard(0), Shard(0), Shard(0)], [Shard(0), Shard(0), Shard(0)]))
    for dim in range(layers, last):
        rows.append(([Shard(dim), Partial(), Partial()], [Shard(dim), Shard(dim), WHOLE]))
    if by_columns:
        columns = Shard(layers)
        rows.append(([Partial(), columns, columns], [Shard(last), WHOLE, columns]))
    in_features = Shard(layers + 1)
    rows.append(([Shard(last), in_features, WHOLE], [WHOLE, Shard(last), in_features]))
    # What is not asked for is an empty tensor, on every rank.
    wanted = (weight is not None, input is not None, bias)
    return [
        (
            [place if asked else WHOLE for place, asked in zip(outputs, wanted, strict=True)],
            arguments,
        )
        for outputs, arguments in rows
    ]


@_register(autograd.linear_op)
def linear(input: Any, weight: Any, bias: Any) -> list[Row]:
    in_features = Shard(weight.ndim - 1)
    row_wise: Row = ([Partial()], [Shard(input.ndim - 1), in_features, Partial()])
    return [*_forward(input, weight), row_wise]


@_register(autograd.linear_backward_op)
def linear_backward(
    grad_output: Any, input: Any, weight: Any, bias: bool, batched: bool
) -> list[Row]:
    return _backward(grad_output, input, weight, bias, int(batched))


@_register(autograd.linear_activation_op)
def linear_activation(input: Any, weight: Any, *others: Any) -> list[Row]:
    return _forward(input, weight)


@_register(autograd.activation_forward_op)
def linear_activation_forward(input: Any, weight: Any, bias: Any, activation: str) -> list[Row]:
    return [
        ([output, WHOLE if activation in FROM_OUTPUT else output], arguments)
        for (output,), arguments in _forward(input, weight)
    ]


@_register(autograd.activation_backward_op)
def linear_activation_backward(grad_output: Any, saved: Any, *others: Any) -> list[Row]:
    rows = linear_backward(grad_output, *others[:-1])
    return [(outputs, [arguments[0], *arguments]) for outputs, arguments in rows]


@_register(gated.gated_linear_op)
def gated_linear(input: Any, gate_weight: Any, *others: Any) -> list[Row]:
    return [
        (outputs, [operand, weight, weight, bias, bias])
        for outputs, (operand, weight, bias) in _forward(input, gate_weight)
    ]


@_register(gated.forward_op)
def gated_linear_forward(*arguments: Any) -> list[Row]:
    return [(outputs * 3, placements) for outputs, placements in gated_linear(*arguments)]


@_register(gated.backward_op)
def gated_linear_backward(
    grad_output: Any, gate: Any, up: Any, input: Any, gate_weight: Any, *others: Any
) -> list[Row]:
    _, bias, _ = others
    # Not column-wise: each rank would give the gate's columns before up's, where the whole has all
    # of the gate's first. GatedLinearFunction takes another way.
    rows = _backward(grad_output, input, gate_weight, bias, layers=0, by_columns=False)
    return [
        (outputs, [grad, grad, grad, operand, weight, weight])
        for outputs, (grad, operand, weight) in rows
    ]


internals.know_distributed()
