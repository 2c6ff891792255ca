"""What the torch ops run: the kernels, in the settings that are in force, or PyTorch.

PyTorch where a table says so.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear.choice import backend, way
from fastlinear.choice.table import LIBRARIES, PYTORCH
from fastlinear.kernels.launching.operands import (
    FROM_OUTPUT,
    check_backward_shapes,
    check_gated_backward_shapes,
    check_saved_shape,
)
from fastlinear.ops.elementwise import ACTIVATIONS, GRADIENTS

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


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
        output = functools.partial(_output, candidate, activation=activation)
        return output, functools.partial(_with_preactivation, candidate)
    if isinstance(candidate, str):
        return (functools.partial(_output, candidate),) * 2
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


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """The ops `linear` and `linear_activation`."""
    candidate = _of_output(input, weight, bias, activation)
    return _output(candidate, input, weight, bias, activation)


def _output(
    candidate: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    if isinstance(candidate, str):
        return _by_pytorch(candidate, input, weight, bias, activation)
    if activation is not None:
        return _activated_by_kernel(candidate, input, weight, bias, activation, False)[0]
    return backend.launchers().forward.linear_forward(
        input,
        weight,
        bias,
        precision=backend.float32_precision(),
        config=candidate,
        batch_invariant=backend.invariant,
    )


def activation_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The op `linear_activation_forward`.

    The pre-activation comes back empty where the derivative is taken from the output.
    """
    candidate = _of_output(input, weight, bias, activation)
    return _with_preactivation(candidate, input, weight, bias, activation)


def _with_preactivation(
    candidate: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    keep, operands = activation not in FROM_OUTPUT, (input, weight, bias)
    preactivation: Tensor | None = None
    if not isinstance(candidate, str):
        output, preactivation = _activated_by_kernel(candidate, *operands, activation, keep)
    elif keep:
        preactivation = _by_pytorch(candidate, *operands)
        output = ACTIVATIONS[activation](preactivation)
    else:
        output = _by_pytorch(candidate, *operands, activation)
    return output, output.new_empty(0) if preactivation is None else preactivation


def _activated_by_kernel(config: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The output and, if the last argument says so, the pre-activation."""
    return backend.launchers().forward.linear_activation_forward(
        *arguments,
        precision=backend.float32_precision(),
        config=config,
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
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool,
    saved: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `linear_backward`, and `linear_activation_backward` of what was saved for it.

    A gradient that is not wanted is not computed, and comes back empty.
    """
    check_backward_shapes(*shapes_of(grad_output, input, weight), batched)
    by_tables, gradients = backend.by_tables(), None
    if saved is not None:
        check_saved_shape(saved.shape, grad_output.shape)
        grad_output = _grad_preactivation(grad_output, saved, activation, by_tables)
    if by_tables:
        if not batched:
            gradients = _gradients_by_rows(grad_output, input, weight, bias)
        elif backend.takes_pytorch():
            gradients = _gradients_by_pytorch(grad_output, input, weight, bias, batched)
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


def activation_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op `linear_activation_backward`."""
    grad_output, saved, *operands, activation = arguments
    return backward(*(grad_output, *operands, saved, activation))


def _grad_preactivation(
    grad_output: Tensor, saved: Tensor, activation: str, by_tables: bool
) -> Tensor:
    """In a pass of its own, whose result both products read, and grad_bias with them.

    Of M x N elements that is five reads and writes in all, and one tensor more while it lasts. To
    take the gradient where each product loads it would spare one of the five, but take it anew for
    every column of tiles.
    """
    if by_tables and backend.takes_pytorch() and grad_output.device.type == "cpu":
        if activation == "silu":  # which has no derivative, and needs none here
            return torch.ops.aten.silu_backward(grad_output, saved)
        return GRADIENTS[activation](grad_output, saved)
    kernels = backend.launchers().activation
    return kernels.activation_backward(grad_output, saved.contiguous(), activation)


def _gradients_by_pytorch(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    batched: bool = False,
    of_input: Any = PYTORCH,
    of_weight: Any = PYTORCH,
) -> Gradients:
    """Of B layers all but their bias's; of one layer that too, if weight's is wanted.

    By `of_input` and `of_weight` where they name a library.
    """
    device_type = grad_output.device.type
    product = torch.bmm if batched else torch.matmul
    # A backward may run under autocast, and products take operands as they are.
    cast = internals.autocasting() and backend.autocast_dtype(device_type) is not None
    with torch.autocast(device_type, enabled=False) if cast else nullcontext():
        grad_input = None
        if of_input in LIBRARIES and weight is not None:
            grad_input = LIBRARIES[of_input].grad_input(grad_output, weight)
        elif weight is not None:
            grad_input = product(grad_output, weight)
        if input is None or batched:
            return grad_input, None if input is None else product(grad_output.mT, input), None
        if of_weight in LIBRARIES:
            return grad_input, *LIBRARIES[of_weight].grad_weight(grad_output, input, bias)
        m = input.shape[:-1].numel()
        grad_columns = grad_output.reshape(m, grad_output.shape[-1]).mT
        grad_weight = grad_columns @ input.reshape(m, input.shape[-1])
        return grad_input, grad_weight, sum_rows(grad_output, batched) if bias else None


def _gradients_by_rows(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool
) -> Gradients | None:
    """The gradients of one layer as tables say; None where they say nothing of them."""
    takes_pytorch = backend.takes_pytorch()
    if takes_pytorch and not way.any_gradients(grad_output.device):
        return _gradients_by_pytorch(grad_output, input, weight, bias)
    precision = backend.float32_precision()
    if weight is not None and input is not None:
        pair = way.of_pair(grad_output, input, weight, bias)
        if pair is not None:
            together = backend.launchers().backward.linear_backward
            return together(grad_output, input, weight, bias, precision=precision, config=pair)
    if weight is None and input is None:
        return (None, None, None) if takes_pytorch else None
    n, of_input, of_weight = grad_output.shape[-1], None, None
    if weight is not None:
        of_input = way.Asked("grad_input", grad_output, weight, n, weight.shape[-1]).candidate()
    if input is not None:
        k = input.shape[-1]
        asked = way.Asked("grad_weight", grad_output, input, n, k, bias=bias)
        of_weight = asked.candidate()
    if of_input is None and of_weight is None:
        return None
    grad_input, grad_weight, grad_bias = _gradients_by_pytorch(
        grad_output,
        input if isinstance(of_weight, str) else None,
        weight if isinstance(of_input, str) else None,
        bias,
        of_input=of_input,
        of_weight=of_weight,
    )
    if not isinstance(of_input, str) and weight is not None:
        grad_input = backend.launchers().backward.linear_backward_input(
            grad_output, weight, precision=precision, config=of_input
        )
    if not isinstance(of_weight, str) and input is not None:
        grad_weight, grad_bias = backend.launchers().backward_weight.linear_backward_weight(
            grad_output, input, bias, precision=precision, config=of_weight
        )
    return grad_input, grad_weight, grad_bias


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


# The ops of gated pairs take the operands, and the activation last, and know no tables.


def gated_output(*arguments: Any) -> Tensor:
    """The op `gated_linear`."""
    kernels, precision = backend.launchers().gated, backend.float32_precision()
    return kernels.gated_linear_forward(
        *arguments, False, precision=precision, batch_invariant=backend.invariant
    )[0]


def gated_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op `gated_linear_forward`."""
    kernels, precision = backend.launchers().gated, backend.float32_precision()
    return kernels.gated_linear_forward(
        *arguments, True, precision=precision, batch_invariant=backend.invariant
    )


def gated_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op `gated_linear_backward`; what is not wanted comes back empty."""
    *operands, bias, activation = arguments
    check_gated_backward_shapes(*shapes_of(*operands))
    kernels, precision = backend.launchers().gated_backward, backend.float32_precision()
    *gradients, grad_products = kernels.gated_linear_backward(
        *operands, bias, activation, precision=precision, batch_invariant=backend.invariant
    )
    return _with_empty(grad_products, gradients, bias, False)


def sum_rows(grad_output: Tensor, batched: bool) -> Tensor:
    """grad_bias by PyTorch: the sum over every dimension but features, and layers if batched."""
    if batched:
        return grad_output.sum(1)
    leading = tuple(range(grad_output.dim() - 1))
    # sum(()) would sum everything.
    return grad_output.sum(leading) if leading else grad_output.clone()


def shapes_of(*operands: Tensor | None) -> list[torch.Size | None]:
    """Their shapes; None for those that are not there."""
    return [None if operand is None else operand.shape for operand in operands]
