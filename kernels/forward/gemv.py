"""Forward for a few rows, on the plain cores: for any strides, any GPU.

With so few rows a multiply-add takes no time beside the load of its weight, which is all that
matters: each weight is loaded once, as wide as memory allows, and goes from there straight into
plain multiply-adds, in registers.
"""

import triton
import triton.language as tl

from ..configs.config import Config
from ..language.epilogue import load_bias, store_activated
from ..language.indexing import as_offset, offsets, row_offsets
from ..language.precision import accumulator_of
from ..launching.shared_sums import KernelLaunch
from .problem import ForwardProblem


@triton.jit
def linear_gemv_kernel(
    input,
    weight,
    bias,
    output_ptr,
    preactivation_ptr,
    M,
    N,
    K,
    zero,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """output[b, m, n] = activation(sum_k input[b, m, k] * weight[b, n, k] + bias[b, n]).

    Computes BLOCK_N outputs of each of BLOCK_M rows.

    The operands are those of `tiled.forward_tile`; `zero` is not used, and products of float32 are
    exact whatever OPTIONS allows: the loads take longer. Every element of a weight tile has a sum
    of its own, over the steps, for each row; the sums of a tile are added once, at the end. That
    takes no exchange between threads before, and errs less than one running sum over K.
    """
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    row_groups = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = row_groups * column_tiles
    pid = tl.program_id(0)
    batch = as_offset(pid // tiles, OPTIONS)
    # Groups of rows that read the same weights run at the same time.
    first_row = as_offset(pid % tiles % row_groups * BLOCK_M, OPTIONS)

    offs_n = offsets(pid % tiles // row_groups * BLOCK_N, BLOCK_N, OPTIONS)
    offs_k = offsets(0, BLOCK_K, OPTIONS)
    mask_n = offs_n < N

    row_offs = ()
    for row in tl.static_range(BLOCK_M):
        row_offs += (row_offsets(input, first_row + row),)  # type: ignore[assignment]
    input_ptrs = input.ptr + batch * input.stride_batch + offs_k * input.stride_column
    weight_offs = batch * weight.stride_batch + row_offsets(weight, offs_n[:, None])
    weight_ptrs = weight.ptr + (weight_offs + offs_k[None, :] * weight.stride_column)
    step_k = as_offset(BLOCK_K, OPTIONS)
    ACC_DTYPE: tl.constexpr = accumulator_of(input.ptr).dtype
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
            mask_row = mask_k & (tl.full((BLOCK_K,), first_row + row, offs_k.dtype) < M)
            input_row = tl.load(input_ptrs + row_offs[row], mask=mask_row, other=0.0)
            acc = accs[row] + input_row.to(ACC_DTYPE)[None, :] * weight_tile
            sums += (acc,)  # type: ignore[assignment]
        accs = sums
        input_ptrs += step_k * input.stride_column
        weight_ptrs += step_k * weight.stride_column

    of_bias = tl.full((BLOCK_N,), 0.0, ACC_DTYPE)
    if bias is not None:
        of_bias = load_bias(bias, batch, offs_n, mask_n).to(ACC_DTYPE)
    for row in tl.static_range(BLOCK_M):
        m = first_row + row
        acc = tl.sum(accs[row], axis=1) + of_bias
        offs = batch * M * N + m * N + offs_n
        mask = mask_n & (tl.full((BLOCK_N,), m, offs_n.dtype) < M)
        store_activated(acc, output_ptr, preactivation_ptr, offs, mask, OPTIONS)


def plan(problem: ForwardProblem, config: Config) -> KernelLaunch:
    """One program for BLOCK_N outputs of BLOCK_M rows of each layer."""
    row_groups = triton.cdiv(problem.rows.size, config.block_m)
    column_tiles = triton.cdiv(problem.n, config.block_n)
    # The kernel does not look at these: one that is compiled for some is for all.
    options = problem.options._replace(precision="ieee", sum_steps_apart=False, upcast=False)
    programs = problem.batch * row_groups * column_tiles
    launch = problem._replace(options=options).launch(config, programs)
    return KernelLaunch(linear_gemv_kernel, launch)
