"""The torch ops of a layer with its activation: `activation(input @ weight.mT + bias)`.

`fastlinear::linear_activation` is what a layer calls. `fastlinear::linear_activation_forward` also
gives the pre-activation, where a derivative needs it: an output in its own right, so that
derivatives of derivatives flow back through it. `fastlinear::linear_activation_backward` computes
the gradients together where no graph of them is wanted. Operands are those of `fastlinear::linear`,
for one layer or for B.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear import backend, implementations
from fastlinear.autograd import (
    LIBRARY,
    TAGS,
    Gradients,
    as_layers,
    gradients_of,
    linear_backward_fake,
    linear_backward_flops,
    linear_backward_vmap,
    linear_fake,
    linear_flops,
    register_autocast,
    tangent_of,
    to_front,
    wanted_gradients,
)
from fastlinear.choice import known
from fastlinear.elementwise import GRADIENTS
from fastlinear.kernels.operands import (
    FROM_OUTPUT,
    check_activation,
    check_same_kind,
    check_saved_shape,
)

Compute = Callable[[Tensor, Tensor, Tensor | None, str], tuple[Tensor, Tensor]]

_OPERANDS = "Tensor input, Tensor weight, Tensor? bias, str activation"
LIBRARY.define(f"linear_activation({_OPERANDS}) -> Tensor", tags=TAGS)
LIBRARY.define(f"linear_activation_forward({_OPERANDS}) -> (Tensor, Tensor)", tags=TAGS)
LIBRARY.define(
    "linear_activation_backward(Tensor grad_output, Tensor saved, Tensor? input, Tensor? weight,"
    " bool bias, bool batched, str activation) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
linear_activation_op = torch.ops.fastlinear.linear_activation.default
forward_op = torch.ops.fastlinear.linear_activation_forward.default
backward_op = torch.ops.fastlinear.linear_activation_backward.default

for _device in ("CPU", "CUDA"):
    LIBRARY.impl("linear_activation", implementations.activation_output, _device)
    LIBRARY.impl("linear_activation_forward", implementations.activation_forward, _device)
    LIBRARY.impl("linear_activation_backward", implementations.activation_backward, _device)


@torch.library.register_fake(linear_activation_op, lib=LIBRARY)
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    check_activation(activation)
    return linear_fake(input, weight, bias)


@torch.library.register_fake(forward_op, lib=LIBRARY)
def _forward_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    output = _fake(input, weight, bias, activation)
    return output, output.new_empty(0 if activation in FROM_OUTPUT else output.shape)


@torch.library.register_fake(backward_op, lib=LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool,
    activation: str,
) -> Gradients:
    check_activation(activation)
    check_same_kind(grad_output=grad_output, saved=saved)
    check_saved_shape(saved.shape, grad_output.shape)
    return linear_backward_fake(grad_output, input, weight, bias, batched)


def _below_autograd(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    with internals.below_autograd():
        if internals.transforming():
            with internals.next_level_differentiates():
                return forward_op(input, weight, bias, activation)
        return forward_op(input, weight, bias, activation)


class LinearActivationFunction(internals.SingleLevelFunction):
    """Derivatives of the output and of the pre-activation, in terms of the ops."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        compute: Compute,
    ) -> tuple[Tensor, Tensor]:
        output, preactivation = compute(input, weight, bias, activation)
        saved = preactivation
        if activation in FROM_OUTPUT:
            saved = output
            ctx.mark_non_differentiable(preactivation)  # it is empty
        needed = ctx.needs_input_grad
        # Each operand is kept for the other's gradient alone, as in LinearFunction.
        ctx.save_for_backward(input if needed[1] else None, weight if needed[0] else None, saved)
        if internals.forward_ad_active():
            ctx.save_for_forward(input, weight, saved)
        ctx.batched, ctx.activation = weight.dim() == 3, activation
        ctx.auto = known.seen and backend.takes_pytorch()
        ctx.set_materialize_grads(False)
        return output, preactivation

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_preactivation: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_output is None and grad_preactivation is None:
            return None, None, None, None, None
        input, weight, saved = ctx.saved_tensors
        batched, activation = ctx.batched, ctx.activation
        wanted = of_input, of_weight, of_bias = internals.wanted(ctx)[:3]
        differentiated = torch.is_grad_enabled() or internals.forward_ad_active()
        with backend.as_its_forward(ctx.auto):
            if grad_output is not None and grad_preactivation is None and not differentiated:
                operands = input if of_weight else None, weight if of_input else None
                gradients = backward_op(grad_output, saved, *operands, of_bias, batched, activation)
                given = (one if want else None for one, want in zip(gradients, wanted, strict=True))
                return *given, None, None
            grad = grad_preactivation
            if grad_output is not None:
                through = GRADIENTS[activation](grad_output, saved)
                grad = through if grad is None else through + grad
            assert grad is not None
            return *wanted_gradients(grad, input, weight, wanted, batched), None, None

    @staticmethod
    def jvp(
        ctx: Any,
        input_tangent: Tensor | None,
        weight_tangent: Tensor | None,
        bias_tangent: Tensor | None,
        activation_tangent: None,
        compute_tangent: None,
    ) -> tuple[Tensor | None, Tensor | None]:
        with internals.next_level_in_forward_mode(*ctx.saved_tensors) as (input, weight, saved):
            tangent = tangent_of(
                input, weight, ctx.batched, input_tangent, weight_tangent, bias_tangent
            )
            if tangent is None:
                return None, None
            # The derivative is elementwise: it takes a tangent forward as a gradient back.
            output_tangent = GRADIENTS[ctx.activation](tangent, saved)
        return output_tangent, None if ctx.activation in FROM_OUTPUT else tangent


def _differentiated(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return internals.forward_ad_active() or (
        torch.is_grad_enabled()
        and (
            weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad)
        )
    )


def _recorded(
    plain: bool, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    compute = implementations.activation_forward if plain else _below_autograd
    operands = (input, weight, bias)
    return internals.apply(LinearActivationFunction, *operands, activation, compute)


def _autograd(
    keys: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    plain = not keys.raw_repr() & internals.BEYOND_PLAIN
    if _differentiated(input, weight, bias):
        return _recorded(plain, input, weight, bias, activation)[0]
    if plain:
        return implementations.activation_output(input, weight, bias, activation)
    with internals.below_autograd():
        return linear_activation_op(input, weight, bias, activation)


def _forward_autograd(
    keys: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    plain = not keys.raw_repr() & internals.BEYOND_PLAIN
    if _differentiated(input, weight, bias):
        return _recorded(plain, input, weight, bias, activation)
    with internals.below_autograd():
        return forward_op(input, weight, bias, activation)


def _backward_autograd(
    keys: Any,
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool,
    activation: str,
) -> Gradients:
    operands = [tensor for tensor in (grad_output, saved, input, weight) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        grad = GRADIENTS[activation](grad_output, saved)
        return gradients_of(grad, input, weight, bias, batched)
    if not keys.raw_repr() & internals.BEYOND_PLAIN:
        return implementations.activation_backward(
            grad_output, saved, input, weight, bias, batched, activation
        )
    with internals.below_autograd():
        return backward_op(grad_output, saved, input, weight, bias, batched, activation)


LIBRARY.impl("linear_activation", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("linear_activation_forward", _forward_autograd, "Autograd", with_keyset=True)
LIBRARY.impl("linear_activation_backward", _backward_autograd, "Autograd", with_keyset=True)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, int]:
    input, weight, bias, restore = as_layers(info, in_dims[:3], input, weight, bias)
    return restore(linear_activation_op(input, weight, bias, activation)), 0


def _forward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    input, weight, bias, restore = as_layers(info, in_dims[:3], input, weight, bias)
    output, preactivation = forward_op(input, weight, bias, activation)
    if activation in FROM_OUTPUT:
        return (restore(output), preactivation), (0, None)
    return (restore(output), restore(preactivation)), (0, 0)


def _backward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool,
    activation: str,
) -> tuple[Gradients, tuple[int | None, ...]]:
    grad = GRADIENTS[activation](
        to_front(grad_output, in_dims[0], info.batch_size),
        to_front(saved, in_dims[1], info.batch_size),
    )
    dims = (0, *in_dims[2:4], None, None)
    return linear_backward_vmap(info, dims, grad, input, weight, bias, batched)


torch.library.register_vmap(linear_activation_op, _vmap, lib=LIBRARY)
torch.library.register_vmap(forward_op, _forward_vmap, lib=LIBRARY)
torch.library.register_vmap(backward_op, _backward_vmap, lib=LIBRARY)
register_autocast(linear_activation_op)

for _entry in (
    implementations.activation_output,
    implementations.activation_forward,
    implementations.activation_backward,
    LinearActivationFunction.backward,
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
    register_flop_formula([ops.linear_activation, ops.linear_activation_forward])(linear_flops)
    register_flop_formula(ops.linear_activation_backward)(
        lambda grad_output, saved, input, weight, *others, **options: linear_backward_flops(
            grad_output, input, weight
        )
    )


internals.when_imported("torch.utils.flop_counter", _register_flop_formulas)
