"""The backward of a gated pair: one pass through gate and activation, then that of one layer.

That layer has the outputs of both, side by side.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..configs.config import BackwardConfig
from ..language.epilogue import activate, activation_gradient
from ..language.indexing import locate_rows
from ..launching import launch
from ..launching.operands import FROM_OUTPUT, Activation, check_activation, check_same_kind
from .linear import linear_backward

# Most features, of 1024 elements, that one program of gate_backward_kernel takes.
GATE_BLOCK = 128


@triton.jit
def gate_backward_kernel(
    grad_output_ptr,
    gate_ptr,
    up_ptr,
    grad_products_ptr,
    M,
    N,
    grad_output_inner_size,
    stride_go,
    stride_gm,
    stride_gn,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    NESTED_GRAD_OUTPUT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad_gate = grad_output * up * activation'(gate); grad_up = grad_output * activation(gate).

    Both go to one matrix, grad_products (M, 2 N): grad_gate in its first N columns, grad_up in the
    others. One program computes one BLOCK_M x BLOCK_N tile of each. grad_output (M, N) has any
    strides; gate, up and grad_products are contiguous. FROM_OUTPUT says that the derivative is
    taken from the activation's output (operands.FROM_OUTPUT).
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
    grad_output = tl.load(grad_output_ptrs, mask=mask, other=0.0).to(ACC_DTYPE)
    gate = tl.load(gate_ptr + offs, mask=mask, other=0.0).to(ACC_DTYPE)
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(ACC_DTYPE)
    activated = activate(gate, ACTIVATION)
    saved = activated if FROM_OUTPUT else gate
    grad_gate = activation_gradient(grad_output * up, saved, ACTIVATION)
    grad_up = grad_output * activated
    dtype = grad_products_ptr.dtype.element_ty
    grad_ptrs = grad_products_ptr + offs_m[:, None] * 2 * N + offs_n[None, :]
    tl.store(grad_ptrs, grad_gate.to(dtype), mask=mask)
    tl.store(grad_ptrs + N, grad_up.to(dtype), mask=mask)


@functools.lru_cache(maxsize=4096)
def plan_gate_backward(
    operands: tuple[launch.Fields, launch.Fields, launch.Fields], activation: Activation
) -> tuple[launch.Launch, launch.Operand, bool]:
    """The launch of `gate_backward`, what it returns, and whether grad_output is copied first.

    It is for tensors like `describe(grad_output, gate, up)`.
    """
    grad_output, gate, up = (launch.Operand(*fields) for fields in operands)
    check_activation(activation, optional=False)
    check_same_kind(grad_output=grad_output, gate=gate, up=up)
    rows = launch.rows_of(grad_output)
    features = grad_output.shape[-1]
    grad_products = gate.contiguous(*gate.shape[:-1], 2 * features)
    block_n = min(GATE_BLOCK, triton.next_power_of_2(max(features, 1)))
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
            "FROM_OUTPUT": activation in FROM_OUTPUT,
            "NESTED_GRAD_OUTPUT": rows.nested,
            "OFFSET_DTYPE": launch.offset_dtype(rows.operand, grad_products),
            "ACC_DTYPE": launch.accumulator_dtype(gate.dtype),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
    )
    return plan, grad_products, rows.copied


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
    plan, products, copied = plan_gate_backward(launch.describe(grad_output, gate, up), activation)
    if copied:
        grad_output = grad_output.contiguous()
    grad_products = launch.allocate(gate, products)
    if plan.grid != (0,):
        launch.run(gate_backward_kernel, plan, (grad_output, gate, up, grad_products))
    return grad_products


def gated_linear_backward(
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    input: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    bias: bool,
    activation: Activation,
    *,
    precision: str = "ieee",
    batch_invariant: bool = False,
    config: BackwardConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """The gradients of `activation(gate) * up`, in two launches.

    The first pass reads grad_output, gate and up and writes the gradients of gate and up as one
    matrix of 2 N columns: of M x N elements, five reads and writes. The second computes the
    gradients of both weights and biases as those of one layer with that many outputs, and
    grad_input as the sum of two products in one accumulator: neither of its parts is written.

    Args:
        grad_output: (*, N); any strides.
        gate, up: (*, N), as `gated_linear_forward` gives them.
        input: (*, K); None where no gradient of a weight is wanted.
        gate_weight, up_weight: (N, K); None where no grad_input is wanted.
        bias: whether the gradients of biases are wanted; they come with those of weights only.
        activation: one of `operands.ACTIVATIONS`.
        precision: as in `gated_linear_forward`.
        batch_invariant: as in `linear_backward`.
        config: block sizes of the second launch; None chooses by shape, dtype and device.

    Returns:
        grad_input (*, K), grad_weight (2 N, K), the gate's before up's, grad_bias (2 N,) likewise,
        None for what is not wanted, and the gradients of gate and up (*, 2 N).
    """
    grad_products = gate_backward(grad_output, gate.contiguous(), up.contiguous(), activation)
    if gate_weight is not None and up_weight is not None:
        if gate_weight.stride() != up_weight.stride():  # rare: copied, so that they lie alike
            gate_weight, up_weight = gate_weight.contiguous(), up_weight.contiguous()
    gradients = linear_backward(
        grad_products,
        input,
        gate_weight,
        bias,
        second_weight=up_weight,
        precision=precision,
        batch_invariant=batch_invariant,
        config=config,
    )
    return *gradients, grad_products
