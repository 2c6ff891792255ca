"""The torch ops behind the layer.

Schemas, shapes, derivatives of every order, vmap, autocast, operation counts.

`fastlinear::linear` takes one layer, input (*, K), weight (N, K), bias (N,), or B layers at once,
input (B, M, K), weight (B, N, K), bias (B, N). The second form closes it: its derivatives, and vmap
over any operand, are calls of the same op. `fastlinear::linear_backward` computes the gradients
together where no graph of them is wanted: grad_input if weight is given, grad_weight if input is,
grad_bias if asked for, and an empty tensor in the place of each of the others.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear import backend, implementations
from fastlinear.choice import known
from fastlinear.kernels.operands import (
    DTYPES,
    check_backward_shapes,
    check_forward_shapes,
    check_same_kind,
)

Gradients = tuple[Tensor, Tensor, Tensor]
Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]

LIBRARY = torch.library.Library("fastlinear", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
# No default for bias: the dispatcher drops arguments that equal their default,
# and vmap rules would miss them.
LIBRARY.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", tags=TAGS)
LIBRARY.define(
    "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool bias, bool batched)"
    " -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
linear_op = torch.ops.fastlinear.linear.default
linear_backward_op = torch.ops.fastlinear.linear_backward.default

for _device in ("CPU", "CUDA"):
    LIBRARY.impl("linear", implementations.forward, _device)
    LIBRARY.impl("linear_backward", implementations.backward, _device)


@torch.library.register_fake(linear_op, lib=LIBRARY)
def linear_fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_same_kind(input=input, weight=weight, bias=bias)
    check_forward_shapes(input.shape, weight.shape, None if bias is None else bias.shape)
    return input.new_empty((*input.shape[:-1], weight.shape[-2]))


@torch.library.register_fake(linear_backward_op, lib=LIBRARY)
def linear_backward_fake(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool, batched: bool
) -> Gradients:
    check_same_kind(grad_output=grad_output, input=input, weight=weight)
    check_backward_shapes(
        grad_output.shape,
        None if input is None else input.shape,
        None if weight is None else weight.shape,
        batched,
    )
    layers = grad_output.shape[:1] if batched else ()
    out_features = grad_output.shape[-1]
    return (
        grad_output.new_empty(0 if weight is None else (*grad_output.shape[:-1], weight.shape[-1])),
        grad_output.new_empty(0 if input is None else (*layers, out_features, input.shape[-1])),
        grad_output.new_empty((*layers, out_features) if bias else 0),
    )


def _below_autograd(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with internals.below_autograd():
        if internals.transforming():
            with internals.next_level_differentiates():
                return linear_op(input, weight, bias)
        return linear_op(input, weight, bias)


class LinearFunction(internals.SingleLevelFunction):
    """Derivatives of the op, each in terms of the op."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, compute: Compute
    ) -> Tensor:
        needed = ctx.needs_input_grad
        # Each operand is kept for the other's gradient alone,
        # so that what is not kept may change in place.
        ctx.save_for_backward(input if needed[1] else None, weight if needed[0] else None)
        if weight.dim() == 3:
            ctx.batched = True  # to set an attribute takes 0.1 us: of a single layer there is none
        if internals.forward_ad_active():
            ctx.save_for_forward(input, weight)
        if known.seen:
            ctx.auto = backend.takes_pytorch()
        ctx.set_materialize_grads(False)  # no gradient of the output is none of a parameter either
        return compute(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        input, weight = ctx.saved_tensors
        wanted, batched = internals.wanted(ctx), getattr(ctx, "batched", False)
        if not known.seen:
            return *wanted_gradients(grad_output, input, weight, wanted, batched), None
        with backend.as_its_forward(getattr(ctx, "auto", False)):
            return *wanted_gradients(grad_output, input, weight, wanted, batched), None

    @staticmethod
    def jvp(
        ctx: Any,
        input_tangent: Tensor | None,
        weight_tangent: Tensor | None,
        bias_tangent: Tensor | None,
        compute_tangent: None,
    ) -> Tensor | None:
        with internals.next_level_in_forward_mode(*ctx.saved_tensors) as (input, weight):
            batched = getattr(ctx, "batched", False)
            return tangent_of(input, weight, batched, input_tangent, weight_tangent, bias_tangent)


def tangent_of(
    input: Tensor,
    weight: Tensor,
    batched: bool,
    input_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
) -> Tensor | None:
    """The tangent of `linear`'s output from those of its operands; None where they have none."""
    tangent = None
    if input_tangent is not None:
        tangent = linear_op(input_tangent, weight, bias_tangent)
    if weight_tangent is not None:
        through_weight = linear_op(input, weight_tangent, bias_tangent if tangent is None else None)
        tangent = through_weight if tangent is None else tangent + through_weight
    if tangent is None and bias_tangent is not None:
        rows = bias_tangent.unsqueeze(1) if batched else bias_tangent
        tangent = rows.expand(*input.shape[:-1], weight.shape[-2]).clone()
    return tangent


def wanted_gradients(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    wanted: Sequence[bool],
    batched: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`gradients_of`, with None for those of input, weight and bias that are not wanted."""
    of_input, of_weight, of_bias = wanted[:3]
    grad_input, grad_weight, grad_bias = gradients_of(
        grad_output, input if of_weight else None, weight if of_input else None, of_bias, batched
    )
    return (
        grad_input if of_input else None,
        grad_weight if of_weight else None,
        grad_bias if of_bias else None,
    )


def gradients_of(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool, batched: bool
) -> Gradients:
    """`linear_backward`, as one fused op or as differentiable ops.

    Differentiable ops are taken where the gradients' own gradients are wanted.
    """
    if not (torch.is_grad_enabled() or internals.forward_ad_active()):
        return linear_backward_op(grad_output, input, weight, bias, batched)
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


# The Autograd key's kernels. Where nothing between them and the device's kernel wants the call they
# go there at once: a second pass through the dispatcher takes as long as F.linear's whole forward.


def _linear_autograd(keys: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    differentiated = internals.forward_ad_active() or (
        torch.is_grad_enabled()
        and (
            weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad)
        )
    )
    plain = not keys.raw_repr() & internals.BEYOND_PLAIN
    if differentiated:
        compute = implementations.forward if plain else _below_autograd
        return internals.apply(LinearFunction, input, weight, bias, compute)
    if plain:
        return implementations.forward(input, weight, bias)
    with internals.below_autograd():
        return linear_op(input, weight, bias)


def _linear_backward_autograd(
    keys: Any,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool,
) -> Gradients:
    operands = [tensor for tensor in (grad_output, input, weight) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        return gradients_of(grad_output, input, weight, bias, batched)
    if not keys.raw_repr() & internals.BEYOND_PLAIN:
        return implementations.backward(grad_output, input, weight, bias, batched)
    with internals.below_autograd():
        return linear_backward_op(grad_output, input, weight, bias, batched)


LIBRARY.impl("linear", _linear_autograd, "Autograd", with_keyset=True)
LIBRARY.impl("linear_backward", _linear_backward_autograd, "Autograd", with_keyset=True)


def to_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """`tensor` with its vmapped dimension first.

    Where it has none, it gets a first dimension of stride 0.
    """
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def as_layers(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Operands without the vmapped dimension, which has become, or joined, rows or layers.

    With them comes what gives their output that dimension back, in front.
    """
    input_dim, weight_dim, bias_dim = in_dims
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


def linear_vmap(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, int]:
    input, weight, bias, restore = as_layers(info, in_dims, input, weight, bias)
    return restore(linear_op(input, weight, bias)), 0


def linear_backward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool,
) -> tuple[Gradients, tuple[int | None, ...]]:
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


torch.library.register_vmap(linear_op, linear_vmap, lib=LIBRARY)
torch.library.register_vmap(linear_backward_op, linear_backward_vmap, lib=LIBRARY)


def _cast(tensor: Tensor | None, device_type: str) -> Tensor | None:
    if tensor is None or tensor.dtype not in DTYPES:
        return tensor
    dtype = backend.dtype_under(torch.get_autocast_dtype(device_type), tensor.dtype)
    return internals.autocast_copy(tensor, dtype)


def register_autocast(op: torch._ops.OpOverload, operands: int = 3) -> None:
    """Casts the first `operands` arguments of `op`, as autocast does those of F.linear."""
    for device_type, key in (
        ("cpu", internals.DispatchKey.AutocastCPU),
        ("cuda", internals.DispatchKey.AutocastCUDA),
    ):

        def cast_and_call(
            *arguments: Any,
            device_type: str = device_type,
            key: internals.DispatchKey = key,
        ) -> Any:
            cast = [_cast(operand, device_type) for operand in arguments[:operands]]
            with internals.excluding(key):
                return op(*cast, *arguments[operands:])

        internals.hide_from_dynamo(cast_and_call)
        LIBRARY.impl(op, cast_and_call, key.name)


register_autocast(linear_op)


for _entry in (
    implementations.forward,
    implementations.backward,
    LinearFunction.backward,
    _linear_autograd,
    _linear_backward_autograd,
    linear_vmap,
    linear_backward_vmap,
):
    internals.hide_from_dynamo(_entry)


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


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.fastlinear.linear)(linear_flops)
    register_flop_formula(torch.ops.fastlinear.linear_backward)(linear_backward_flops)


internals.when_imported("torch.utils.flop_counter", _register_flop_formulas)
