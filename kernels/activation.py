"""The backward of a layer with its activation: one pass through the activation, then `backward`."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .backward import linear_backward
from .epilogue import activation_gradient
from .indexing import locate_rows
from .operands import Activation, check_activation, check_same_kind

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


def linear_activation_backward(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    activation: Activation,
    *,
    batched: bool = False,
    precision: str = "ieee",
    batch_invariant: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """The gradients of `activation(input @ weight.mT + bias)`, in two launches, or three.

    The gradient is taken through the activation once, in a pass that reads grad_output and what was
    saved and writes the pre-activation's gradient, which both products then read, grad_bias with
    them: of M x N elements, five reads and writes in all, and one tensor more while it lasts.
    Taking it where each product loads it would spare one of the five, but take it anew for every
    column of tiles: with 4096 features 32 times, and a derivative costs more than its share of the
    tile's multiply-adds. It would also put the operand of an asynchronous product into registers,
    at a price in stages and spills.

    Args:
        grad_output: (*, N), or (B, M, N) if batched; any strides.
        saved: grad_output's shape, as `activation_backward` takes it.
        input, weight, bias, batched, precision, batch_invariant: as in `linear_backward`.
        activation: one of `operands.ACTIVATIONS`.

    Returns:
        grad_input, grad_weight and grad_bias as in `linear_backward`, and the gradient of the
        pre-activation.
    """
    grad = activation_backward(grad_output, saved.contiguous(), activation)
    gradients = linear_backward(
        grad,
        input,
        weight,
        bias,
        batched=batched,
        precision=precision,
        batch_invariant=batch_invariant,
    )
    return *gradients, grad
