"""Forward by tiles of rows and outputs: for any number of rows, any strides, any GPU."""

import triton
import triton.language as tl

from ..configs.config import Config
from ..language.epilogue import activate
from ..language.indexing import locate_rows, locate_tile
from ..language.precision import add_product, empty_sum, prepare_operand, total_of
from ..launching.launch import Launch
from .problem import ForwardLaunch, ForwardProblem


@triton.jit
def add_rows_by_rows(
    acc,
    fresh,
    input_ptrs,
    weight_ptrs,
    mask_m,
    mask_n,
    offs_k,
    K,
    stride_ik,
    stride_wk,
    OFFSET_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUM_STEPS_APART: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`acc + input @ weight.T` for a tile's rows of input and of weight, BLOCK_K columns a step.

    input_ptrs (BLOCK_M, BLOCK_K) and weight_ptrs (BLOCK_K, BLOCK_N) point to the first step.
    """
    # A scalar of the offsets' type, so that BLOCK_K * stride cannot overflow
    # where offsets are 64 bits wide.
    step_k = tl.full((), BLOCK_K, OFFSET_DTYPE)
    # At least one step, though K may be 0: where a loop may be skipped, zeros are written between
    # it and the wait for its products, and the assembler then waits for every product (C7515).
    for k in range(0, max(tl.cdiv(K, BLOCK_K), 1)):
        mask_k = offs_k < K - k * BLOCK_K
        input_tile = tl.load(input_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        weight_tile = tl.load(weight_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = add_product(
            acc,
            prepare_operand(input_tile, INPUT_PRECISION, UPCAST),
            prepare_operand(weight_tile, INPUT_PRECISION, UPCAST),
            fresh,
            INPUT_PRECISION=INPUT_PRECISION,
            ACC_DTYPE=ACC_DTYPE,
            SUM_STEPS_APART=SUM_STEPS_APART,
        )
        input_ptrs += step_k * stride_ik
        weight_ptrs += step_k * stride_wk
    return acc


@triton.jit
def forward_tile(
    pid,
    input_ptr,
    weight_ptr,
    second_input_ptr,
    second_weight_ptr,
    bias_ptr,
    output_ptr,
    preactivation_ptr,
    M,
    N,
    K,
    zero,
    input_inner_size,
    stride_ib,
    stride_io,
    stride_im,
    stride_ik,
    stride_wb,
    stride_wn,
    stride_wk,
    stride_bb,
    stride_bn,
    SECOND_PRODUCT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PREACTIVATION: tl.constexpr,
    NESTED_INPUT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUM_STEPS_APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """output[b, m, n] = activation(sum_k input[b, m, k] * weight[b, n, k] + bias[b, n]).

    Computes one BLOCK_M x BLOCK_N tile, the `pid`-th.

    input (B, M, K), weight (B, N, K) and bias (B, N) have any strides, 0 included; output (B, M, N)
    is contiguous, and so is the pre-activation, which is stored too if asked for. SECOND_PRODUCT
    adds that of a second input and weight, of the shapes and strides of the first. `zero` is 0,
    which the compiler does not know.
    """
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = row_tiles * column_tiles
    batch = (pid // tiles).to(OFFSET_DTYPE)
    tile_m, tile_n = locate_tile(pid % tiles, row_tiles, column_tiles, GROUP)

    offs_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(OFFSET_DTYPE)
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(OFFSET_DTYPE)
    offs_k = tl.arange(0, BLOCK_K).to(OFFSET_DTYPE)
    mask_m = offs_m < M
    mask_n = offs_n < N

    input_rows = locate_rows(offs_m, input_inner_size, stride_io, stride_im, NESTED_INPUT)
    input_offs = batch * stride_ib + input_rows[:, None] + offs_k[None, :] * stride_ik
    weight_offs = batch * stride_wb + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    fresh = acc + zero
    acc = add_rows_by_rows(
        empty_sum(acc, INPUT_PRECISION),
        fresh,
        input_ptr + input_offs,
        weight_ptr + weight_offs,
        mask_m,
        mask_n,
        offs_k,
        K,
        stride_ik,
        stride_wk,
        OFFSET_DTYPE=OFFSET_DTYPE,
        ACC_DTYPE=ACC_DTYPE,
        INPUT_PRECISION=INPUT_PRECISION,
        UPCAST=UPCAST,
        SUM_STEPS_APART=SUM_STEPS_APART,
        BLOCK_K=BLOCK_K,
    )
    if SECOND_PRODUCT:
        acc = add_rows_by_rows(
            acc,
            fresh,
            second_input_ptr + input_offs,
            second_weight_ptr + weight_offs,
            mask_m,
            mask_n,
            offs_k,
            K,
            stride_ik,
            stride_wk,
            OFFSET_DTYPE=OFFSET_DTYPE,
            ACC_DTYPE=ACC_DTYPE,
            INPUT_PRECISION=INPUT_PRECISION,
            UPCAST=UPCAST,
            SUM_STEPS_APART=SUM_STEPS_APART,
            BLOCK_K=BLOCK_K,
        )
    acc = total_of(acc, INPUT_PRECISION)

    if HAS_BIAS:
        bias = tl.load(bias_ptr + batch * stride_bb + offs_n * stride_bn, mask=mask_n, other=0.0)
        acc += bias.to(ACC_DTYPE)[None, :]

    offs = batch * M * N + offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if SAVE_PREACTIVATION:
        tl.store(preactivation_ptr + offs, acc.to(preactivation_ptr.dtype.element_ty), mask=mask)
    if ACTIVATION is not None:
        acc = activate(acc, ACTIVATION)
    tl.store(output_ptr + offs, acc.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    preactivation_ptr,
    M,
    N,
    K,
    zero,
    input_inner_size,
    stride_ib,
    stride_io,
    stride_im,
    stride_ik,
    stride_wb,
    stride_wn,
    stride_wk,
    stride_bb,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PREACTIVATION: tl.constexpr,
    NESTED_INPUT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUM_STEPS_APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`forward_tile`, one a program."""
    forward_tile(
        tl.program_id(0),
        input_ptr,
        weight_ptr,
        None,
        None,
        bias_ptr,
        output_ptr,
        preactivation_ptr,
        M,
        N,
        K,
        zero,
        input_inner_size,
        stride_ib,
        stride_io,
        stride_im,
        stride_ik,
        stride_wb,
        stride_wn,
        stride_wk,
        stride_bb,
        stride_bn,
        SECOND_PRODUCT=False,
        HAS_BIAS=HAS_BIAS,
        ACTIVATION=ACTIVATION,
        SAVE_PREACTIVATION=SAVE_PREACTIVATION,
        NESTED_INPUT=NESTED_INPUT,
        OFFSET_DTYPE=OFFSET_DTYPE,
        ACC_DTYPE=ACC_DTYPE,
        INPUT_PRECISION=INPUT_PRECISION,
        UPCAST=UPCAST,
        SUM_STEPS_APART=SUM_STEPS_APART,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        GROUP=GROUP,
    )


def plan(problem: ForwardProblem, config: Config) -> ForwardLaunch:
    """One program a tile of each layer."""
    row_tiles = triton.cdiv(problem.rows.size, config.block_m)
    column_tiles = triton.cdiv(problem.n, config.block_n)
    grid = (problem.batch * row_tiles * column_tiles,)
    launch = Launch(grid, problem.scalars, problem.constants_with(config))
    return ForwardLaunch(linear_forward_kernel, launch)
