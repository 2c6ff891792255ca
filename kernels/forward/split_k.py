"""Forward for some rows, 5 to 64 or so: the sum over K is split over programs, in one launch.

So few rows make few tiles, which alone would leave most of a GPU idle while weight, nearly all of
the traffic, is read.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from ..configs.config import Config
from ..language.epilogue import bias_pointers, store_activated
from ..language.indexing import as_offset, locate_tile, offsets, row_offsets
from ..language.precision import accumulator_of, add_product, prepare_operand
from ..language.reduction import arrives_last, sum_slices
from ..launching import launch
from ..launching.shared_sums import KernelLaunch
from .problem import ForwardProblem


@triton.jit
def _finish_tile(
    acc, bias_ptrs, output_ptrs, preactivation_ptrs, mask_n, mask, OPTIONS: tl.constexpr
):
    """Adds the bias to sums (BLOCK_N, BLOCK_M) over all of K, activates, rounds and stores."""
    if bias_ptrs is not None:
        acc += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(acc.dtype)[:, None]
    store_activated(acc, output_ptrs, preactivation_ptrs, 0, mask, OPTIONS)  # 0: they are there


@triton.jit
def linear_split_k_kernel(
    input,
    weight,
    bias,
    output_ptr,
    preactivation_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    K,
    zero,
    columns_per_split,
    splits,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """output[b, m, n] = activation(sum_k input[b, m, k] * weight[b, n, k] + bias[b, n]).

    One program sums one of `splits` parts of K, columns_per_split of it, for a tile of BLOCK_N
    outputs of BLOCK_M rows. The last of a tile to arrive adds the parts.

    The operands are those of `tiled.forward_tile`. partial (B, splits, M, N) is contiguous, and
    counter has a 0 for each tile of each layer; with one split there is neither.
    """
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = row_tiles * column_tiles
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    batch = as_offset(part // splits, OPTIONS)
    split = part % splits
    tile_m, tile_n = locate_tile(tile, row_tiles, column_tiles, TILE.group)

    offs_m = offsets(tile_m * BLOCK_M, BLOCK_M, OPTIONS)
    offs_n = offsets(tile_n * BLOCK_N, BLOCK_N, OPTIONS)
    first_column = split * columns_per_split
    offs_k = offsets(first_column, BLOCK_K, OPTIONS)
    mask_m = offs_m < M
    mask_n = offs_n < N

    # Matrix instructions have 64 rows or more on Hopper and few columns: weight gives the rows.
    weight_ptrs = weight.ptr + batch * weight.stride_batch
    weight_ptrs += row_offsets(weight, offs_n[:, None]) + offs_k[None, :] * weight.stride_column
    input_rows = row_offsets(input, offs_m)
    input_ptrs = input.ptr + batch * input.stride_batch
    input_ptrs += input_rows[None, :] + offs_k[:, None] * input.stride_column
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=accumulator_of(input.ptr).dtype)
    fresh = acc + zero
    step_k = as_offset(BLOCK_K, OPTIONS)
    for k in range(first_column, min(first_column + columns_per_split, K), BLOCK_K):
        mask_k = tl.arange(0, BLOCK_K) < K - k
        weight_tile = tl.load(weight_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        input_tile = tl.load(input_ptrs, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        acc = add_product(
            acc,
            prepare_operand(weight_tile, OPTIONS),
            prepare_operand(input_tile, OPTIONS),
            fresh,
            OPTIONS,
        )
        weight_ptrs += step_k * weight.stride_column
        input_ptrs += step_k * input.stride_column

    layer = batch * M * N
    offs = offs_m[None, :] * N + offs_n[:, None]
    mask = mask_n[:, None] & mask_m[None, :]
    bias_ptrs = bias_pointers(bias, batch, offs_n) if bias is not None else None
    output_ptrs = output_ptr + layer + offs
    saved_ptrs = preactivation_ptr + layer + offs if preactivation_ptr is not None else None
    if partial_ptr is not None:
        slice_size = as_offset(M, OPTIONS) * N
        partial_ptrs = partial_ptr + layer * splits + offs
        tl.store(partial_ptrs + split * slice_size, acc, mask=mask)
        if arrives_last(counter_ptr + batch * tiles + tile, splits):
            acc = sum_slices(partial_ptrs, mask, splits, slice_size)
            _finish_tile(acc, bias_ptrs, output_ptrs, saved_ptrs, mask_n, mask, OPTIONS)
    else:
        _finish_tile(acc, bias_ptrs, output_ptrs, saved_ptrs, mask_n, mask, OPTIONS)


def plan(problem: ForwardProblem, config: Config) -> KernelLaunch:
    """One program a tile of each layer and split; with one split no workspace."""
    m, n, k = problem.rows.size, problem.n, problem.k
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    # Splits hold whole steps, which can leave fewer of them than was asked for, and none empty.
    steps = max(1, triton.cdiv(k, config.block_k))
    steps_per_split = triton.cdiv(steps, config.splits)
    splits = triton.cdiv(steps, steps_per_split)
    programs, shares = problem.batch * splits * tiles, (steps_per_split * config.block_k, splits)
    if splits == 1:
        return KernelLaunch(
            linear_split_k_kernel, problem.launch(config, programs, *shares, without=2)
        )
    output = problem.output
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    partial = output.contiguous(problem.batch, splits, m, n)._replace(dtype=dtype)
    wide = problem.options.wide or launch.wide(partial)
    widened = problem._replace(options=problem.options._replace(wide=wide))
    return KernelLaunch(
        linear_split_k_kernel,
        widened.launch(config, programs, *shares),
        (partial,),
        counters=problem.batch * tiles,
        unsplit=functools.cache(lambda: plan(problem, dataclasses.replace(config, splits=1))),
    )
