"""Forward for a few rows, on the plain cores: for any strides, any GPU.

With so few rows a multiply-add takes no time beside the load of its weight, which is all that
matters: each weight is loaded once, as wide as memory allows, and goes from there straight into
plain multiply-adds, in registers.
"""

import triton
import triton.language as tl

from ..configs.config import Config
from ..language.epilogue import activate
from ..language.indexing import locate_rows
from ..launching.launch import Launch, accumulator_dtype
from .problem import ForwardLaunch, ForwardProblem


@triton.jit
def linear_gemv_kernel(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """output[b, m, n] = activation(sum_k input[b, m, k] * weight[b, n, k] + bias[b, n]).

    Computes BLOCK_N outputs of each of BLOCK_M rows.

    The operands are those of `tiled.linear_forward_kernel`; `zero` is not used. Every element of a
    weight tile has a sum of its own, over the steps, for each row; the sums of a tile are added
    once, at the end. That takes no exchange between threads before, and errs less than one running
    sum over K.
    """
    row_groups = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = row_groups * column_tiles
    pid = tl.program_id(0)
    batch = (pid // tiles).to(OFFSET_DTYPE)
    # Groups of rows that read the same weights run at the same time.
    first_row = (pid % tiles % row_groups * BLOCK_M).to(OFFSET_DTYPE)

    offs_n = (pid % tiles // row_groups * BLOCK_N + tl.arange(0, BLOCK_N)).to(OFFSET_DTYPE)
    offs_k = tl.arange(0, BLOCK_K).to(OFFSET_DTYPE)
    mask_n = offs_n < N

    row_offs = ()
    for row in tl.static_range(BLOCK_M):
        m = first_row + row
        offs = locate_rows(m, input_inner_size, stride_io, stride_im, NESTED_INPUT)
        row_offs += (offs,)  # type: ignore[assignment]
    input_ptrs = input_ptr + batch * stride_ib + offs_k * stride_ik
    weight_offs = batch * stride_wb + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
    weight_ptrs = weight_ptr + weight_offs
    # A scalar of the offsets' type, so that BLOCK_K * stride cannot overflow
    # where offsets are 64 bits wide.
    step_k = tl.full((), BLOCK_K, OFFSET_DTYPE)
    # A tuple and not a third dimension: Triton would pass the weights through shared memory to
    # bring them into that shape.
    accs = (tl.full((BLOCK_N, BLOCK_K), 0.0, ACC_DTYPE),) * BLOCK_M
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        mask_k = offs_k < K - k * BLOCK_K
        # Read once: what is read again, the input, is to stay in the caches.
        weight_tile = tl.load(
            weight_ptrs,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
            eviction_policy="evict_first",
        ).to(ACC_DTYPE)
        sums = ()
        for row in tl.static_range(BLOCK_M):
            # Compared as a block: of a scalar's comparison Triton's interpreter would make integers
            # to spread it, and of those 3.9 takes no mask.
            mask_row = mask_k & (tl.full((BLOCK_K,), first_row + row, OFFSET_DTYPE) < M)
            input_row = tl.load(input_ptrs + row_offs[row], mask=mask_row, other=0.0)
            acc = accs[row] + input_row.to(ACC_DTYPE)[None, :] * weight_tile
            sums += (acc,)  # type: ignore[assignment]
        accs = sums
        input_ptrs += step_k * stride_ik
        weight_ptrs += step_k * stride_wk

    bias = tl.full((BLOCK_N,), 0.0, ACC_DTYPE)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + batch * stride_bb + offs_n * stride_bn
        bias = tl.load(bias_ptrs, mask=mask_n, other=0.0).to(ACC_DTYPE)
    for row in tl.static_range(BLOCK_M):
        m = first_row + row
        acc = tl.sum(accs[row], axis=1) + bias
        offs = batch * M * N + m * N + offs_n
        mask = mask_n & (tl.full((BLOCK_N,), m, OFFSET_DTYPE) < M)
        if SAVE_PREACTIVATION:
            preactivation = acc.to(preactivation_ptr.dtype.element_ty)
            tl.store(preactivation_ptr + offs, preactivation, mask=mask)
        if ACTIVATION is not None:
            acc = activate(acc, ACTIVATION)
        tl.store(output_ptr + offs, acc.to(output_ptr.dtype.element_ty), mask=mask)


def plan(problem: ForwardProblem, config: Config) -> ForwardLaunch:
    """One program for BLOCK_N outputs of BLOCK_M rows of each layer.

    float32 products are exact whatever `problem.precision` allows: the loads take longer.
    """
    row_groups = triton.cdiv(problem.rows.size, config.block_m)
    column_tiles = triton.cdiv(problem.n, config.block_n)
    constants = {
        "ACC_DTYPE": accumulator_dtype(problem.output.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        **config.compile_options(problem.target),
    }
    grid = (problem.batch * row_groups * column_tiles,)
    launch = Launch(grid, problem.scalars, problem.constants | constants)
    return ForwardLaunch(linear_gemv_kernel, launch)
