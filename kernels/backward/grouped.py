"""grad_input and grad_weight by one grid: tiles of either, which need nothing of each other."""

import triton
import triton.language as tl

from ..forward.tiled import forward_tile
from .grad_weight_tile import backward_weight_tile


@triton.jit
def linear_backward_kernel(
    grad_output_ptr,
    input_ptr,
    weight_ptr,
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
    grad_output_inner_size,
    input_inner_size,
    stride_gb,
    stride_go,
    stride_gm,
    stride_gn,
    stride_ib,
    stride_io,
    stride_im,
    stride_ik,
    stride_wb,
    stride_wn,
    stride_wk,
    weight_programs,
    first_program,
    SECOND_PRODUCT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    NESTED_GRAD_OUTPUT: tl.constexpr,
    NESTED_INPUT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUM_STEPS_APART: tl.constexpr,
    SUM_BY_DOT: tl.constexpr,
    INPUT_BLOCK_M: tl.constexpr,
    INPUT_BLOCK_N: tl.constexpr,
    INPUT_BLOCK_K: tl.constexpr,
    INPUT_GROUP: tl.constexpr,
    WEIGHT_BLOCK_M: tl.constexpr,
    WEIGHT_BLOCK_N: tl.constexpr,
    WEIGHT_BLOCK_K: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
):
    """grad_weight and grad_bias in `weight_programs` programs, grad_input in the others.

    grad_input[b, m, k] = sum_n grad_output[b, m, n] * weight[b, n, k], in tiles of `forward_tile`;
    the others' are those of `backward_weight_tile`. Both read grad_output, and neither waits for
    the other.

    SECOND_PRODUCT takes two layers of N features each, side by side in grad_output, grad_weight and
    grad_bias: grad_input is the sum of both products.

    The programs start at the `first_program`-th, so that the longer ones of the two come first:
    whichever come last leave multiprocessors idle for as long as one of them runs.
    """
    pid = (tl.program_id(0) + first_program) % tl.num_programs(0)
    if pid < weight_programs:
        backward_weight_tile(
            pid,
            grad_output_ptr,
            input_ptr,
            grad_weight_ptr,
            grad_bias_ptr,
            partial_weight_ptr,
            partial_bias_ptr,
            counter_ptr,
            M,
            2 * N if SECOND_PRODUCT else N,
            K,
            splits,
            rows_per_split,
            batches,
            zero,
            grad_output_inner_size,
            input_inner_size,
            stride_gb,
            stride_go,
            stride_gm,
            stride_gn,
            stride_ib,
            stride_io,
            stride_im,
            stride_ik,
            HAS_BIAS=HAS_BIAS,
            SPLIT=SPLIT,
            ACCUMULATE=ACCUMULATE,
            NESTED_GRAD_OUTPUT=NESTED_GRAD_OUTPUT,
            NESTED_INPUT=NESTED_INPUT,
            OFFSET_DTYPE=OFFSET_DTYPE,
            ACC_DTYPE=ACC_DTYPE,
            INPUT_PRECISION=INPUT_PRECISION,
            UPCAST=UPCAST,
            SUM_STEPS_APART=SUM_STEPS_APART,
            SUM_BY_DOT=SUM_BY_DOT,
            BLOCK_M=WEIGHT_BLOCK_M,
            BLOCK_N=WEIGHT_BLOCK_N,
            BLOCK_K=WEIGHT_BLOCK_K,
            GROUP=WEIGHT_GROUP,
        )
    else:
        forward_tile(
            pid - weight_programs,
            grad_output_ptr,
            weight_ptr,
            grad_output_ptr + tl.full((), N, OFFSET_DTYPE) * stride_gn,
            second_weight_ptr,
            None,
            grad_input_ptr,
            None,
            M,
            K,
            N,
            zero,
            grad_output_inner_size,
            stride_gb,
            stride_go,
            stride_gm,
            stride_gn,
            stride_wb,
            stride_wk,
            stride_wn,
            0,
            0,
            SECOND_PRODUCT=SECOND_PRODUCT,
            HAS_BIAS=False,
            ACTIVATION=None,
            SAVE_PREACTIVATION=False,
            NESTED_INPUT=NESTED_GRAD_OUTPUT,
            OFFSET_DTYPE=OFFSET_DTYPE,
            ACC_DTYPE=ACC_DTYPE,
            INPUT_PRECISION=INPUT_PRECISION,
            UPCAST=UPCAST,
            SUM_STEPS_APART=SUM_STEPS_APART,
            BLOCK_M=INPUT_BLOCK_M,
            BLOCK_N=INPUT_BLOCK_N,
            BLOCK_K=INPUT_BLOCK_K,
            GROUP=INPUT_GROUP,
        )
