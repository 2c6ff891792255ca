"""Gradients of weights that are summed in float32 over many backwards, outside of autograd.

Training in 16 bits that adds the gradients of several batches up keeps their sum as
`weight.main_grad`, in float32: Megatron-LM and Transformer Engine do. Left to autograd, each
gradient is rounded to 16 bits, written, read again and added. The grad_weight kernel adds its
float32 sums to main_grad instead of writing them.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlinear import _torch_internals as internals
from fastlinear.choice import backend, known, running
from fastlinear.choice.launchers import kernels_run_on, launchers
from fastlinear.choice.way import tables_say_so
from fastlinear.functional import linear, observe, of_operands
from fastlinear.kernels.launching.operands import FROM_OUTPUT, check_main_grad
from fastlinear.ops import implementations
from fastlinear.ops.arguments import why_not
from fastlinear.ops.elementwise import ACTIVATIONS
from fastlinear.ops.linear import activation_forward_op


def linear_into_main_grad(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """`fastlinear.linear`, whose backward adds weight's gradient to `weight.main_grad`.

    `main_grad += grad_preactivation.mT @ input`, with grad_preactivation and input in the dtype
    that the layer computes in, autocast's where it is on. Backend "triton" computes all gradients
    with the kernels, and "auto" this one on a GPU that Triton can launch them on; elsewhere PyTorch
    forms the product. Either way it is summed, and added, in main_grad's dtype. Backwards of
    several threads take turns; whoever runs them on several CUDA streams has each wait for the one
    before.

    It is added where autograd wants weight's gradient: not in `torch.autograd.grad(output, input)`.
    Autograd gets none. Where weight has an attribute `grad_added_to_main_grad`, as Megatron-LM's
    has, that becomes True and autograd gets zeros, for the hooks that wait for it. A function that
    is compiled calls this as it is (a graph break). Not differentiable twice.

    Args:
        input, weight, bias, activation: as in `fastlinear.linear`; weight.main_grad is contiguous,
            (out_features, in_features), float32, or float64 for a float64 weight.

    Returns:
        As `fastlinear.linear`.

    Raises:
        RuntimeError: weight needs a gradient, and its `main_grad` is not there or does not fit it.
        TypeError: the kernels cannot take the arguments; the message says why.
        Exception: whatever `fastlinear.linear` raises.
    """
    operands = (input, weight, bias)
    observe(linear_into_main_grad, operands, activation)
    output = of_operands(linear_into_main_grad, operands, activation)
    if output is not NotImplemented:
        return output
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return linear(input, weight, bias, activation)
    reason = why_not(input, weight, bias) or _why_distributed(input, weight)
    if reason is not None:
        F.linear(input, weight, bias)  # PyTorch's own error where it cannot take them either
        raise TypeError(f"accumulate_into_main_grad takes {reason}")
    _main_grad_of(weight)
    device = input.device.type
    dtype = backend.dtype_under(backend.autocast_dtype(device), input.dtype)
    if bias is not None:
        bias = bias.to(dtype).expand(weight.shape[:1])
    used = internals.autocast_copy(weight, dtype).detach()
    with torch.autocast(device, enabled=False):
        return _apply(input.to(dtype), weight, bias, activation, (weight, used))


# What it does to a tensor that no graph knows is not for a compiler to reorder.
internals.break_graph_at(linear_into_main_grad)


def _why_distributed(input: Tensor, weight: Tensor) -> str | None:
    """As `why_not`: the kernels are launched here, not by an op that shards would go through."""
    for name, tensor in (("input", input), ("weight", weight)):
        if type(tensor) in internals.DISTRIBUTED:
            return f"plain tensors, but {name} is a {type(tensor).__name__}"
    return None


def _main_grad_of(weight: Tensor) -> Tensor:
    if not hasattr(weight, "main_grad"):
        raise RuntimeError(
            "accumulate_into_main_grad adds weight's gradient to weight.main_grad, a float32 "
            f"tensor of its shape {tuple(weight.shape)}, but this weight has none"
        )
    main_grad: Tensor = weight.main_grad
    check_main_grad(main_grad, weight.shape, weight)
    return main_grad


_without_kernels: set[torch.device] = set()  # where "auto" has found that Triton cannot launch


def by_the_kernels(input: Tensor) -> bool:
    """Whether the kernels compute grad_weight."""
    if backend.current == "auto" and input.is_cuda and input.device not in _without_kernels:
        return kernels_run_on(input.device)
    return backend.current == "triton"


class IntoMainGrad(torch.autograd.Function):
    """The layer, and its gradients but for weight's, which goes into main_grad."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        weights: tuple[Tensor, Tensor],
    ) -> Tensor:
        ctx.weight, used = weights
        saved = None
        if activation is None:
            output = linear(input, used, bias)
            if output._is_view():  # F.linear's may be one, and no Function's could change in place
                output = torch.ops.aten._unsafe_view(output, output.shape)
        elif backend.current == "triton" or tables_say_so(input, used, bias, activation):
            output, saved = activation_forward_op(input, used, bias, activation)
        else:
            saved = F.linear(input, used, bias)
            output = ACTIVATIONS[activation](saved)
        if activation in FROM_OUTPUT:
            saved = output
        ctx.save_for_backward(input, used if ctx.needs_input_grad[0] else None, saved)
        ctx.activation = activation
        ctx.kernels, ctx.auto = by_the_kernels(input), backend.current == "auto"
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 5
        input, used, saved = ctx.saved_tensors
        of_input, of_weight, bias = internals.wanted(ctx)[:3]
        main_grad = _main_grad_of(ctx.weight) if of_weight else None
        used, all_by_kernels = used if of_input else None, ctx.kernels and not ctx.auto
        grad_input = grad_bias = None
        with torch.autocast(input.device.type, enabled=False):
            if saved is not None:
                grad_output = implementations.grad_preactivation(
                    grad_output, saved, ctx.activation, by_pytorch=not all_by_kernels
                )
            if all_by_kernels:
                rows = None if main_grad is None else input
                options = implementations.in_force() | {"main_grad": main_grad}
                with _adding:
                    grad_input, _, grad_bias = launchers().backward.linear_backward(
                        grad_output, rows, used, bias, **options
                    )
            else:
                if used is not None:
                    grad_input = _grad_input(grad_output, used, ctx.auto and known.available)
                if main_grad is not None:
                    with _adding:
                        grad_bias = _add(grad_output, input, bias, main_grad, ctx.kernels)
            if bias and grad_bias is None:
                grad_bias = implementations.sum_rows(grad_output, batched=False)
        grad_weight = None
        if main_grad is not None:
            torch.autograd.graph.increment_version(main_grad)
            if hasattr(ctx.weight, "grad_added_to_main_grad"):
                ctx.weight.grad_added_to_main_grad = True
                grad_weight = torch.zeros_like(ctx.weight)
        return grad_input, grad_weight, grad_bias, None, None


internals.hide_from_dynamo(IntoMainGrad.backward)
_adding = threading.Lock()  # two that read one sum would lose what the first of them adds
_apply: Callable[..., Tensor] = IntoMainGrad.apply


def _grad_input(grad_output: Tensor, weight: Tensor, by_table: bool) -> Tensor:
    """By PyTorch, or, where "auto" goes by a table, as the op that the table decides about."""
    if not by_table:
        return torch.matmul(grad_output, weight)
    with running.as_its_forward(True):
        return implementations.backward(grad_output, None, weight, False, False)[0]


def _add(
    grad_output: Tensor, input: Tensor, bias: bool, main_grad: Tensor, by_kernel: bool
) -> Tensor | None:
    """Adds to main_grad, if `by_kernel` by that, unless Triton cannot launch it, or by PyTorch.

    Returns grad_bias where the kernel sums it too.
    """
    if by_kernel:
        kernels, precision = launchers(), backend.float32_precision()
        try:
            _, grad_bias = kernels.backward_weight.linear_backward_weight(
                grad_output, input, bias, main_grad=main_grad, precision=precision
            )
            return grad_bias
        except kernels.forward.launch.CannotLaunch:
            _without_kernels.add(input.device)
    _add_by_pytorch(grad_output, input, main_grad)
    return None


def _add_by_pytorch(grad_output: Tensor, input: Tensor, main_grad: Tensor) -> None:
    m = input.shape[:-1].numel()
    rows = input.reshape(m, input.shape[-1])
    grad_columns = grad_output.reshape(m, grad_output.shape[-1]).mT
    if input.is_cuda and torch.version.hip is None and input.dtype.itemsize == 2:
        # PyTorch gives the float32 sums of 16-bit operands by cuBLAS alone.
        main_grad.add_(torch.mm(grad_columns, rows, out_dtype=torch.float32))
    else:
        main_grad.addmm_(grad_columns.to(main_grad.dtype), rows.to(main_grad.dtype))
