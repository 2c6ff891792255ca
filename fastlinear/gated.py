"""The torch ops of a gated pair of layers: `activation(gate) * up`.

Here gate is `input @ gate_weight.T + gate_bias`, and up is `input @ up_weight.T + up_bias`.

`fastlinear::gated_linear` is what a module calls. `fastlinear::gated_linear_forward` also gives
gate and up, which derivatives need: outputs in their own right, so that derivatives of derivatives
flow back through them. `fastlinear::gated_linear_backward` computes the gradients together where no
graph of them is wanted: those of both weights as one matrix, and of both biases as one vector, the
gate's before up's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear import implementations
from fastlinear.autograd import (
    LIBRARY,
    TAGS,
    Gradients,
    gradients_of,
    linear_backward_flops,
    linear_backward_vmap,
    linear_flops,
    linear_vmap,
    register_autocast,
    tangent_of,
    to_front,
    wanted_gradients,
)
from fastlinear.elementwise import ACTIVATIONS, GRADIENTS
from fastlinear.kernels.operands import (
    FROM_OUTPUT,
    check_activation,
    check_gated_backward_shapes,
    check_gated_shapes,
    check_same_kind,
)

Products = tuple[Tensor, Tensor, Tensor]  # output, gate, up

_OPERANDS = (
    "Tensor input, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias,"
    " str activation"
)
LIBRARY.define(f"gated_linear({_OPERANDS}) -> Tensor", tags=TAGS)
LIBRARY.define(f"gated_linear_forward({_OPERANDS}) -> (Tensor, Tensor, Tensor)", tags=TAGS)
LIBRARY.define(
    "gated_linear_backward(Tensor grad_output, Tensor gate, Tensor up, Tensor? input,"
    " Tensor? gate_weight, Tensor? up_weight, bool bias, str activation)"
    " -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
gated_linear_op = torch.ops.fastlinear.gated_linear.default
forward_op = torch.ops.fastlinear.gated_linear_forward.default
backward_op = torch.ops.fastlinear.gated_linear_backward.default

for _device in ("CPU", "CUDA"):
    LIBRARY.impl("gated_linear", implementations.gated_output, _device)
    LIBRARY.impl("gated_linear_forward", implementations.gated_forward, _device)
    LIBRARY.impl("gated_linear_backward", implementations.gated_backward, _device)


@torch.library.register_fake(gated_linear_op, lib=LIBRARY)
def _fake(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    check_activation(activation, optional=False)
    operands = {
        "input": input,
        "gate_weight": gate_weight,
        "up_weight": up_weight,
        "gate_bias": gate_bias,
        "up_bias": up_bias,
    }
    check_same_kind(**operands)
    check_gated_shapes(*(None if one is None else one.shape for one in operands.values()))
    return input.new_empty((*input.shape[:-1], gate_weight.shape[0]))


@torch.library.register_fake(forward_op, lib=LIBRARY)
def _forward_fake(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Products:
    output = _fake(input, gate_weight, up_weight, gate_bias, up_bias, activation)
    return output, torch.empty_like(output), torch.empty_like(output)


@torch.library.register_fake(backward_op, lib=LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    input: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    bias: bool,
    activation: str,
) -> Gradients:
    check_activation(activation, optional=False)
    operands = {
        "grad_output": grad_output,
        "gate": gate,
        "up": up,
        "input": input,
        "gate_weight": gate_weight,
        "up_weight": up_weight,
    }
    check_same_kind(**operands)
    check_gated_backward_shapes(*(None if one is None else one.shape for one in operands.values()))
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


def gradients_by_parts(
    grad_gate: Tensor | None,
    grad_up: Tensor | None,
    input: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of all operands from those of gate and up, which are those of two layers.

    None for what is not wanted, or does not come from a gradient that is there.
    """
    of_input, of_gate_weight, of_up_weight, of_gate_bias, of_up_bias = wanted[:5]
    of_gate: tuple[Tensor | None, ...] = (None, None, None)
    of_up: tuple[Tensor | None, ...] = (None, None, None)
    if grad_gate is not None:
        wants = of_input, of_gate_weight, of_gate_bias
        of_gate = wanted_gradients(grad_gate, input, gate_weight, wants, False)
    if grad_up is not None:
        wants = of_input, of_up_weight, of_up_bias
        of_up = wanted_gradients(grad_up, input, up_weight, wants, False)
    grad_input = of_gate[0] if of_up[0] is None else of_up[0]
    if of_gate[0] is not None and of_up[0] is not None:
        grad_input = of_gate[0] + of_up[0]
    return grad_input, of_gate[1], of_up[1], of_gate[2], of_up[2]


class GatedLinearFunction(internals.SingleLevelFunction):
    """Derivatives of the output, of gate and of up, in terms of the ops."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        activation: str,
        plain: bool,
    ) -> Products:
        operands = (input, gate_weight, up_weight, gate_bias, up_bias)
        if plain:
            output, gate, up = implementations.gated_forward(*operands, activation)
        else:
            with internals.below_autograd():
                if internals.transforming():
                    with internals.next_level_differentiates():
                        output, gate, up = forward_op(*operands, activation)
                else:
                    output, gate, up = forward_op(*operands, activation)
        needed = ctx.needs_input_grad
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
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return output, gate, up

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_gate: Tensor | None, grad_up: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_output is None and grad_gate is None and grad_up is None:
            return (None,) * 7
        input, gate_weight, up_weight, gate, up = ctx.saved_tensors
        wanted, activation = internals.wanted(ctx)[:5], ctx.activation
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
            features = gate.shape[-1]
            gradients = (
                grad_input,
                grad_weight[:features],
                grad_weight[features:],
                grad_bias[:features],
                grad_bias[features:],
            )
            given = (one if want else None for one, want in zip(gradients, wanted, strict=True))
            return *given, None, None
        if grad_output is not None:
            through = gate_gradients(grad_output, gate, up, activation)
            grad_gate = through[0] if grad_gate is None else through[0] + grad_gate
            grad_up = through[1] if grad_up is None else through[1] + grad_up
        operands = (grad_gate, grad_up, input, gate_weight, up_weight)
        return *gradients_by_parts(*operands, wanted), None, None

    @staticmethod
    def jvp(
        ctx: Any,
        input_tangent: Tensor | None,
        gate_weight_tangent: Tensor | None,
        up_weight_tangent: Tensor | None,
        gate_bias_tangent: Tensor | None,
        up_bias_tangent: Tensor | None,
        activation_tangent: None,
        plain_tangent: None,
    ) -> Products:
        with internals.next_level_in_forward_mode(*ctx.saved_tensors) as saved:
            input, gate_weight, up_weight, gate, up = saved
            gate_tangent = tangent_of(
                input, gate_weight, False, input_tangent, gate_weight_tangent, gate_bias_tangent
            )
            up_tangent = tangent_of(
                input, up_weight, False, input_tangent, up_weight_tangent, up_bias_tangent
            )
            # Outputs that are differentiable have a tangent each, or none has.
            if gate_tangent is None:
                gate_tangent = torch.zeros_like(gate)
            if up_tangent is None:
                up_tangent = torch.zeros_like(up)
            activated = ACTIVATIONS[ctx.activation](gate)
            derived_from = activated if ctx.activation in FROM_OUTPUT else gate
            # The derivative is elementwise: it takes a tangent forward as a gradient back.
            through_gate = GRADIENTS[ctx.activation](gate_tangent, derived_from)
            return through_gate * up + activated * up_tangent, gate_tangent, up_tangent


def _differentiated(*operands: Tensor | None) -> bool:
    return internals.forward_ad_active() or (
        torch.is_grad_enabled()
        and any(operand is not None and operand.requires_grad for operand in operands)
    )


def _autograd(keys: Any, *arguments: Any) -> Tensor:
    plain = not keys.raw_repr() & internals.BEYOND_PLAIN
    if _differentiated(*arguments[:5]):
        return internals.apply(GatedLinearFunction, *arguments, plain)[0]
    if plain:
        return implementations.gated_output(*arguments)
    with internals.below_autograd():
        return gated_linear_op(*arguments)


def _forward_autograd(keys: Any, *arguments: Any) -> Products:
    plain = not keys.raw_repr() & internals.BEYOND_PLAIN
    if _differentiated(*arguments[:5]):
        return internals.apply(GatedLinearFunction, *arguments, plain)
    with internals.below_autograd():
        return forward_op(*arguments)


def _backward_autograd(
    keys: Any,
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    input: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    bias: bool,
    activation: str,
) -> Gradients:
    operands = (grad_output, gate, up, input, gate_weight, up_weight)
    if torch.is_grad_enabled() and any(
        operand is not None and operand.requires_grad for operand in operands
    ):
        halves = [
            gradients_of(grad, input, weight, bias, False)
            for grad, weight in zip(
                gate_gradients(grad_output, gate, up, activation),
                (gate_weight, up_weight),
                strict=True,
            )
        ]
        (grad_input, *of_gate), (second_grad_input, *of_up) = halves
        grad_weight, grad_bias = map(torch.cat, zip(of_gate, of_up, strict=True))
        return grad_input + second_grad_input, grad_weight, grad_bias
    if not keys.raw_repr() & internals.BEYOND_PLAIN:
        return implementations.gated_backward(*operands, bias, activation)
    with internals.below_autograd():
        return backward_op(*operands, bias, activation)


LIBRARY.impl("gated_linear", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("gated_linear_forward", _forward_autograd, "Autograd", with_keyset=True)
LIBRARY.impl("gated_linear_backward", _backward_autograd, "Autograd", with_keyset=True)


def _forward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> tuple[Products, tuple[int, int, int]]:
    if all(dim is None for dim in in_dims[1:5]):  # the vmapped dimension is one more of rows
        input = to_front(input, in_dims[0], info.batch_size)
        operands = (input, gate_weight, up_weight, gate_bias, up_bias)
        return forward_op(*operands, activation), (0, 0, 0)
    gate, _ = linear_vmap(info, (in_dims[0], in_dims[1], in_dims[3]), input, gate_weight, gate_bias)
    up, _ = linear_vmap(info, (in_dims[0], in_dims[2], in_dims[4]), input, up_weight, up_bias)
    return (ACTIVATIONS[activation](gate) * up, gate, up), (0, 0, 0)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    if all(dim is None for dim in in_dims[1:5]):
        input = to_front(arguments[0], in_dims[0], info.batch_size)
        return gated_linear_op(input, *arguments[1:]), 0
    (output, _, _), _ = _forward_vmap(info, in_dims, *arguments)
    return output, 0


def _backward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    input: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    bias: bool,
    activation: str,
) -> tuple[Gradients, tuple[int | None, ...]]:
    size = info.batch_size
    grad_output, gate, up = (
        to_front(tensor, dim, size)
        for tensor, dim in zip((grad_output, gate, up), in_dims[:3], strict=True)
    )
    gradients = []
    for grad, weight, weight_dim in zip(
        gate_gradients(grad_output, gate, up, activation),
        (gate_weight, up_weight),
        in_dims[4:6],
        strict=True,
    ):
        dims = (0, in_dims[3], weight_dim, None, None)
        found, out_dims = linear_backward_vmap(info, dims, grad, input, weight, bias, False)
        gradients.append(found)
    (grad_input, *of_gate), (second_grad_input, *of_up) = gradients
    grad_weight, grad_bias = (
        torch.cat(pair, 0 if dim is None else 1)
        for pair, dim in zip(zip(of_gate, of_up, strict=True), out_dims[1:], strict=True)
    )
    return (grad_input + second_grad_input, grad_weight, grad_bias), out_dims


torch.library.register_vmap(gated_linear_op, _vmap, lib=LIBRARY)
torch.library.register_vmap(forward_op, _forward_vmap, lib=LIBRARY)
torch.library.register_vmap(backward_op, _backward_vmap, lib=LIBRARY)
register_autocast(gated_linear_op, operands=5)

for _entry in (
    implementations.gated_output,
    implementations.gated_forward,
    implementations.gated_backward,
    GatedLinearFunction.backward,
    _autograd,
    _forward_autograd,
    _backward_autograd,
    _vmap,
    _forward_vmap,
    _backward_vmap,
):
    internals.hide_from_dynamo(_entry)


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.fastlinear
    register_flop_formula([ops.gated_linear, ops.gated_linear_forward])(
        lambda input, gate_weight, *others, **options: 2 * linear_flops(input, gate_weight)
    )
    register_flop_formula(ops.gated_linear_backward)(
        lambda grad_output, gate, up, input, gate_weight, *others, **options: (
            2 * linear_backward_flops(grad_output, input, gate_weight)
        )
    )


internals.when_imported("torch.utils.flop_counter", _register_flop_formulas)
