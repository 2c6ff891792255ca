"""What the torch ops run: the kernels, in the settings that are in force, or PyTorch.

PyTorch where a table says so.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear.choice import backend, running, way
from fastlinear.choice.launchers import launchers
from fastlinear.choice.table import LIBRARIES, PYTORCH
from fastlinear.kernels.configs.config import BackwardConfig
from fastlinear.kernels.launching.operands import (
    ACTIVATED,
    BACKWARD,
    BACKWARD_BATCHED,
    FROM_OUTPUT,
    GATED_BACKWARD,
    check_shapes,
)
from fastlinear.ops.elementwise import ACTIVATIONS, GRADIENTS, activated


def in_force(config: Any = None) -> dict[str, Any]:
    """The options of a launcher, by the settings of the process."""
    precision, invariant = backend.float32_precision(), backend.invariant
    return {"precision": precision, "config": config, "batch_invariant": invariant}


def _of_output(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Any:
    """What a table says of the output; None for the kernel that the launcher chooses."""
    if not running.by_tables():
        return None
    if weight.dim() != 2 or input.dim() == 0:
        return PYTORCH if running.takes_pytorch() else None
    n, k = weight.shape
    return way.Asked("output", input, weight, n, k, activation, bias is not None).candidate()


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
    kernels = launchers().forward
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
    kernels = launchers().forward
    if activation is not None:
        operands = input, weight, bias, activation
        return kernels.linear_activation_forward(*operands, False, **in_force(candidate))[0]
    return kernels.linear_forward(input, weight, bias, **in_force(candidate))


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
        kernels, options = launchers().forward, in_force(candidate)
        output, preactivation = kernels.linear_activation_forward(
            *operands, activation, keep, **options
        )
    elif keep:
        preactivation = _by_pytorch(candidate, *operands)
        output = ACTIVATIONS[activation](preactivation)
    else:
        output = _by_pytorch(candidate, *operands, activation)
    return output, output.new_empty(0) if preactivation is None else preactivation


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
        product = F.linear if weight.dim() == 2 else batched_product
        output = activated(product(input, weight, bias), activation)
    # A view could not change in place, were it the output of a Function.
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def batched_product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """B layers by PyTorch."""
    if bias is None:
        return torch.bmm(input, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), input, weight.transpose(1, 2))


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
    taken = BACKWARD_BATCHED if batched else BACKWARD
    check_shapes("linear_backward", taken, *shapes_of(grad_output, input, weight))
    by_tables = running.by_tables()
    if saved is not None:
        check_shapes("linear_activation_backward", ACTIVATED, grad_output.shape, saved.shape)
        by_pytorch = by_tables and running.takes_pytorch() and grad_output.device.type == "cpu"
        grad_output = grad_preactivation(grad_output, saved, activation, by_pytorch)
    pair = of_input = of_weight = None
    if by_tables:
        pair, of_input, of_weight = _by_table(grad_output, input, weight, bias, batched)
    if of_input is None and of_weight is None:
        gradients = launchers().backward.linear_backward(
            grad_output, input, weight, bias, batched=batched, **in_force(pair)
        )
    else:
        with _without_autocast(grad_output.device.type):
            grad_input = _grad_input(of_input, grad_output, weight, batched)
            gradients = grad_input, *_grad_weight(of_weight, grad_output, input, bias, batched)
    return _with_empty(grad_output, gradients, bias, batched)


def activation_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op `linear_activation_backward`."""
    grad_output, saved, *operands, activation = arguments
    return backward(*(grad_output, *operands, saved, activation))


def grad_preactivation(
    grad_output: Tensor, saved: Tensor, activation: str, by_pytorch: bool
) -> Tensor:
    """In a pass of its own, whose result both products read, and grad_bias with them.

    Of M x N elements that is five reads and writes in all, and one tensor more while it lasts. To
    take the gradient where each product loads it would spare one of the five, but take it anew for
    every column of tiles.
    """
    if by_pytorch:
        if activation == "silu":  # which has no derivative, and needs none here
            return torch.ops.aten.silu_backward(grad_output, saved)
        return GRADIENTS[activation](grad_output, saved)
    kernels = launchers().activation
    return kernels.activation_backward(grad_output, saved.contiguous(), activation)


def _by_table(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool, batched: bool
) -> tuple[Any, Any, Any]:
    """By tables, what computes both gradients in one launch, grad_input and grad_weight.

    As `way.Asked` has it. One launch does where the others are None.
    """
    neither = weight is None and input is None
    if running.takes_pytorch() and (
        batched or neither or not way.any_gradients(grad_output.device)
    ):
        return None, PYTORCH, PYTORCH
    if batched:
        return None, None, None
    if weight is not None and input is not None:
        n, k = weight.shape
        pair = way.Asked("gradients", input, weight, n, k, bias=bias).candidate()
        as_measured = grad_output.is_contiguous() and not grad_output.data_ptr() % 16
        if as_measured and isinstance(pair, BackwardConfig):
            return pair, None, None
    n, of_input, of_weight = grad_output.shape[-1], None, None
    if weight is not None:
        of_input = way.Asked("grad_input", grad_output, weight, n, weight.shape[-1]).candidate()
    if input is not None:
        k = input.shape[-1]
        asked = way.Asked("grad_weight", grad_output, input, n, k, bias=bias)
        of_weight = asked.candidate()
    return None, of_input, of_weight


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A backward may run under autocast, and products take operands as they are."""
    if internals.autocasting() and backend.autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _grad_input(
    candidate: Any, grad_output: Tensor, weight: Tensor | None, batched: bool
) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(candidate, str):
        kernels = launchers().backward
        return kernels.linear_backward_input(grad_output, weight, **in_force(candidate))
    if candidate in LIBRARIES:
        return LIBRARIES[candidate].grad_input(grad_output, weight)
    return torch.bmm(grad_output, weight) if batched else torch.matmul(grad_output, weight)


def _grad_weight(
    candidate: Any, grad_output: Tensor, input: Tensor | None, bias: bool, batched: bool
) -> tuple[Tensor | None, Tensor | None]:
    """grad_weight, and with it, but of B layers by PyTorch, grad_bias."""
    if input is None:
        return None, None
    if not isinstance(candidate, str):
        kernels, precision = launchers().backward_weight, backend.float32_precision()
        return kernels.linear_backward_weight(
            grad_output, input, bias, precision=precision, config=candidate
        )
    if candidate in LIBRARIES:
        return LIBRARIES[candidate].grad_weight(grad_output, input, bias)
    if batched:
        return torch.bmm(grad_output.mT, input), None
    m = input.shape[:-1].numel()
    grad_columns = grad_output.reshape(m, grad_output.shape[-1]).mT
    grad_weight = grad_columns @ input.reshape(m, input.shape[-1])
    return grad_weight, sum_rows(grad_output, batched) if bias else None


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
    kernels = launchers().gated
    return kernels.gated_linear_forward(*arguments, False, **in_force())[0]


def gated_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op `gated_linear_forward`."""
    return launchers().gated.gated_linear_forward(*arguments, True, **in_force())


def gated_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op `gated_linear_backward`; what is not wanted comes back empty."""
    *operands, bias, activation = arguments
    check_shapes("gated_linear_backward", GATED_BACKWARD, *shapes_of(*operands))
    *gradients, grad_products = launchers().gated_backward.gated_linear_backward(
        *operands, bias, activation, **in_force()
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
