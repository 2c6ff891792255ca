"""Forward for some rows, 5 to 64 or so: the sum over K is split over programs, in one launch.

So few rows make few tiles, which alone would leave most of a GPU idle while weight, nearly all of
the traffic, is read.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from ..configs.config import Config
from ..language.epilogue import activate
from ..language.indexing import locate_rows, locate_tile
from ..language.precision import add_product, prepare_operand
from ..language.reduction import arrives_last, sum_slices
from ..launching import launch
from .problem import ForwardLaunch, ForwardProblem


@triton.jit
def _finish_tile(
    acc,
    bias_ptrs,
    output_ptrs,
    preactivation_ptrs,
    mask_n,
    mask,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PREACTIVATION: tl.constexpr,
):
    """Adds the bias to sums (BLOCK_N, BLOCK_M) over all of K, activates, rounds and stores."""
    if HAS_BIAS:
        acc += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(acc.dtype)[:, None]
    if SAVE_PREACTIVATION:
        tl.store(preactivation_ptrs, acc.to(preactivation_ptrs.dtype.element_ty), mask=mask)
    if ACTIVATION is not None:
        acc = activate(acc, ACTIVATION)
    tl.store(output_ptrs, acc.to(output_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def linear_split_k_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    preactivation_ptr,
    partial_ptr,
    counter_ptr,
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
    columns_per_split,
    splits,
    SPLIT: tl.constexpr,
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

    One program sums one of `splits` parts of K, columns_per_split of it, for a tile of BLOCK_N
    outputs of BLOCK_M rows. The last of a tile to arrive adds the parts.

    input (B, M, K), weight (B, N, K) and bias (B, N) have any strides, 0 included; output (B, M, N)
    is contiguous, and so is the pre-activation, which is stored too if asked for. partial
    (B, splits, M, N) is contiguous, and counter has a 0 for each tile of each layer. `zero` is 0,
    which the compiler does not know.
    """
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = row_tiles * column_tiles
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    batch = (part // splits).to(OFFSET_DTYPE)
    split = part % splits
    tile_m, tile_n = locate_tile(tile, row_tiles, column_tiles, GROUP)

    offs_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(OFFSET_DTYPE)
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(OFFSET_DTYPE)
    first_column = split * columns_per_split
    offs_k = (first_column + tl.arange(0, BLOCK_K)).to(OFFSET_DTYPE)
    mask_m = offs_m < M
    mask_n = offs_n < N

    # Matrix instructions have 64 rows or more on Hopper and few columns: weight gives the rows.
    weight_ptrs = weight_ptr + batch * stride_wb
    weight_ptrs += offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
    input_rows = locate_rows(offs_m, input_inner_size, stride_io, stride_im, NESTED_INPUT)
    input_ptrs = input_ptr + batch * stride_ib
    input_ptrs += input_rows[None, :] + offs_k[:, None] * stride_ik
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    fresh = acc + zero
    # Scalars of the offsets' type, so that BLOCK_K * stride cannot overflow where offsets are 64
    # bits wide.
    step_k = tl.full((), BLOCK_K, OFFSET_DTYPE)
    for k in range(first_column, min(first_column + columns_per_split, K), BLOCK_K):
        mask_k = tl.arange(0, BLOCK_K) < K - k
        weight_tile = tl.load(weight_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        input_tile = tl.load(input_ptrs, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        acc = add_product(
            acc,
            prepare_operand(weight_tile, INPUT_PRECISION, UPCAST),
            prepare_operand(input_tile, INPUT_PRECISION, UPCAST),
            fresh,
            INPUT_PRECISION=INPUT_PRECISION,
            ACC_DTYPE=ACC_DTYPE,
            SUM_STEPS_APART=SUM_STEPS_APART,
        )
        weight_ptrs += step_k * stride_wk
        input_ptrs += step_k * stride_ik

    offs = offs_m[None, :] * N + offs_n[:, None]
    mask = mask_n[:, None] & mask_m[None, :]
    layer = batch * M * N
    bias_ptrs = bias_ptr + batch * stride_bb + offs_n * stride_bn if HAS_BIAS else None
    output_ptrs = output_ptr + layer + offs
    preactivation_ptrs = preactivation_ptr + layer + offs if SAVE_PREACTIVATION else None
    if SPLIT:
        slice_size = tl.full((), M, OFFSET_DTYPE) * N
        partial_ptrs = partial_ptr + layer * splits + offs
        tl.store(partial_ptrs + split * slice_size, acc, mask=mask)
        if arrives_last(counter_ptr + batch * tiles + tile, splits):
            _finish_tile(
                sum_slices(partial_ptrs, mask, splits, slice_size),
                bias_ptrs,
                output_ptrs,
                preactivation_ptrs,
                mask_n,
                mask,
                HAS_BIAS=HAS_BIAS,
                ACTIVATION=ACTIVATION,
                SAVE_PREACTIVATION=SAVE_PREACTIVATION,
            )
    else:
        _finish_tile(
            acc,
            bias_ptrs,
            output_ptrs,
            preactivation_ptrs,
            mask_n,
            mask,
            HAS_BIAS=HAS_BIAS,
            ACTIVATION=ACTIVATION,
            SAVE_PREACTIVATION=SAVE_PREACTIVATION,
        )


def plan(problem: ForwardProblem, config: Config) -> ForwardLaunch:
    """One program a tile of each layer and split; with one split no workspace."""
    m, n, k = problem.rows.size, problem.n, problem.k
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    # Splits hold whole steps, which can leave fewer of them than was asked for, and none empty.
    steps = max(1, triton.cdiv(k, config.block_k))
    steps_per_split = triton.cdiv(steps, config.splits)
    splits = triton.cdiv(steps, steps_per_split)
    constants = problem.constants_with(config) | {"SPLIT": splits > 1}
    scalars = (*problem.scalars, steps_per_split * config.block_k, splits)
    grid = (problem.batch * splits * tiles,)
    if splits == 1:
        without = launch.Launch(grid, (None, None, *scalars), constants)
        return ForwardLaunch(linear_split_k_kernel, without)
    output = problem.output
    partial = output.contiguous(problem.batch, splits, m, n)
    partial = partial._replace(
        dtype=torch.float64 if output.dtype == torch.float64 else torch.float32
    )
    if launch.offset_dtype(partial) == tl.int64:
        constants["OFFSET_DTYPE"] = tl.int64
    return ForwardLaunch(
        linear_split_k_kernel,
        launch.Launch(grid, scalars, constants),
        partial,
        counters=problem.batch * tiles,
        unsplit=plan(problem, dataclasses.replace(config, splits=1)),
    )
