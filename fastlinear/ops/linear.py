"""The torch ops behind the layer, with and without an activation, and their derivatives.

`fastlinear::linear` takes one layer, input (*, K), weight (N, K), bias (N,), or B layers at once,
input (B, M, K), weight (B, N, K), bias (B, N). The second form closes it: its derivatives, and vmap
over any operand, are calls of the same op. `fastlinear::linear_backward` computes the gradients
together where no graph of them is wanted: grad_input if weight is given, grad_weight if input is,
grad_bias if asked for, and an empty tensor in the place of each of the others.

`fastlinear::linear_activation` is a layer with its activation,
`fastlinear::linear_activation_backward` computes its gradients, as above, and
`fastlinear::linear_activation_forward` also gives the pre-activation, where a derivative needs it:
an output in its own right, so that derivatives of derivatives flow back through it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear.choice import known, running
from fastlinear.kernels.launching.operands import (
    ACTIVATED,
    BACKWARD,
    BACKWARD_BATCHED,
    FROM_OUTPUT,
    LAYER,
    check_activation,
    check_same_kind,
    check_shapes,
)
from fastlinear.ops import implementations
from fastlinear.ops.batching import InDims, as_layers, to_front
from fastlinear.ops.elementwise import GRADIENTS
from fastlinear.ops.op import define, recorded, register

Gradients = tuple[Tensor, Tensor, Tensor]

_OPERANDS = "Tensor input, Tensor weight, Tensor? bias"
_FOR_BACKWARD = "Tensor? input, Tensor? weight, bool bias, bool batched"
linear_op = define(f"linear({_OPERANDS}) -> Tensor")
linear_backward_op = define(
    f"linear_backward(Tensor grad_output, {_FOR_BACKWARD}) -> (Tensor, Tensor, Tensor)"
)
linear_activation_op = define(f"linear_activation({_OPERANDS}, str activation) -> Tensor")
activation_forward_op = define(
    f"linear_activation_forward({_OPERANDS}, str activation) -> (Tensor, Tensor)"
)
activation_backward_op = define(
    f"linear_activation_backward(Tensor grad_output, Tensor saved, {_FOR_BACKWARD},"
    " str activation) -> (Tensor, Tensor, Tensor)"
)


def linear_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    check_activation(activation)
    check_same_kind(input=input, weight=weight, bias=bias)
    check_shapes("linear", LAYER, *implementations.shapes_of(input, weight, bias))
    return input.new_empty((*input.shape[:-1], weight.shape[-2]))


def _forward_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    output = linear_fake(input, weight, bias, activation)
    return output, output.new_empty(0 if activation in FROM_OUTPUT else output.shape)


def linear_backward_fake(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool, batched: bool
) -> Gradients:
    check_same_kind(grad_output=grad_output, input=input, weight=weight)
    taken = BACKWARD_BATCHED if batched else BACKWARD
    check_shapes("linear_backward", taken, *implementations.shapes_of(grad_output, input, weight))
    layers = grad_output.shape[:1] if batched else ()
    out_features = grad_output.shape[-1]
    return (
        grad_output.new_empty(0 if weight is None else (*grad_output.shape[:-1], weight.shape[-1])),
        grad_output.new_empty(0 if input is None else (*layers, out_features, input.shape[-1])),
        grad_output.new_empty((*layers, out_features) if bias else 0),
    )


def _activation_backward_fake(grad_output: Tensor, saved: Tensor, *others: Any) -> Gradients:
    *operands, activation = others
    check_activation(activation)
    check_same_kind(grad_output=grad_output, saved=saved)
    check_shapes("linear_activation_backward", ACTIVATED, grad_output.shape, saved.shape)
    return linear_backward_fake(grad_output, *operands)


class LinearFunction(internals.SingleLevelFunction):
    """Derivatives of the ops, in terms of the ops: of the output, and of the pre-activation."""

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., Any],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None = None,
    ) -> Any:
        saved = None
        if activation is None:
            results = compute(input, weight, bias)
        else:
            results = output, saved = compute(input, weight, bias, activation)
            if activation in FROM_OUTPUT:
                ctx.mark_non_differentiable(saved)  # the pre-activation, which is empty
                saved = output
            ctx.activation = activation
        needed = ctx.needs_input_grad
        # Each operand is kept for the other's gradient alone,
        # so that what is not kept may change in place.
        ctx.save_for_backward(input if needed[2] else None, weight if needed[1] else None, saved)
        if weight.dim() == 3:
            ctx.batched = True  # to set an attribute takes 0.1 us: of a single layer there is none
        if internals.forward_ad_active():
            ctx.save_for_forward(input, weight, saved)
        if known.seen:
            ctx.auto = running.takes_pytorch()
        ctx.set_materialize_grads(False)  # no gradient of the output is none of a parameter either
        return results

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_preactivation: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        activation: Any = getattr(ctx, "activation", None)
        of_activation = () if activation is None else (None,)
        if grad_output is None and grad_preactivation is None:
            return None, None, None, None, *of_activation
        input, weight, saved = ctx.saved_tensors
        if grad_preactivation is not None:
            through = None if grad_output is None else GRADIENTS[activation](grad_output, saved)
            # Which is through the activation already.
            grad_output, activation = added(through, grad_preactivation), None
        wanted, batched = internals.wanted(ctx)[1:4], getattr(ctx, "batched", False)
        arguments = (grad_output, input, weight, wanted, batched, saved, activation)
        if not known.seen:
            return None, *wanted_gradients(*arguments), *of_activation
        with running.as_its_forward(getattr(ctx, "auto", False)):
            return None, *wanted_gradients(*arguments), *of_activation

    @staticmethod
    def jvp(
        ctx: Any,
        _: None,
        input_tangent: Tensor | None,
        weight_tangent: Tensor | None,
        bias_tangent: Tensor | None,
        *of_activation: None,
    ) -> Any:
        activation = getattr(ctx, "activation", None)
        with internals.next_level_in_forward_mode(*ctx.saved_tensors) as (input, weight, saved):
            tangent = tangent_of(input, weight, input_tangent, weight_tangent, bias_tangent)
            if activation is None:
                return tangent
            if tangent is None:
                return None, None
            # The derivative is elementwise: it takes a tangent forward as a gradient back.
            output_tangent = GRADIENTS[activation](tangent, saved)
        return output_tangent, None if activation in FROM_OUTPUT else tangent


def added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Their sum; None counts as zeros."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def tangent_of(
    input: Tensor,
    weight: Tensor,
    input_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
) -> Tensor | None:
    """The tangent of `linear`'s output from those of its operands; None where they have none."""
    tangent = None
    if input_tangent is not None:
        tangent = linear_op(input_tangent, weight, bias_tangent)
    if weight_tangent is not None:
        once = bias_tangent if tangent is None else None
        tangent = added(tangent, linear_op(input, weight_tangent, once))
    if tangent is None and bias_tangent is not None:
        rows = bias_tangent.unsqueeze(1) if weight.dim() == 3 else bias_tangent
        tangent = rows.expand(*input.shape[:-1], weight.shape[-2]).clone()
    return tangent


def wanted_gradients(
    grad_output: Tensor | None,
    input: Tensor | None,
    weight: Tensor | None,
    wanted: Sequence[bool],
    batched: bool,
    saved: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`gradients_of`, with None for those of input, weight and bias that are not wanted.

    All are None where grad_output is.
    """
    if grad_output is None:
        return None, None, None
    of_input, of_weight, of_bias = wanted
    operands = input if of_weight else None, weight if of_input else None
    grad_input, grad_weight, grad_bias = gradients_of(
        grad_output, *operands, of_bias, batched, saved, activation
    )
    return (
        grad_input if of_input else None,
        grad_weight if of_weight else None,
        grad_bias if of_bias else None,
    )


def gradients_of(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool,
    saved: Tensor | None = None,
    activation: str | None = None,
) -> Gradients:
    """`linear_backward`, or `linear_activation_backward`, fused or as differentiable ops.

    Differentiable ops are taken where the gradients' own gradients are wanted.
    """
    if not (torch.is_grad_enabled() or internals.forward_ad_active()):
        if activation is None:
            return linear_backward_op(grad_output, input, weight, bias, batched)
        operands = input, weight
        return activation_backward_op(grad_output, saved, *operands, bias, batched, activation)
    if activation is not None:
        assert saved is not None
        grad_output = GRADIENTS[activation](grad_output, saved)
    grad_input = grad_weight = grad_bias = grad_output.new_empty(0)
    if weight is not None:
        grad_input = linear_op(grad_output, weight.mT, None)
    if input is not None:
        grad_rows = grad_output
        if not batched:
            # Not reshape(-1, ...): that is ambiguous where a feature dimension is 0.
            rows = math.prod(grad_output.shape[:-1])
            input = input.reshape(rows, input.shape[-1])
            grad_rows = grad_output.reshape(rows, grad_output.shape[-1])
        grad_weight = linear_op(grad_rows.mT, input.mT, None)
    if bias:
        grad_bias = implementations.sum_rows(grad_output, batched)
    return grad_input, grad_weight, grad_bias


def linear_vmap(info: Any, in_dims: InDims, *arguments: Any) -> tuple[Tensor, int]:
    *operands, restore = as_layers(info, in_dims, *arguments[:3])
    op = linear_op if len(arguments) == 3 else linear_activation_op
    return restore(op(*operands, *arguments[3:])), 0


def _forward_vmap(
    info: Any, in_dims: InDims, *arguments: Any
) -> tuple[tuple[Tensor, Tensor], InDims]:
    *operands, restore = as_layers(info, in_dims, *arguments[:3])
    output, preactivation = activation_forward_op(*operands, arguments[3])
    if arguments[3] in FROM_OUTPUT:
        return (restore(output), preactivation), (0, None)
    return (restore(output), restore(preactivation)), (0, 0)


def linear_backward_vmap(
    info: Any,
    in_dims: InDims,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool,
) -> tuple[Gradients, InDims]:
    grad_dim, input_dim, weight_dim = in_dims[:3]
    grad_output = to_front(grad_output, grad_dim, info.batch_size)
    grad_input = grad_weight = grad_bias = grad_output.new_empty(0)
    if weight is not None:
        transposed = weight.mT if weight_dim is None else weight.movedim(weight_dim, 0).mT
        dims = (0, None if weight_dim is None else 0, None)
        grad_input, _ = linear_vmap(info, dims, grad_output, transposed, None)
    # Each sample is a layer, or as many as it has.
    layers = grad_output.shape[: 2 if batched else 1]
    rows = math.prod(grad_output.shape[len(layers) : -1])
    grad_rows = grad_output.reshape(math.prod(layers), rows, grad_output.shape[-1])
    if input is not None:
        input = to_front(input, input_dim, info.batch_size)
        input_rows = input.reshape(math.prod(layers), rows, input.shape[-1])
        grad_weight = linear_op(grad_rows.mT, input_rows.mT, None)
        grad_weight = grad_weight.reshape(*layers, *grad_weight.shape[1:])
    if bias:
        grad_bias = grad_rows.sum(1).reshape(*layers, grad_output.shape[-1])
    given = (weight is not None, input is not None, bias)
    return (grad_input, grad_weight, grad_bias), tuple(0 if one else None for one in given)


def _activation_backward_vmap(
    info: Any, in_dims: InDims, grad_output: Tensor, saved: Tensor, *others: Any
) -> tuple[Gradients, InDims]:
    *operands, activation = others
    grad = GRADIENTS[activation](
        to_front(grad_output, in_dims[0], info.batch_size),
        to_front(saved, in_dims[1], info.batch_size),
    )
    return linear_backward_vmap(info, (0, *in_dims[2:]), grad, *operands)


def linear_flops(input: Any, weight: Any, *others: Any, **options: Any) -> int:
    """Of a forward product, by the shapes of its operands."""
    return 2 * math.prod(input) * weight[-2]


def linear_backward_flops(
    grad_output: Any, input: Any, weight: Any, *others: Any, **options: Any
) -> int:
    """Of the products of a backward, by the shapes of their operands."""
    grad_input = 0 if weight is None else 2 * math.prod(grad_output) * weight[-1]
    grad_weight = 0 if input is None else 2 * math.prod(grad_output) * input[-1]
    return grad_input + grad_weight


_activation_recorded = recorded(
    LinearFunction, activation_forward_op, implementations.activation_forward
)
for _op, _record in (
    (linear_op, recorded(LinearFunction, linear_op, implementations.forward)),
    (linear_activation_op, lambda *arguments: _activation_recorded(*arguments)[0]),
):
    register(
        _op,
        compute=implementations.forward,
        fake=linear_fake,
        record=_record,
        vmap=linear_vmap,
        flops=linear_flops,
        autocast=3,
    )
register(
    activation_forward_op,
    compute=implementations.activation_forward,
    fake=_forward_fake,
    record=_activation_recorded,
    vmap=_forward_vmap,
    flops=linear_flops,
)
register(
    linear_backward_op,
    compute=implementations.backward,
    fake=linear_backward_fake,
    record=lambda plain, *arguments: gradients_of(*arguments),
    tangents=False,
    vmap=linear_backward_vmap,
    flops=linear_backward_flops,
)
register(
    activation_backward_op,
    compute=implementations.activation_backward,
    fake=_activation_backward_fake,
    record=lambda plain, grad_output, saved, *others: gradients_of(
        GRADIENTS[others[-1]](grad_output, saved), *others[:-1]
    ),
    tangents=False,
    vmap=_activation_backward_vmap,
    flops=lambda grad_output, saved, *others, **options: linear_backward_flops(
        grad_output, *others
    ),
)
