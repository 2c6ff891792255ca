"""The way back through an activation, or a gate: one pass, before the gradients of the layers."""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..language.epilogue import activate, activation_gradient, store_rounded
from ..language.indexing import as_offset, row_offsets
from ..language.precision import accumulator_of
from ..launching import launch
from ..launching.operands import FROM_OUTPUT, Activation, check_activation, check_same_kind

# Elements of a program, and the most features among them.
BLOCK, WIDEST = 1024, 128


@triton.jit
def elementwise_backward_kernel(
    grad_output,
    saved_ptr,
    up_ptr,
    result_ptr,
    M,
    N,
    FROM_OUTPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """The gradient of a pre-activation: result[m, n] = grad_output[m, n] * activation'(m, n).

    Of a gate where there is an `up`: saved is the gate, and result (M, 2 N) has
    grad_output * up * activation'(gate), then grad_output * activation(gate), up's gradient.

    One program computes one BLOCK_M x BLOCK_N tile of each. grad_output (M, N) has any strides; the
    others are contiguous. FROM_OUTPUT says that the derivative is taken from the activation's
    output (operands.FROM_OUTPUT), which is what saved is then, unless it is the gate.
    """
    ACTIVATION: tl.constexpr = OPTIONS.activation
    column_tiles = tl.cdiv(N, BLOCK_N)
    # Before the arithmetic: with few features, rows alone may pass 2**31.
    pid = as_offset(tl.program_id(0), OPTIONS)
    offs_m = (pid // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    grad_offs = row_offsets(grad_output, offs_m)[:, None]
    grad_ptrs = grad_output.ptr + grad_offs + offs_n[None, :] * grad_output.stride_column
    ACC_DTYPE: tl.constexpr = accumulator_of(saved_ptr).dtype
    # All loads before the arithmetic, which may exchange elements between threads first.
    grad = tl.load(grad_ptrs, mask=mask, other=0.0)
    saved = tl.load(saved_ptr + offs, mask=mask, other=0.0)
    if up_ptr is None:
        result = activation_gradient(grad.to(ACC_DTYPE), saved.to(ACC_DTYPE), ACTIVATION)
        store_rounded(result_ptr + offs, result, mask)
    else:
        up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(ACC_DTYPE)
        grad, gate = grad.to(ACC_DTYPE), saved.to(ACC_DTYPE)
        activated = activate(gate, ACTIVATION)
        differentiated = activated if FROM_OUTPUT else gate
        grad_gate = activation_gradient(grad * up, differentiated, ACTIVATION)
        grad_up = grad * activated
        result_ptrs = result_ptr + offs_m[:, None] * 2 * N + offs_n[None, :]
        store_rounded(result_ptrs, grad_gate, mask)
        store_rounded(result_ptrs + N, grad_up, mask)


@functools.lru_cache(maxsize=4096)
def plan_elementwise_backward(
    operands: tuple[launch.Fields, launch.Fields, launch.Fields | None],
    activation: Activation,
) -> tuple[launch.Launch, launch.Operand, bool]:
    """The launch, what it writes, and whether grad_output is copied first.

    It is for tensors like `describe(grad_output, saved, up)`.
    """
    grad_output, saved = launch.Operand(*operands[0]), launch.Operand(*operands[1])
    up = operands[2] and launch.Operand(*operands[2])
    check_activation(activation, optional=False)
    check_same_kind(grad_output=grad_output, saved=saved, up=up)
    rows, features = launch.rows_of(grad_output), grad_output.shape[-1]
    result = saved.contiguous(*saved.shape[:-1], features if up is None else 2 * features)
    block_n = min(WIDEST, triton.next_power_of_2(max(features, 1)))
    block_m = BLOCK // block_n
    constants: dict[str, Any] = {
        "FROM_OUTPUT": activation in FROM_OUTPUT,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "OPTIONS": launch.options_of(
            saved.dtype, "ieee", launch.wide(rows.operand, result), activation
        ),
    }
    grid = (triton.cdiv(rows.size, block_m) * triton.cdiv(features, block_n),)
    plan = launch.Launch(grid, (rows.size, features), constants, (rows.matrix,))
    return plan, result, rows.copied


def _backward(
    grad_output: Tensor, saved: Tensor, up: Tensor | None, activation: Activation
) -> Tensor:
    operands = launch.describe(grad_output, saved, up)
    plan, described, copied = plan_elementwise_backward(operands, activation)
    if copied:
        grad_output = grad_output.contiguous()
    result = launch.allocate(saved, described)
    if plan.grid != (0,):
        launch.run(elementwise_backward_kernel, plan, (grad_output, saved, up, result))
    return result


def activation_backward(grad_output: Tensor, saved: Tensor, activation: Activation) -> Tensor:
    """Computes the gradient of the pre-activation.

    Args:
        grad_output: (*, N), the gradient of the output; any strides.
        saved: (*, N), contiguous, in grad_output's dtype: the output of the activations that
            `operands.FROM_OUTPUT` names, else the pre-activation.
        activation: one of `operands.ACTIVATIONS`.

    Returns:
        (*, N), contiguous; computed in float32 (float64 for float64) and rounded once.
    """
    return _backward(grad_output, saved, None, activation)


def gate_backward(grad_output: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Computes the gradients of gate and up, side by side.

    Args:
        grad_output: (*, N), the gradient of the output; any strides.
        gate, up: (*, N), contiguous, in grad_output's dtype.
        activation: one of `operands.ACTIVATIONS`.

    Returns:
        (*, 2 N), contiguous: the gradient of gate, then that of up; computed in float32 (float64
        for float64) and rounded once.
    """
    return _backward(grad_output, gate, up, activation)
