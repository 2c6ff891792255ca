"""What the torch ops run: the kernels, in the settings that are in force, or PyTorch.

PyTorch where a table says so; the ops of gated pairs know no tables.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastlinear import backend, tuned
from fastlinear.kernels.configs import PYTORCH
from fastlinear.kernels.operands import (
    FROM_OUTPUT,
    check_backward_shapes,
    check_gated_backward_shapes,
    check_saved_shape,
)


def _of_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Any:
    """What a table says of the output: PYTORCH, a kernel's configuration, or None for neither."""
    if not tuned.available or backend.invariant:
        return None
    from fastlinear import by_table

    return by_table.output_candidate(input, weight, bias, activation)


def plan(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """The plan that `forward` follows; None where that is PyTorch's."""
    config = _of_output(input, weight, bias)
    if config == PYTORCH:
        return None
    kernels = backend.launchers().forward
    operands = kernels.launch.describe(input, weight, bias)
    return kernels.plan_forward(
        operands, backend.float32_precision(), None, False, config, backend.invariant
    )


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `linear` by the kernels, or by PyTorch where a table says so."""
    config = _of_output(input, weight, bias)
    if config == PYTORCH:
        return F.linear(input, weight, bias)
    return backend.launchers().forward.linear_forward(
        input,
        weight,
        bias,
        precision=backend.float32_precision(),
        config=config,
        batch_invariant=backend.invariant,
    )


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
    gradients = None
    if tuned.available and not batched and not backend.invariant:
        from fastlinear import by_table

        gradients = by_table.gradients(grad_output, input, weight, bias)
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
    config = _of_output(input, weight, bias, activation)
    if config == PYTORCH:
        return _activated(F.linear(input, weight, bias), activation)
    kernels, precision = backend.launchers().forward, backend.float32_precision()
    return kernels.linear_activation_forward(
        input,
        weight,
        bias,
        activation,
        False,
        precision=precision,
        config=config,
        batch_invariant=backend.invariant,
    )[0]


def _activated(preactivation: Tensor, activation: str) -> Tensor:
    from fastlinear.activations import ACTIVATIONS  # which needs this module

    return ACTIVATIONS[activation](preactivation)


def activation_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The op `linear_activation_forward` by the kernels.

    The pre-activation comes back empty where the derivative is taken from the output.
    """
    config = _of_output(input, weight, bias, activation)
    if config == PYTORCH:
        preactivation = F.linear(input, weight, bias)
        output = _activated(preactivation, activation)
        return output, output.new_empty(0) if activation in FROM_OUTPUT else preactivation
    kernels, precision = backend.launchers().forward, backend.float32_precision()
    output, preactivation = kernels.linear_activation_forward(
        input,
        weight,
        bias,
        activation,
        activation not in FROM_OUTPUT,
        precision=precision,
        config=config,
        batch_invariant=backend.invariant,
    )
    return output, output.new_empty(0) if preactivation is None else preactivation


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
    if tuned.available and not batched and not backend.invariant:
        grad = backend.launchers().activation.activation_backward(
            grad_output, saved.contiguous(), activation
        )
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
