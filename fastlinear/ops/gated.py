"""The torch ops of a gated pair of layers: `activation(gate) * up`.

Here gate is `input @ gate_weight.T + gate_bias`, and up is `input @ up_weight.T + up_bias`.

`fastlinear::gated_linear` is what a module calls. `fastlinear::gated_linear_forward` also gives
gate and up, which derivatives need: outputs in their own right, so that derivatives of derivatives
flow back through them. `fastlinear::gated_linear_backward` computes the gradients together where no
graph of them is wanted: those of both weights as one matrix, and of both biases as one vector, the
gate's before up's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear.kernels.launching.operands import (
    FROM_OUTPUT,
    GATED,
    GATED_BACKWARD,
    check_activation,
    check_same_kind,
    check_shapes,
)
from fastlinear.ops import implementations
from fastlinear.ops.batching import InDims, to_front
from fastlinear.ops.elementwise import ACTIVATIONS, GRADIENTS
from fastlinear.ops.linear import (
    Gradients,
    added,
    gradients_of,
    linear_backward_flops,
    linear_backward_vmap,
    linear_flops,
    linear_vmap,
    tangent_of,
    wanted_gradients,
)
from fastlinear.ops.op import Op, define, recorded, register

Products = tuple[Tensor, Tensor, Tensor]  # output, gate, up

_OPERANDS = (
    "Tensor input, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias,"
    " str activation"
)
gated_linear_op = define(f"gated_linear({_OPERANDS}) -> Tensor")
forward_op = define(f"gated_linear_forward({_OPERANDS}) -> (Tensor, Tensor, Tensor)")
backward_op = define(
    "gated_linear_backward(Tensor grad_output, Tensor gate, Tensor up, Tensor? input,"
    " Tensor? gate_weight, Tensor? up_weight, bool bias, str activation)"
    " -> (Tensor, Tensor, Tensor)"
)


def _fake(
    input: Tensor, gate_weight: Tensor, up_weight: Tensor, *biases_and_activation: Any
) -> Tensor:
    gate_bias, up_bias, activation = biases_and_activation
    check_activation(activation, optional=False)
    weights = {"gate_weight": gate_weight, "up_weight": up_weight}
    operands = {"input": input, **weights, "gate_bias": gate_bias, "up_bias": up_bias}
    check_same_kind(**operands)
    check_shapes("gated_linear", GATED, *implementations.shapes_of(*operands.values()))
    return input.new_empty((*input.shape[:-1], gate_weight.shape[0]))


def _forward_fake(*arguments: Any) -> Products:
    output = _fake(*arguments)
    return output, torch.empty_like(output), torch.empty_like(output)


def _backward_fake(grad_output: Tensor, *others: Any) -> Gradients:
    *operands, bias, activation = others
    gate, up, input, gate_weight, up_weight = operands
    check_activation(activation, optional=False)
    products = {"grad_output": grad_output, "gate": gate, "up": up}
    check_same_kind(**products, input=input, gate_weight=gate_weight, up_weight=up_weight)
    shapes = implementations.shapes_of(grad_output, *operands)
    check_shapes("gated_linear_backward", GATED_BACKWARD, *shapes)
    both = 2 * grad_output.shape[-1]
    leading = grad_output.shape[:-1]
    return (
        grad_output.new_empty(0 if gate_weight is None else (*leading, gate_weight.shape[-1])),
        grad_output.new_empty(0 if input is None else (both, input.shape[-1])),
        grad_output.new_empty(both if bias else 0),
    )


def gate_gradients(
    grad_output: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, by PyTorch's functions, which have derivatives in turn."""
    activated = ACTIVATIONS[activation](gate)
    saved = activated if activation in FROM_OUTPUT else gate
    return GRADIENTS[activation](grad_output * up, saved), grad_output * activated


class GatedLinearFunction(internals.SingleLevelFunction):
    """Derivatives of the output, of gate and of up, in terms of the ops."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Products], *arguments: Any) -> Products:
        input, gate_weight, up_weight, _, _, ctx.activation = arguments
        output, gate, up = compute(*arguments)
        needed = ctx.needs_input_grad[1:4]
        # Each operand is kept for the others' gradients alone, as in LinearFunction.
        ctx.save_for_backward(
            input if needed[1] or needed[2] else None,
            gate_weight if needed[0] else None,
            up_weight if needed[0] else None,
            gate,
            up,
        )
        if internals.forward_ad_active():
            ctx.save_for_forward(input, gate_weight, up_weight, gate, up)
        ctx.set_materialize_grads(False)
        return output, gate, up

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_gate: Tensor | None, grad_up: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_output is None and grad_gate is None and grad_up is None:
            return (None,) * 7
        input, gate_weight, up_weight, gate, up = ctx.saved_tensors
        wanted, activation = internals.wanted(ctx)[1:6], ctx.activation
        by_parts = (
            torch.is_grad_enabled()
            or internals.forward_ad_active()
            or wanted[1] != wanted[2]  # the op computes both weights' gradients or neither
            # A shard of each gradient is no shard of both as one matrix.
            or type(gate) in internals.DISTRIBUTED
        )
        if grad_output is not None and grad_gate is None and grad_up is None and not by_parts:
            grad_input, grad_weight, grad_bias = backward_op(
                grad_output,
                gate,
                up,
                input if wanted[1] else None,
                gate_weight if wanted[0] else None,
                up_weight if wanted[0] else None,
                wanted[3] or wanted[4],
                activation,
            )
            n = gate.shape[-1]
            parts = grad_weight[:n], grad_weight[n:], grad_bias[:n], grad_bias[n:]
            gradients = grad_input, *parts
            given = (one if want else None for one, want in zip(gradients, wanted, strict=True))
            return None, *given, None
        if grad_output is not None:
            through_gate, through_up = gate_gradients(grad_output, gate, up, activation)
            grad_gate, grad_up = added(through_gate, grad_gate), added(through_up, grad_up)
        # Those of two layers.
        wants = wanted[0], wanted[1], wanted[3]
        of_gate = wanted_gradients(grad_gate, input, gate_weight, wants, False)
        wants = wanted[0], wanted[2], wanted[4]
        of_up = wanted_gradients(grad_up, input, up_weight, wants, False)
        grad_input = added(of_gate[0], of_up[0])
        return None, grad_input, of_gate[1], of_up[1], of_gate[2], of_up[2], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Products:
        _, of_input, of_gate_weight, of_up_weight, of_gate_bias, of_up_bias, _ = tangents
        with internals.next_level_in_forward_mode(*ctx.saved_tensors) as saved:
            input, gate_weight, up_weight, gate, up = saved
            of_gate = tangent_of(input, gate_weight, of_input, of_gate_weight, of_gate_bias)
            of_up = tangent_of(input, up_weight, of_input, of_up_weight, of_up_bias)
            # Outputs that are differentiable have a tangent each, or none has.
            of_gate = torch.zeros_like(gate) if of_gate is None else of_gate
            of_up = torch.zeros_like(up) if of_up is None else of_up
            activated = ACTIVATIONS[ctx.activation](gate)
            derived_from = activated if ctx.activation in FROM_OUTPUT else gate
            # The derivative is elementwise: it takes a tangent forward as a gradient back.
            through_gate = GRADIENTS[ctx.activation](of_gate, derived_from)
            return through_gate * up + activated * of_up, of_gate, of_up


def _of_both(of_gate: Gradients, of_up: Gradients, dims: Sequence[int]) -> Gradients:
    """The gradients of a pair of layers from those of each.

    Along `dims` the gate's of a weight and of a bias stand before up's.
    """
    grad_weight, grad_bias = map(torch.cat, zip(of_gate[1:], of_up[1:], strict=True), dims)
    return of_gate[0] + of_up[0], grad_weight, grad_bias


def _backward_recorded(plain: bool, *arguments: Any) -> Gradients:
    grad_output, gate, up, input, gate_weight, up_weight, bias, activation = arguments
    grad_gate, grad_up = gate_gradients(grad_output, gate, up, activation)
    of_gate = gradients_of(grad_gate, input, gate_weight, bias, False)
    return _of_both(of_gate, gradients_of(grad_up, input, up_weight, bias, False), (0, 0))


def _vmap(op: Op, info: Any, in_dims: InDims, *arguments: Any) -> tuple[Any, int]:
    """Of `op` where the vmapped dimension is one more of rows, else of gate, of up and by them."""
    input, gate_weight, up_weight, gate_bias, up_bias, activation = arguments
    of_input, of_gate_weight, of_up_weight, of_gate_bias, of_up_bias, _ = in_dims
    if all(dim is None for dim in in_dims[1:5]):
        return op(to_front(input, of_input, info.batch_size), *arguments[1:]), 0
    dims = of_input, of_gate_weight, of_gate_bias
    gate, _ = linear_vmap(info, dims, input, gate_weight, gate_bias)
    dims = of_input, of_up_weight, of_up_bias
    up, _ = linear_vmap(info, dims, input, up_weight, up_bias)
    output = ACTIVATIONS[activation](gate) * up
    return output if op is gated_linear_op else (output, gate, up), 0


def _backward_vmap(info: Any, in_dims: InDims, *arguments: Any) -> tuple[Gradients, InDims]:
    *products, input, gate_weight, up_weight, bias, activation = arguments
    grad_output, gate, up = (
        to_front(tensor, dim, info.batch_size)
        for tensor, dim in zip(products, in_dims[:3], strict=True)
    )
    grad_gate, grad_up = gate_gradients(grad_output, gate, up, activation)
    dims = (0, in_dims[3], in_dims[4])
    of_gate, _ = linear_backward_vmap(info, dims, grad_gate, input, gate_weight, bias, False)
    dims = (0, in_dims[3], in_dims[5])
    of_up, out_dims = linear_backward_vmap(info, dims, grad_up, input, up_weight, bias, False)
    return _of_both(of_gate, of_up, [0 if dim is None else 1 for dim in out_dims[1:]]), out_dims


_recorded = recorded(GatedLinearFunction, forward_op, implementations.gated_forward)
register(
    gated_linear_op,
    compute=implementations.gated_output,
    fake=_fake,
    record=lambda *arguments: _recorded(*arguments)[0],
    vmap=lambda *arguments: _vmap(gated_linear_op, *arguments),
    flops=lambda *operands, **options: 2 * linear_flops(*operands),
    autocast=5,
)
register(
    forward_op,
    compute=implementations.gated_forward,
    fake=_forward_fake,
    record=_recorded,
    vmap=lambda *arguments: _vmap(forward_op, *arguments),
    flops=lambda *operands, **options: 2 * linear_flops(*operands),
)
register(
    backward_op,
    compute=implementations.gated_backward,
    fake=_backward_fake,
    record=_backward_recorded,
    tangents=False,
    vmap=_backward_vmap,
    flops=lambda grad_output, gate, up, *others, **options: (
        2 * linear_backward_flops(grad_output, *others)
    ),
)
