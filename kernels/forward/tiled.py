"""Forward by tiles of rows and outputs: for any number of rows, any strides, any GPU."""

import triton
import triton.language as tl

from ..configs.config import Config
from ..language.epilogue import load_bias, store_activated
from ..language.indexing import as_offset, locate_tile, offsets, row_offsets
from ..language.precision import (
    accumulator_of,
    add_product,
    empty_sum,
    prepare_operand,
    total_of,
)
from ..launching.shared_sums import KernelLaunch
from .problem import ForwardProblem


@triton.jit
def add_rows_by_rows(
    acc,
    fresh,
    input_ptrs,
    weight_ptrs,
    mask_m,
    mask_n,
    K,
    stride_ik,
    stride_wk,
    OPTIONS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`acc + input @ weight.T` for a tile's rows of input and of weight, BLOCK_K columns a step.

    input_ptrs (BLOCK_M, BLOCK_K) and weight_ptrs (BLOCK_K, BLOCK_N) point to the first step.
    """
    offs_k = offsets(0, BLOCK_K, OPTIONS)
    step_k = as_offset(BLOCK_K, OPTIONS)
    # At least one step, though K may be 0: where a loop may be skipped, zeros are written between
    # it and the wait for its products, and the assembler then waits for every product (C7515).
    for k in range(0, max(tl.cdiv(K, BLOCK_K), 1)):
        mask_k = offs_k < K - k * BLOCK_K
        input_tile = tl.load(input_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        weight_tile = tl.load(weight_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = add_product(
            acc,
            prepare_operand(input_tile, OPTIONS),
            prepare_operand(weight_tile, OPTIONS),
            fresh,
            OPTIONS,
        )
        input_ptrs += step_k * stride_ik
        weight_ptrs += step_k * stride_wk
    return acc


@triton.jit
def forward_tile(
    pid,
    input,
    weight,
    second_input_ptr,
    second_weight_ptr,
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

    Computes one BLOCK_M x BLOCK_N tile, the `pid`-th.

    input (B, M, K), weight (B, N, K) and bias (B, N) have any strides, 0 included; output (B, M, N)
    is contiguous, and so is the pre-activation, which is stored too where there is a place for it.
    The product of a second input and weight, of the shapes and strides of the first, is added where
    there is one. `zero` is 0, which the compiler does not know.
    """
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = row_tiles * column_tiles
    batch = as_offset(pid // tiles, OPTIONS)
    tile_m, tile_n = locate_tile(pid % tiles, row_tiles, column_tiles, TILE.group)

    offs_m = offsets(tile_m * BLOCK_M, BLOCK_M, OPTIONS)
    offs_n = offsets(tile_n * BLOCK_N, BLOCK_N, OPTIONS)
    offs_k = offsets(0, BLOCK_K, OPTIONS)
    mask_m = offs_m < M
    mask_n = offs_n < N

    input_rows = row_offsets(input, offs_m)
    input_offs = batch * input.stride_batch + input_rows[:, None]
    input_offs += offs_k[None, :] * input.stride_column
    weight_offs = batch * weight.stride_batch + row_offsets(weight, offs_n[None, :])
    weight_offs += offs_k[:, None] * weight.stride_column
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=accumulator_of(input.ptr).dtype)
    fresh = acc + zero
    acc = add_rows_by_rows(
        empty_sum(acc, OPTIONS),
        fresh,
        input.ptr + input_offs,
        weight.ptr + weight_offs,
        mask_m,
        mask_n,
        K,
        input.stride_column,
        weight.stride_column,
        OPTIONS,
        BLOCK_K,
    )
    if second_weight_ptr is not None:
        acc = add_rows_by_rows(
            acc,
            fresh,
            second_input_ptr + input_offs,
            second_weight_ptr + weight_offs,
            mask_m,
            mask_n,
            K,
            input.stride_column,
            weight.stride_column,
            OPTIONS,
            BLOCK_K,
        )
    acc = total_of(acc, OPTIONS)
    if bias is not None:
        acc += load_bias(bias, batch, offs_n, mask_n).to(acc.dtype)[None, :]
    offs = batch * M * N + offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    store_activated(acc, output_ptr, preactivation_ptr, offs, mask, OPTIONS)


@triton.jit
def linear_forward_kernel(
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
    """`forward_tile`, one a program."""
    forward_tile(
        tl.program_id(0),
        input,
        weight,
        None,
        None,
        bias,
        output_ptr,
        preactivation_ptr,
        M,
        N,
        K,
        zero,
        OPTIONS,
        TILE,
    )


def plan(problem: ForwardProblem, config: Config) -> KernelLaunch:
    """One program a tile of each layer."""
    row_tiles = triton.cdiv(problem.rows.size, config.block_m)
    column_tiles = triton.cdiv(problem.n, config.block_n)
    programs = problem.batch * row_tiles * column_tiles
    return KernelLaunch(linear_forward_kernel, problem.launch(config, programs))
