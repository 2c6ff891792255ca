"""Forward: output = input @ weight.T + bias, for any strides.

There may be a batch of independent layers.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .configs import Config, choose
from .epilogue import activate
from .indexing import locate_rows, locate_tile
from .operands import Activation, check_activation, check_forward_shapes, check_same_kind
from .precision import add_product, prepare_operand


@triton.jit
def add_rows_by_rows(
    acc,
    fresh,
    input_ptrs,
    weight_ptrs,
    mask_m,
    mask_n,
    offs_k,
    K,
    stride_ik,
    stride_wk,
    OFFSET_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUM_STEPS_APART: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`acc + input @ weight.T` for a tile's rows of input and of weight, BLOCK_K columns a step.

    input_ptrs (BLOCK_M, BLOCK_K) and weight_ptrs (BLOCK_K, BLOCK_N) point to the first step.
    """
    # A scalar of the offsets' type, so that BLOCK_K * stride cannot overflow
    # where offsets are 64 bits wide.
    step_k = tl.full((), BLOCK_K, OFFSET_DTYPE)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        mask_k = offs_k < K - k * BLOCK_K
        input_tile = tl.load(input_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        weight_tile = tl.load(weight_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = add_product(
            acc,
            prepare_operand(input_tile, INPUT_PRECISION, UPCAST),
            prepare_operand(weight_tile, INPUT_PRECISION, UPCAST),
            fresh,
            INPUT_PRECISION=INPUT_PRECISION,
            ACC_DTYPE=ACC_DTYPE,
            SUM_STEPS_APART=SUM_STEPS_APART,
        )
        input_ptrs += step_k * stride_ik
        weight_ptrs += step_k * stride_wk
    return acc


@triton.jit
def forward_tile(
    pid,
    input_ptr,
    weight_ptr,
    second_input_ptr,
    second_weight_ptr,
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
    SECOND_PRODUCT: tl.constexpr,
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

    Computes one BLOCK_M x BLOCK_N tile, the `pid`-th.

    input (B, M, K), weight (B, N, K) and bias (B, N) have any strides, 0 included; output (B, M, N)
    is contiguous, and so is the pre-activation, which is stored too if asked for. SECOND_PRODUCT
    adds that of a second input and weight, of the shapes and strides of the first. `zero` is 0,
    which the compiler does not know.
    """
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = row_tiles * column_tiles
    batch = (pid // tiles).to(OFFSET_DTYPE)
    tile_m, tile_n = locate_tile(pid % tiles, row_tiles, column_tiles, GROUP)

    offs_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(OFFSET_DTYPE)
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(OFFSET_DTYPE)
    offs_k = tl.arange(0, BLOCK_K).to(OFFSET_DTYPE)
    mask_m = offs_m < M
    mask_n = offs_n < N

    input_rows = locate_rows(offs_m, input_inner_size, stride_io, stride_im, NESTED_INPUT)
    input_offs = batch * stride_ib + input_rows[:, None] + offs_k[None, :] * stride_ik
    weight_offs = batch * stride_wb + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    fresh = acc + zero
    acc = add_rows_by_rows(
        acc,
        fresh,
        input_ptr + input_offs,
        weight_ptr + weight_offs,
        mask_m,
        mask_n,
        offs_k,
        K,
        stride_ik,
        stride_wk,
        OFFSET_DTYPE=OFFSET_DTYPE,
        ACC_DTYPE=ACC_DTYPE,
        INPUT_PRECISION=INPUT_PRECISION,
        UPCAST=UPCAST,
        SUM_STEPS_APART=SUM_STEPS_APART,
        BLOCK_K=BLOCK_K,
    )
    if SECOND_PRODUCT:
        acc = add_rows_by_rows(
            acc,
            fresh,
            second_input_ptr + input_offs,
            second_weight_ptr + weight_offs,
            mask_m,
            mask_n,
            offs_k,
            K,
            stride_ik,
            stride_wk,
            OFFSET_DTYPE=OFFSET_DTYPE,
            ACC_DTYPE=ACC_DTYPE,
            INPUT_PRECISION=INPUT_PRECISION,
            UPCAST=UPCAST,
            SUM_STEPS_APART=SUM_STEPS_APART,
            BLOCK_K=BLOCK_K,
        )

    if HAS_BIAS:
        bias = tl.load(bias_ptr + batch * stride_bb + offs_n * stride_bn, mask=mask_n, other=0.0)
        acc += bias.to(ACC_DTYPE)[None, :]

    offs = batch * M * N + offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if SAVE_PREACTIVATION:
        tl.store(preactivation_ptr + offs, acc.to(preactivation_ptr.dtype.element_ty), mask=mask)
    if ACTIVATION is not None:
        acc = activate(acc, ACTIVATION)
    tl.store(output_ptr + offs, acc.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_forward_kernel(
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
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUM_STEPS_APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`forward_tile`, one a program."""
    forward_tile(
        tl.program_id(0),
        input_ptr,
        weight_ptr,
        None,
        None,
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
        SECOND_PRODUCT=False,
        HAS_BIAS=HAS_BIAS,
        ACTIVATION=ACTIVATION,
        SAVE_PREACTIVATION=SAVE_PREACTIVATION,
        NESTED_INPUT=NESTED_INPUT,
        OFFSET_DTYPE=OFFSET_DTYPE,
        ACC_DTYPE=ACC_DTYPE,
        INPUT_PRECISION=INPUT_PRECISION,
        UPCAST=UPCAST,
        SUM_STEPS_APART=SUM_STEPS_APART,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        GROUP=GROUP,
    )


class ForwardLaunch(NamedTuple):
    """What `linear_forward` launches, what it returns, and whether input is copied first."""

    config: Config
    kernel: launch.Launch
    output: launch.Operand
    copy_input: bool


@functools.lru_cache(maxsize=4096)
def plan_forward(
    operands: tuple[launch.Fields, launch.Fields, launch.Fields | None],
    precision: str,
    activation: Activation | None,
    save_preactivation: bool,
    config: Config | None,
) -> ForwardLaunch:
    """How `linear_forward` goes about tensors like these: `launch.describe(input, weight, bias)`.

    Cached, because it takes longer than all the rest of a call.
    """
    input, weight = launch.Operand(*operands[0]), launch.Operand(*operands[1])
    bias = None if operands[2] is None else launch.Operand(*operands[2])
    check_activation(activation)
    check_same_kind(input=input, weight=weight, bias=bias)
    check_forward_shapes(input.shape, weight.shape, None if bias is None else bias.shape)

    target = launch.target_of(input.device)
    batched = len(weight.shape) == 3
    batch = weight.shape[0] if batched else 1
    out_features, in_features = weight.shape[-2:]
    rows = launch.rows_of(input, batched=batched)
    output = input.contiguous(*input.shape[:-1], out_features)
    if config is None:
        aligned = launch.aligned(rows.operand, weight)
        config = choose(
            "forward",
            batch,
            rows.size,
            out_features,
            in_features,
            input.dtype,
            precision,
            aligned,
            target,
            activation is not None,
        )
    stride_wb, stride_wn, stride_wk = launch.batch_strides(weight, dims=3)
    stride_bb, stride_bn = (0, 0) if bias is None else launch.batch_strides(bias, dims=2)
    row_tiles, column_tiles = (
        triton.cdiv(rows.size, config.block_m),
        triton.cdiv(out_features, config.block_n),
    )
    return ForwardLaunch(
        config,
        launch.Launch(
            grid=(batch * row_tiles * column_tiles,),
            scalars=(
                rows.size,
                out_features,
                in_features,
                0.0,
                rows.inner_size,
                rows.stride_batch,
                rows.stride_outer,
                rows.stride_inner,
                rows.stride_feature,
                stride_wb,
                stride_wn,
                stride_wk,
                stride_bb,
                stride_bn,
            ),
            constants={
                "HAS_BIAS": bias is not None,
                "ACTIVATION": activation,
                "SAVE_PREACTIVATION": save_preactivation,
                "NESTED_INPUT": rows.nested,
                "OFFSET_DTYPE": launch.offset_dtype(rows.operand, weight, bias, output),
                **launch.product_constants(input.dtype, precision, config, target),
            },
        ),
        output,
        rows.copied,
    )


def linear_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    precision: str = "ieee",
    config: Config | None = None,
) -> Tensor:
    """Computes `input @ weight.mT + bias` in one launch.

    Accumulates in float32 (float64 for float64) and adds the bias there, before the one rounding to
    the output dtype.

    Args:
        input: (*, K), or (B, M, K) where weight is batched; float16, bfloat16, float32 or float64;
            any strides.
        weight: (N, K), or (B, N, K) for B independent layers; dtype and device of input; any
            strides.
        bias: None, (N,), or (B, N) where weight is batched; dtype and device of input.
        precision: how float32 products are formed: "ieee" or "tf32". Other dtypes ignore it.
        config: block sizes to use; None chooses by shape, dtype and device.

    Returns:
        (*, N) or (B, M, N), contiguous, in input's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices are none of these, or the kernels cannot run on the
            device.
    """
    plan = plan_forward(launch.describe(input, weight, bias), precision, None, False, config)
    if plan.copy_input:
        input = input.contiguous()
    output = launch.allocate(input, plan.output)
    if plan.kernel.grid != (0,):
        launch.run(linear_forward_kernel, plan.kernel, (input, weight, bias, output, None))
    return output


def linear_activation_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    save_preactivation: bool,
    *,
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes `activation(input @ weight.mT + bias)` in one launch.

    The activation is applied in the accumulator, before the one rounding to the output dtype, so
    that the pre-activation is neither rounded nor, unless it is to be saved, written: against a
    product followed by the activation that spares a write and a read of (*, N), or a read.

    Args:
        activation: one of `operands.ACTIVATIONS`.
        save_preactivation: whether it is wanted too, for the backward of what needs it.
        input, weight, bias, precision, config: as in `linear_forward`.

    Returns:
        The output and the pre-activation or None, as `linear_forward` returns its output.

    Raises:
        RuntimeError: as in `linear_forward`.
    """
    operands = launch.describe(input, weight, bias)
    plan = plan_forward(operands, precision, activation, save_preactivation, config)
    if plan.copy_input:
        input = input.contiguous()
    output = launch.allocate(input, plan.output)
    preactivation = launch.allocate(input, plan.output) if save_preactivation else None
    if plan.kernel.grid != (0,):
        pointers = (input, weight, bias, output, preactivation)
        launch.run(linear_forward_kernel, plan.kernel, pointers)
    return output, preactivation
