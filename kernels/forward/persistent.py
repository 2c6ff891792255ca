"""Forward by a program a multiprocessor that walks tiles, which it loads by descriptors.

For many rows on GPUs with a tensor memory accelerator: NVIDIA's Hopper and Blackwell.
"""

import dataclasses

import triton
import triton.language as tl

from ..configs.config import Config
from ..language.epilogue import load_bias, store_activated
from ..language.indexing import halves, locate_tile, offsets
from ..language.precision import prepare_operand
from ..launching.launch import transposed_in_memory
from ..launching.shared_sums import KernelLaunch
from .problem import ForwardProblem


@triton.jit
def describe_matrix(
    matrix, rows, K, TRANSPOSED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A descriptor of a (rows, K) matrix, as it lies in memory: transposed where K is not inner."""
    if TRANSPOSED:
        return tl.make_tensor_descriptor(
            matrix.ptr, [K, rows], [matrix.stride_column, 1], [BLOCK_K, BLOCK_ROWS]
        )
    else:
        return tl.make_tensor_descriptor(
            matrix.ptr, [rows, K], [matrix.stride_row, 1], [BLOCK_ROWS, BLOCK_K]
        )


@triton.jit
def load_tile(descriptor, first_row, first_k, TRANSPOSED: tl.constexpr):
    """The (BLOCK_ROWS, BLOCK_K) tile that starts there, with zeros outside of the matrix.

    Matrix instructions take 16-bit operands of either order from shared memory: nothing is copied.
    """
    if TRANSPOSED:
        return descriptor.load([first_k, first_row]).T
    else:
        return descriptor.load([first_row, first_k])


@triton.jit
def persistent_forward_kernel(
    input,
    weight,
    bias,
    output_ptr,
    preactivation_ptr,
    M,
    N,
    K,
    zero,
    INPUT_TRANSPOSED: tl.constexpr,
    WEIGHT_TRANSPOSED: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """output[m, n] = activation(sum_k input[m, k] * weight[n, k] + bias[n]), 16 bits an element.

    Computes every num_programs-th tile of BLOCK_M x BLOCK_N.

    input (M, K) and weight (N, K) have rows that follow one another, or, TRANSPOSED, columns; the
    rest is as in `tiled.forward_tile`, for one layer.
    """
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    input_descriptor = describe_matrix(input, M, K, INPUT_TRANSPOSED, BLOCK_M, BLOCK_K)
    weight_descriptor = describe_matrix(weight, N, K, WEIGHT_TRANSPOSED, BLOCK_N, BLOCK_K)
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    # Flattened, the loop over tiles and the one over K are one, and the next tile's first steps
    # are loaded while this one is stored. What is stored in parts takes fewer registers at a time,
    # and threads exchange less of it at once through shared memory.
    for tile in tl.range(
        tl.program_id(0),
        row_tiles * column_tiles,
        tl.num_programs(0),
        flatten=True,
    ):
        tile_m, tile_n = locate_tile(tile, row_tiles, column_tiles, TILE.group)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            input_tile = load_tile(input_descriptor, first_m, k * BLOCK_K, INPUT_TRANSPOSED)
            weight_tile = load_tile(weight_descriptor, first_n, k * BLOCK_K, WEIGHT_TRANSPOSED)
            acc = tl.dot(
                prepare_operand(input_tile, OPTIONS), prepare_operand(weight_tile, OPTIONS).T, acc
            )

        COLUMNS: tl.constexpr = BLOCK_N // EPILOGUE_PARTS
        if EPILOGUE_PARTS == 1:
            parts = (acc,)
        elif EPILOGUE_PARTS == 2:
            parts = halves(acc)
        else:
            tl.static_assert(
                EPILOGUE_PARTS == 4, "a tile is stored whole, in halves or in quarters"
            )
            left, right = halves(acc)
            parts = halves(left) + halves(right)
        offs_m = offsets(first_m, BLOCK_M, OPTIONS)
        for part in tl.static_range(EPILOGUE_PARTS):
            total = parts[part]
            offs_n = offsets(first_n + part * COLUMNS, COLUMNS, OPTIONS)
            if bias is not None:
                total += load_bias(bias, 0, offs_n, offs_n < N).to(tl.float32)[None, :]
            offs = offs_m[:, None] * N + offs_n[None, :]
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            store_activated(total, output_ptr, preactivation_ptr, offs, mask, OPTIONS)


def plan(problem: ForwardProblem, config: Config) -> KernelLaunch:
    """A program a multiprocessor, or a tile where those are fewer."""
    (m, n, k), itemsize = (problem.rows.size, problem.n, problem.k), problem.output.dtype.itemsize
    transposed = {
        "INPUT_TRANSPOSED": transposed_in_memory(m, k, problem.rows.matrix, itemsize),
        "WEIGHT_TRANSPOSED": transposed_in_memory(n, k, problem.weight, itemsize),
    }
    assert None not in transposed.values(), "an operand cannot be described"
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    launch = problem.launch(config, min(problem.target.multiprocessors, tiles))
    constants = launch.constants | transposed | {"EPILOGUE_PARTS": config.epilogue_parts}
    return KernelLaunch(
        persistent_forward_kernel, dataclasses.replace(launch, constants=constants, describes=True)
    )
