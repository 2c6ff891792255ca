"""grad_input and grad_weight by one grid: tiles of either, which need nothing of each other."""

import triton
import triton.language as tl

from ..forward.tiled import forward_tile
from ..language.indexing import as_offset
from .grad_weight_tile import backward_weight_tile


@triton.jit
def linear_backward_kernel(
    grad_output,
    input,
    weight,
    second_weight_ptr,
    grad_input_ptr,
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
    weight_programs,
    first_program,
    ACCUMULATE: tl.constexpr,
    OPTIONS: tl.constexpr,
    INPUT_TILE: tl.constexpr,
    WEIGHT_TILE: tl.constexpr,
):
    """grad_weight and grad_bias in `weight_programs` programs, grad_input in the others.

    grad_input[b, m, k] = sum_n grad_output[b, m, n] * weight[b, k, n], in tiles of `forward_tile`,
    of the weight transposed; the others' are those of `backward_weight_tile`. Both read
    grad_output, and neither waits for the other.

    Where there is a second weight, there are two layers of N features each, side by side in
    grad_output, grad_weight and grad_bias: grad_input is the sum of both products.

    The programs start at the `first_program`-th, so that the longer ones of the two come first:
    whichever come last leave multiprocessors idle for as long as one of them runs.
    """
    pid = (tl.program_id(0) + first_program) % tl.num_programs(0)
    if pid < weight_programs:
        backward_weight_tile(
            pid,
            grad_output,
            input,
            grad_weight_ptr,
            grad_bias_ptr,
            partial_weight_ptr,
            partial_bias_ptr,
            counter_ptr,
            M,
            N if second_weight_ptr is None else 2 * N,
            K,
            splits,
            rows_per_split,
            batches,
            zero,
            ACCUMULATE,
            OPTIONS,
            WEIGHT_TILE,
        )
    else:
        forward_tile(
            pid - weight_programs,
            grad_output,
            weight,
            grad_output.ptr + as_offset(N, OPTIONS) * grad_output.stride_column,
            second_weight_ptr,
            None,
            grad_input_ptr,
            None,
            M,
            K,
            N,
            zero,
            OPTIONS,
            INPUT_TILE,
        )
