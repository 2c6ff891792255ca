"""Forward by a program a multiprocessor that walks tiles, which it loads by descriptors.

For many rows on GPUs with a tensor memory accelerator: NVIDIA's Hopper and Blackwell.
"""

import triton
import triton.language as tl

from ..configs.config import Config
from ..language.epilogue import activate
from ..language.indexing import halves, locate_tile
from ..language.precision import prepare_operand
from ..launching.launch import Launch, stored
from .problem import ForwardLaunch, ForwardProblem

# There is one kind of rows, and of arithmetic.
UNUSED_CONSTANTS = {"NESTED_INPUT", "ACC_DTYPE", "INPUT_PRECISION", "SUM_STEPS_APART"}


@triton.jit
def describe_matrix(
    ptr,
    rows,
    K,
    stride,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A descriptor of a (rows, K) matrix, as it lies in memory: transposed where K is not inner."""
    if TRANSPOSED:
        return tl.make_tensor_descriptor(ptr, [K, rows], [stride, 1], [BLOCK_K, BLOCK_ROWS])
    else:
        return tl.make_tensor_descriptor(ptr, [rows, K], [stride, 1], [BLOCK_ROWS, BLOCK_K])


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
def store_part(
    acc,
    bias_ptr,
    output_ptr,
    preactivation_ptr,
    first_m,
    first_n,
    M,
    N,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PREACTIVATION: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Finishes and stores the BLOCK_M x COLUMNS sums that start at row first_m, column first_n."""
    offs_m = (first_m + tl.arange(0, BLOCK_M)).to(OFFSET_DTYPE)
    offs_n = (first_n + tl.arange(0, COLUMNS)).to(OFFSET_DTYPE)
    mask_m = offs_m < M
    mask_n = offs_n < N
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bn, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if SAVE_PREACTIVATION:
        tl.store(preactivation_ptr + offs, acc.to(preactivation_ptr.dtype.element_ty), mask=mask)
    if ACTIVATION is not None:
        acc = activate(acc, ACTIVATION)
    tl.store(output_ptr + offs, acc.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def persistent_forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    preactivation_ptr,
    M,
    N,
    K,
    stride_input,
    stride_weight,
    stride_bn,
    INPUT_TRANSPOSED: tl.constexpr,
    WEIGHT_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PREACTIVATION: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,
):
    """output[m, n] = activation(sum_k input[m, k] * weight[n, k] + bias[n]), 16 bits an element.

    Computes every num_programs-th tile of BLOCK_M x BLOCK_N.

    input (M, K) and weight (N, K) have rows that follow one another at stride_input and
    stride_weight, or, TRANSPOSED, columns; bias (N) has any stride; output (M, N) is contiguous,
    and so is the pre-activation, which is stored too if asked for.
    """
    input_descriptor = describe_matrix(
        input_ptr, M, K, stride_input, INPUT_TRANSPOSED, BLOCK_M, BLOCK_K
    )
    weight_descriptor = describe_matrix(
        weight_ptr, N, K, stride_weight, WEIGHT_TRANSPOSED, BLOCK_N, BLOCK_K
    )
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
        tile_m, tile_n = locate_tile(tile, row_tiles, column_tiles, GROUP)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            input_tile = load_tile(input_descriptor, first_m, k * BLOCK_K, INPUT_TRANSPOSED)
            weight_tile = load_tile(weight_descriptor, first_n, k * BLOCK_K, WEIGHT_TRANSPOSED)
            acc = tl.dot(
                prepare_operand(input_tile, "ieee", UPCAST),
                prepare_operand(weight_tile, "ieee", UPCAST).T,
                acc,
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
        for part in tl.static_range(EPILOGUE_PARTS):
            store_part(
                parts[part],
                bias_ptr,
                output_ptr,
                preactivation_ptr,
                first_m,
                first_n + part * COLUMNS,
                M,
                N,
                stride_bn,
                HAS_BIAS=HAS_BIAS,
                ACTIVATION=ACTIVATION,
                SAVE_PREACTIVATION=SAVE_PREACTIVATION,
                OFFSET_DTYPE=OFFSET_DTYPE,
                BLOCK_M=BLOCK_M,
                COLUMNS=COLUMNS,
            )


def plan(problem: ForwardProblem, config: Config) -> ForwardLaunch:
    """A program a multiprocessor, or a tile where those are fewer."""
    rows, itemsize = problem.rows, problem.output.dtype.itemsize
    _, stride_wn, stride_wk = problem.weight_strides
    input = stored(rows.size, problem.k, rows.stride_inner, rows.stride_feature, itemsize)
    weight = stored(problem.n, problem.k, stride_wn, stride_wk, itemsize)
    assert input is not None, "input cannot be described"
    assert weight is not None, "weight cannot be described"
    row_tiles = triton.cdiv(rows.size, config.block_m)
    column_tiles = triton.cdiv(problem.n, config.block_n)
    constants = {
        name: value
        for name, value in problem.constants_with(config).items()
        if name not in UNUSED_CONSTANTS
    }
    return ForwardLaunch(
        persistent_forward_kernel,
        Launch(
            (min(problem.target.multiprocessors, row_tiles * column_tiles),),
            (rows.size, problem.n, problem.k, input.stride, weight.stride, problem.bias_strides[1]),
            constants
            | {
                "INPUT_TRANSPOSED": input.transposed,
                "WEIGHT_TRANSPOSED": weight.transposed,
                "EPILOGUE_PARTS": config.epilogue_parts,
            },
            describes=True,
        ),
    )
