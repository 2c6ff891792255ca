"""A tile of grad_weight, and of grad_bias: sums over rows, which several programs may share."""

import triton
import triton.language as tl

from ..language.epilogue import store_rounded
from ..language.indexing import as_offset, halves, locate_tile, offsets, row_offsets
from ..language.precision import (
    accumulator_of,
    add_product,
    empty_sum,
    prepare_operand,
    total_of,
)
from ..language.reduction import arrives_last, sum_slices

# Rows of a tile whose parts are added at a time: a whole tile of sums, with the parts that are on
# their way, would take more registers than the product did.
SUM_ROWS = tl.constexpr(16)


@triton.jit
def backward_weight_tile(
    pid,
    grad_output,
    input,
    grad_weight_ptr,
    grad_bias_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    counter_ptr,
    M,
    N,
    K,
    splits,
    rows_per_split,
    batches,
    zero,
    ACCUMULATE: tl.constexpr,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """grad_weight[b, n, k] = sum_m grad_output[b, m, n] * input[b, m, k].

    In the same pass, where there is a grad_bias, grad_bias[b, n] = sum_m grad_output[b, m, n].

    The `pid`-th program computes one BLOCK_N x BLOCK_K tile of one batch over one split's rows.
    Programs of the first column of tiles also sum the grad_output tiles that they hold, so that
    grad_bias reads nothing of its own. With more splits than one, each stores its sums to a slice
    of its own, and the last one of a tile adds the slices, in their order. With ACCUMULATE the sum
    is added to what grad_weight holds, which is then of the accumulator's dtype.

    grad_output (B, M, N) and input (B, M, K) have any strides; grad_weight (B, N, K), grad_bias
    (B, N) and their parts (splits, B, ...), which one split has none of, are contiguous. counter
    (B * tiles,) holds zeros.
    """
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    SPLIT: tl.constexpr = partial_weight_ptr is not None
    SUM_BY_DOT: tl.constexpr = grad_output.ptr.dtype.element_ty.primitive_bitwidth == 16
    ACC_DTYPE: tl.constexpr = accumulator_of(grad_output.ptr).dtype
    row_tiles = tl.cdiv(N, BLOCK_N)
    column_tiles = max(tl.cdiv(K, BLOCK_K), 1)  # K = 0 has no grad_weight, and still a grad_bias
    tiles = row_tiles * column_tiles
    tile_n, tile_k = locate_tile(pid % tiles, row_tiles, column_tiles, TILE.group)
    part = pid // tiles  # counts (split, batch)
    batch = as_offset(part % batches, OPTIONS)
    split = part // batches
    part = as_offset(part, OPTIONS)

    offs_n = offsets(tile_n * BLOCK_N, BLOCK_N, OPTIONS)
    offs_k = offsets(tile_k * BLOCK_K, BLOCK_K, OPTIONS)
    mask_n = offs_n < N
    mask_k = offs_k < K
    first_row = split * rows_per_split
    last_row = min(first_row + rows_per_split, M)

    grad_output_columns = grad_output.ptr + batch * grad_output.stride_batch
    grad_output_columns += offs_n[:, None] * grad_output.stride_column
    input_columns = input.ptr + batch * input.stride_batch + offs_k[None, :] * input.stride_column
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC_DTYPE)
    fresh = acc + zero
    acc = empty_sum(acc, OPTIONS)
    # 16-bit tiles are summed as a product with ones, 16 columns of which are the narrowest that
    # matrix instructions take. It keeps grad_output in shared memory: where a tile of an
    # asynchronous product is read into registers too, Triton 3.6 to 3.9 give it a buffer too few,
    # and sm_90 overwrites it while the product still reads it.
    if SUM_BY_DOT:
        acc_bias = tl.zeros((BLOCK_N, 16), dtype=ACC_DTYPE)
    else:
        acc_bias = tl.zeros((BLOCK_N,), dtype=ACC_DTYPE)
    for row in range(first_row, last_row, BLOCK_M):
        offs_m = offsets(row, BLOCK_M, OPTIONS)
        mask_m = offs_m < last_row
        grad_output_rows = row_offsets(grad_output, offs_m)
        input_rows = row_offsets(input, offs_m)
        grad_output_tile = tl.load(
            grad_output_columns + grad_output_rows[None, :],
            mask=mask_n[:, None] & mask_m[None, :],
            other=0.0,
        )
        input_tile = tl.load(
            input_columns + input_rows[:, None], mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        if grad_bias_ptr is not None and not SUM_BY_DOT:
            if tile_k == 0:
                acc_bias += tl.sum(grad_output_tile, axis=1)
        grad_output_tile = prepare_operand(grad_output_tile, OPTIONS)
        input_tile = prepare_operand(input_tile, OPTIONS)
        acc = add_product(acc, grad_output_tile, input_tile, fresh, OPTIONS)
        if grad_bias_ptr is not None and SUM_BY_DOT:
            if tile_k == 0:
                ones = tl.full((BLOCK_M, 16), 1.0, grad_output_tile.dtype)
                acc_bias = tl.dot(grad_output_tile, ones, acc_bias)

    acc = total_of(acc, OPTIONS)
    weight_ptr = partial_weight_ptr if SPLIT else grad_weight_ptr
    bias_ptr = partial_bias_ptr if SPLIT else grad_bias_ptr
    weight_rows = weight_ptr + part * N * K + offs_n[:, None] * K
    if ACCUMULATE and not SPLIT:
        # In halves: all that is there would take as many registers as the sums.
        parts = halves(acc)
        COLUMNS: tl.constexpr = BLOCK_K // 2
        for half in tl.static_range(2):
            offs_half = tile_k * BLOCK_K + half * COLUMNS + tl.arange(0, COLUMNS)
            mask_half = mask_n[:, None] & (offs_half < K)[None, :]
            weight_ptrs = weight_rows + offs_half.to(offs_k.dtype)[None, :]
            there = tl.load(weight_ptrs, mask=mask_half, other=0.0)
            tl.store(weight_ptrs, there + parts[half], mask=mask_half)
    else:
        mask_tile = mask_n[:, None] & mask_k[None, :]
        store_rounded(weight_rows + offs_k[None, :], acc, mask_tile)
    if grad_bias_ptr is not None:
        if tile_k == 0:
            # The 16 columns of a product with ones are all the sum.
            grad_bias = tl.max(acc_bias, axis=1) if SUM_BY_DOT else acc_bias
            store_rounded(bias_ptr + part * N + offs_n, grad_bias, mask_n)
    if SPLIT:
        if arrives_last(counter_ptr + pid % (tiles * batches), splits):
            layers = as_offset(batches, OPTIONS)
            for row in range(0, BLOCK_N, SUM_ROWS):
                offs_row = offsets(tile_n * BLOCK_N + row, SUM_ROWS, OPTIONS)
                offs = batch * N * K + offs_row[:, None] * K + offs_k[None, :]
                mask = (offs_row < N)[:, None] & mask_k[None, :]
                total = sum_slices(partial_weight_ptr + offs, mask, splits, layers * N * K)
                if ACCUMULATE:
                    total += tl.load(grad_weight_ptr + offs, mask=mask, other=0.0)
                store_rounded(grad_weight_ptr + offs, total, mask)
            if grad_bias_ptr is not None:
                if tile_k == 0:
                    offs = batch * N + offs_n
                    bias = sum_slices(partial_bias_ptr + offs, mask_n, splits, layers * N)
                    store_rounded(grad_bias_ptr + offs, bias, mask_n)
