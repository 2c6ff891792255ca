"""What the torch ops run: the kernels, in the settings that are in force, or PyTorch.

PyTorch where a table says so; the ops of gated pairs know no tables.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear import backend
from fastlinear.choice import way
from fastlinear.choice.table import LIBRARIES, PYTORCH
from fastlinear.elementwise import ACTIVATIONS, GRADIENTS
from fastlinear.kernels.operands import (
    FROM_OUTPUT,
    check_backward_shapes,
    check_gated_backward_shapes,
    check_saved_shape,
)

Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _of_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Any:
    """What a table says of the output; None for the kernel that the launcher chooses."""
    if not backend.by_tables():
        return None
    return way.of_output(input, weight, bias, activation)


def straight(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Functions of operands like these that do at once what the ops would come to do.

    The first gives the output, the second is what the ops' Functions compute by.
    """
    candidate = _of_output(input, weight, bias, activation)
    if activation is not None:
        output = functools.partial(_activation_output, candidate, activation=activation)
        return output, functools.partial(_activation_forward, candidate)
    if isinstance(candidate, str):
        return (functools.partial(_forward, candidate),) * 2
    kernels = backend.launchers().forward
    plan = kernels.plan_forward(
        kernels.launch.describe(input, weight, bias),
        backend.float32_precision(),
        None,
        False,
        candidate,
        backend.invariant,
    )
    by_plan = not plan.copy_input and plan.launch.launch.grid != (0,)
    return (kernels.as_planned(plan) if by_plan else forward,) * 2


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `linear` by the kernels, or by PyTorch where a table says so."""
    return _forward(_of_output(input, weight, bias), input, weight, bias)


def _forward(candidate: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(candidate, str):
        return _by_pytorch(candidate, input, weight, bias)
    return backend.launchers().forward.linear_forward(
        input,
        weight,
        bias,
        precision=backend.float32_precision(),
        config=candidate,
        batch_invariant=backend.invariant,
    )


def _by_pytorch(
    candidate: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    """By F.linear, or by what else PyTorch has."""
    if candidate in LIBRARIES:
        output = LIBRARIES[candidate].output(input, weight, bias, activation)
    else:
        output = _product(input, weight, bias)
        if activation is not None:
            output = ACTIVATIONS[activation](output)
    # A view could not change in place, were it the output of a Function.
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() == 2:
        return F.linear(input, weight, bias)
    if bias is None:
        return torch.bmm(input, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), input, weight.mT)


def backward(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool, batched: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `linear_backward` by the kernels, or by PyTorch where a table says so.

    A gradient that is not wanted is not computed, and comes back empty.
    """
    _check_backward_shapes(grad_output, input, weight, batched)
    return _backward(grad_output, input, weight, bias, batched)


def _backward(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool, batched: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: Any = None
    if backend.by_tables():
        if not batched:
            gradients = _gradients_by_rows(grad_output, input, weight, bias)
        elif backend.takes_pytorch():
            gradients = _gradients_by_pytorch(grad_output, input, weight)
    if gradients is None:
        gradients = backend.launchers().backward.linear_backward(
            grad_output,
            input,
            weight,
            bias,
            batched=batched,
            precision=backend.float32_precision(),
            batch_invariant=backend.invariant,
        )
    return _with_empty(grad_output, gradients, bias, batched)


def _as_they_are(device_type: str) -> AbstractContextManager[object]:
    """Lets PyTorch's products take operands as they are: a backward may run under autocast."""
    if not internals.autocasting() or backend.autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _gradients_by_pytorch(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None
) -> Sequence[Tensor | None]:
    """Those of B layers, without their bias's."""
    with _as_they_are(grad_output.device.type):
        grad_input = None if weight is None else torch.bmm(grad_output, weight)
        return grad_input, None if input is None else torch.bmm(grad_output.mT, input), None


def _gradients_by_rows(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool
) -> Sequence[Tensor | None] | None:
    """The gradients as tables say; None where they say nothing of them."""
    all_pytorchs = backend.takes_pytorch() and not way.any_gradients(grad_output.device)
    if weight is not None and input is not None and not all_pytorchs:
        pair = way.of_pair(grad_output, input, weight, bias)
        if pair is not None:
            precision = backend.float32_precision()
            together = backend.launchers().backward.linear_backward
            return together(grad_output, input, weight, bias, precision=precision, config=pair)
    operand = weight if weight is not None else input
    if operand is None:
        return (None, None, None) if backend.takes_pytorch() else None
    n, k = grad_output.shape[-1], operand.shape[-1]
    of_input = of_weight = PYTORCH if all_pytorchs else None
    if weight is not None and not all_pytorchs:
        of_input = way.of_product("grad_input", grad_output, weight, n, k)
    if input is not None and not all_pytorchs:
        of_weight = way.of_product("grad_weight", grad_output, input, n, k, bias=bias)
    if of_input is None and of_weight is None:
        return None
    grad_input = grad_weight = grad_bias = None
    with _as_they_are(grad_output.device.type):
        if of_input in LIBRARIES and weight is not None:
            grad_input = LIBRARIES[of_input].grad_input(grad_output, weight)
        elif of_input == PYTORCH and weight is not None:
            grad_input = torch.matmul(grad_output, weight)
        if of_weight in LIBRARIES and input is not None:
            grad_weight, grad_bias = LIBRARIES[of_weight].grad_weight(grad_output, input, bias)
        elif of_weight == PYTORCH and input is not None:
            m = input.shape[:-1].numel()
            grad_weight = grad_output.reshape(m, n).mT @ input.reshape(m, k)
            grad_bias = sum_rows(grad_output, batched=False) if bias else None
    precision = backend.float32_precision()
    if not isinstance(of_input, str) and weight is not None:
        grad_input = backend.launchers().backward.linear_backward_input(
            grad_output, weight, precision=precision, config=of_input
        )
    if not isinstance(of_weight, str) and input is not None:
        grad_weight, grad_bias = backend.launchers().backward_weight.linear_backward_weight(
            grad_output, input, bias, precision=precision, config=of_weight
        )
    return grad_input, grad_weight, grad_bias


def _check_backward_shapes(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, batched: bool
) -> None:
    check_backward_shapes(
        grad_output.shape,
        None if input is None else input.shape,
        None if weight is None else weight.shape,
        batched,
    )


def _with_empty(
    grad_output: Tensor, gradients: Sequence[Tensor | None], bias: bool, batched: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, with an empty tensor in the place of each that is not wanted."""
    grad_input, grad_weight, grad_bias = gradients
    if bias and grad_bias is None:
        # No grad_weight pass to ride on (frozen weight):
        # one read of grad_output is all there is to do.
        grad_bias = sum_rows(grad_output, batched)
    return (
        grad_output.new_empty(0) if grad_input is None else grad_input,
        grad_output.new_empty(0) if grad_weight is None else grad_weight,
        grad_output.new_empty(0) if grad_bias is None else grad_bias,
    )


def activation_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The op `linear_activation` by the kernels, or by PyTorch where a table says so."""
    candidate = _of_output(input, weight, bias, activation)
    return _activation_output(candidate, input, weight, bias, activation)


def _activation_output(
    candidate: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    if isinstance(candidate, str):
        return _by_pytorch(candidate, input, weight, bias, activation)
    return _activated_by_kernel(candidate, input, weight, bias, activation, False)[0]


def activation_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The op `linear_activation_forward`, as `activation_output`.

    The pre-activation comes back empty where the derivative is taken from the output.
    """
    candidate = _of_output(input, weight, bias, activation)
    return _activation_forward(candidate, input, weight, bias, activation)


def _activation_forward(
    candidate: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    keep = activation not in FROM_OUTPUT
    preactivation: Tensor | None = None
    if not isinstance(candidate, str):
        output, preactivation = _activated_by_kernel(
            candidate, input, weight, bias, activation, keep
        )
    elif keep:
        preactivation = _by_pytorch(candidate, input, weight, bias)
        output = ACTIVATIONS[activation](preactivation)
    else:
        output = _by_pytorch(candidate, input, weight, bias, activation)
    return output, output.new_empty(0) if preactivation is None else preactivation


def _activated_by_kernel(
    config: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output and, if it is to be kept, the pre-activation."""
    return backend.launchers().forward.linear_activation_forward(
        input,
        weight,
        bias,
        activation,
        keep,
        precision=backend.float32_precision(),
        config=config,
        batch_invariant=backend.invariant,
    )


def activation_backward(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `linear_activation_backward` by the kernels, as `backward`."""
    _check_backward_shapes(grad_output, input, weight, batched)
    check_saved_shape(saved.shape, grad_output.shape)
    if backend.by_tables():
        grad = _grad_preactivation(grad_output, saved, activation)
        return _backward(grad, input, weight, bias, batched)
    *gradients, grad = backend.launchers().activation.linear_activation_backward(
        grad_output,
        saved,
        input,
        weight,
        bias,
        activation,
        batched=batched,
        precision=backend.float32_precision(),
        batch_invariant=backend.invariant,
    )
    return _with_empty(grad, gradients, bias, batched)


def _grad_preactivation(grad_output: Tensor, saved: Tensor, activation: str) -> Tensor:
    if backend.takes_pytorch() and grad_output.device.type == "cpu":
        if activation == "silu":  # which has no derivative, and needs none here
            return torch.ops.aten.silu_backward(grad_output, saved)
        return GRADIENTS[activation](grad_output, saved)
    kernels = backend.launchers().activation
    return kernels.activation_backward(grad_output, saved.contiguous(), activation)


def gated_output(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """The op `gated_linear` by the kernels."""
    operands = (input, gate_weight, up_weight, gate_bias, up_bias)
    kernels, precision = backend.launchers().gated, backend.float32_precision()
    return kernels.gated_linear_forward(
        *operands, activation, False, precision=precision, batch_invariant=backend.invariant
    )[0]


def gated_forward(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `gated_linear_forward` by the kernels."""
    operands = (input, gate_weight, up_weight, gate_bias, up_bias)
    kernels, precision = backend.launchers().gated, backend.float32_precision()
    return kernels.gated_linear_forward(
        *operands, activation, True, precision=precision, batch_invariant=backend.invariant
    )


def gated_backward(
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    input: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    bias: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `gated_linear_backward` by the kernels, as `backward`."""
    operands = (grad_output, gate, up, input, gate_weight, up_weight)
    check_gated_backward_shapes(*(None if one is None else one.shape for one in operands))
    *gradients, grad_products = backend.launchers().gated_backward.gated_linear_backward(
        *operands,
        bias,
        activation,
        precision=backend.float32_precision(),
        batch_invariant=backend.invariant,
    )
    return _with_empty(grad_products, gradients, bias, False)


def sum_rows(grad_output: Tensor, batched: bool) -> Tensor:
    """grad_bias by PyTorch: the sum over every dimension but features, and layers if batched."""
    if batched:
        return grad_output.sum(1)
    leading = tuple(range(grad_output.dim() - 1))
    # sum(()) would sum everything.
    return grad_output.sum(leading) if leading else grad_output.clone()
