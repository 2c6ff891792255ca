"""The gradient of a layer's pre-activation: one pass, before the gradients of the layer itself."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..language.epilogue import activation_gradient
from ..language.indexing import locate_rows
from ..launching import launch
from ..launching.operands import Activation, check_activation, check_same_kind

# Most features, of 1024 elements, that one program of activation_backward_kernel takes.
ACTIVATION_BLOCK = 128


@triton.jit
def activation_backward_kernel(
    grad_output_ptr,
    saved_ptr,
    grad_preactivation_ptr,
    M,
    N,
    grad_output_inner_size,
    stride_go,
    stride_gm,
    stride_gn,
    ACTIVATION: tl.constexpr,
    NESTED_GRAD_OUTPUT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_preactivation[m, n] = grad_output[m, n] * activation'(m, n).

    One program computes one BLOCK_M x BLOCK_N tile. grad_output (M, N) has any strides; saved, from
    which the derivative is taken (operands.FROM_OUTPUT), and the result are contiguous.
    """
    column_tiles = tl.cdiv(N, BLOCK_N)
    # Before the arithmetic: with few features, rows alone may pass 2**31.
    pid = tl.program_id(0).to(OFFSET_DTYPE)
    offs_m = (pid // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    rows = locate_rows(offs_m, grad_output_inner_size, stride_go, stride_gm, NESTED_GRAD_OUTPUT)
    grad_output_ptrs = grad_output_ptr + rows[:, None] + offs_n[None, :] * stride_gn
    grad_output = tl.load(grad_output_ptrs, mask=mask, other=0.0)
    saved = tl.load(saved_ptr + offs, mask=mask, other=0.0)
    grad = activation_gradient(grad_output.to(ACC_DTYPE), saved.to(ACC_DTYPE), ACTIVATION)
    tl.store(grad_preactivation_ptr + offs, grad.to(saved_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=4096)
def plan_activation_backward(
    operands: tuple[launch.Fields, launch.Fields, None], activation: Activation
) -> tuple[launch.Launch, bool]:
    """The launch of `activation_backward`, and whether grad_output is copied first.

    It is for tensors like `describe(grad_output, saved)`.
    """
    grad_output, saved = launch.Operand(*operands[0]), launch.Operand(*operands[1])
    check_activation(activation)
    check_same_kind(grad_output=grad_output, saved=saved)
    rows = launch.rows_of(grad_output)
    features = grad_output.shape[-1]
    block_n = min(ACTIVATION_BLOCK, triton.next_power_of_2(max(features, 1)))
    block_m = 1024 // block_n
    plan = launch.Launch(
        grid=(triton.cdiv(rows.size, block_m) * triton.cdiv(features, block_n),),
        scalars=(
            rows.size,
            features,
            rows.inner_size,
            rows.stride_outer,
            rows.stride_inner,
            rows.stride_feature,
        ),
        constants={
            "ACTIVATION": activation,
            "NESTED_GRAD_OUTPUT": rows.nested,
            "OFFSET_DTYPE": launch.offset_dtype(rows.operand, saved),
            "ACC_DTYPE": launch.accumulator_dtype(saved.dtype),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
    )
    return plan, rows.copied


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
    plan, copy_grad_output = plan_activation_backward(
        launch.describe(grad_output, saved), activation
    )
    if copy_grad_output:
        grad_output = grad_output.contiguous()
    grad_preactivation = launch.allocate(saved, launch.Operand(*launch.describe(saved, saved)[0]))
    if plan.grid != (0,):
        launch.run(activation_backward_kernel, plan, (grad_output, saved, grad_preactivation))
    return grad_preactivation
