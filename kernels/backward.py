"""Backward: grad_input, grad_weight and grad_bias.

grad_input is a forward through the transposed weight; grad_weight and grad_bias come from one pass.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .choose import choose, choose_splits
from .configs import Config
from .forward import linear_forward, plan_forward
from .indexing import locate_rows, locate_tile
from .operands import check_backward_shapes, check_same_kind
from .precision import add_product, prepare_operand
from .tiled import forward_tile

# Elements of grad_weight that one program sums over the splits.
SUM_BLOCK = 512


def linear_backward_input(
    grad_output: Tensor,
    weight: Tensor,
    *,
    precision: str = "ieee",
    config: Config | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Computes `grad_input = grad_output @ weight`.

    This is the forward product with the roles of in_features and out_features exchanged, and
    strides make that free.

    Args:
        grad_output: (*, N), or (B, M, N) where weight is batched; any strides.
        weight: (N, K) or (B, N, K); dtype and device of grad_output; any strides.
        precision, config, batch_invariant: as in `linear_forward`, whose N is this K.

    Returns:
        (*, K) or (B, M, K), contiguous, accumulated in float32 (float64 for float64).
    """
    return linear_forward(
        grad_output,
        weight.mT,
        precision=precision,
        config=config,
        batch_invariant=batch_invariant,
    )


@triton.jit
def linear_backward_weight_kernel(
    grad_output_ptr,
    input_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    M,
    N,
    K,
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
    HAS_BIAS: tl.constexpr,
    NESTED_GRAD_OUTPUT: tl.constexpr,
    NESTED_INPUT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SUM_STEPS_APART: tl.constexpr,
    SUM_BY_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """grad_weight[b, n, k] = sum_m grad_output[b, m, n] * input[b, m, k].

    In the same pass, grad_bias[b, n] = sum_m grad_output[b, m, n].

    One program computes one BLOCK_N x BLOCK_K tile of one batch over one split's rows, and stores
    it to that split's own slice: grad_weight is (splits, B, N, K) and grad_bias (splits, B, N),
    both contiguous. Programs of the first column of tiles also sum the grad_output tiles that they
    hold, so that grad_bias reads nothing of its own.
    """
    row_tiles = tl.cdiv(N, BLOCK_N)
    column_tiles = max(tl.cdiv(K, BLOCK_K), 1)  # K = 0 has no grad_weight, and still a grad_bias
    tiles = row_tiles * column_tiles
    tile_n, tile_k = locate_tile(tl.program_id(0) % tiles, row_tiles, column_tiles, GROUP)
    part = tl.program_id(0) // tiles  # counts (split, batch)
    batch = (part % batches).to(OFFSET_DTYPE)
    split = part // batches
    part = part.to(OFFSET_DTYPE)

    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(OFFSET_DTYPE)
    offs_k = (tile_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(OFFSET_DTYPE)
    mask_n = offs_n < N
    mask_k = offs_k < K
    first_row = split * rows_per_split
    last_row = min(first_row + rows_per_split, M)

    grad_output_columns = grad_output_ptr + batch * stride_gb + offs_n[:, None] * stride_gn
    input_columns = input_ptr + batch * stride_ib + offs_k[None, :] * stride_ik
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC_DTYPE)
    fresh = acc + zero
    # 16-bit tiles are summed as a product with ones, 16 columns of which are the narrowest that
    # matrix instructions take. It keeps grad_output in shared memory: where a tile of an
    # asynchronous product is read into registers too, Triton 3.6 to 3.9 give it a buffer too few,
    # and sm_90 overwrites it while the product still reads it.
    if SUM_BY_DOT:
        acc_bias = tl.zeros((BLOCK_N, 16), dtype=ACC_DTYPE)
    else:
        acc_bias = tl.zeros((BLOCK_N,), dtype=ACC_DTYPE)
    for row in range(first_row, last_row, BLOCK_M):
        offs_m = (row + tl.arange(0, BLOCK_M)).to(OFFSET_DTYPE)
        mask_m = offs_m < last_row
        grad_output_rows = locate_rows(
            offs_m, grad_output_inner_size, stride_go, stride_gm, NESTED_GRAD_OUTPUT
        )
        input_rows = locate_rows(offs_m, input_inner_size, stride_io, stride_im, NESTED_INPUT)
        grad_output_tile = tl.load(
            grad_output_columns + grad_output_rows[None, :],
            mask=mask_n[:, None] & mask_m[None, :],
            other=0.0,
        )
        input_tile = tl.load(
            input_columns + input_rows[:, None], mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        if HAS_BIAS and not SUM_BY_DOT:
            if tile_k == 0:
                acc_bias += tl.sum(grad_output_tile, axis=1)
        grad_output_tile = prepare_operand(grad_output_tile, INPUT_PRECISION, UPCAST)
        input_tile = prepare_operand(input_tile, INPUT_PRECISION, UPCAST)
        acc = add_product(
            acc,
            grad_output_tile,
            input_tile,
            fresh,
            INPUT_PRECISION=INPUT_PRECISION,
            ACC_DTYPE=ACC_DTYPE,
            SUM_STEPS_APART=SUM_STEPS_APART,
        )
        if HAS_BIAS and SUM_BY_DOT:
            if tile_k == 0:
                ones = tl.full((BLOCK_M, 16), 1.0, grad_output_tile.dtype)
                acc_bias = tl.dot(grad_output_tile, ones, acc_bias)

    grad_weight_ptrs = grad_weight_ptr + part * N * K + offs_n[:, None] * K + offs_k[None, :]
    tl.store(
        grad_weight_ptrs,
        acc.to(grad_weight_ptr.dtype.element_ty),
        mask=mask_n[:, None] & mask_k[None, :],
    )
    if HAS_BIAS:
        if tile_k == 0:
            # The 16 columns of a product with ones are all the sum.
            grad_bias = tl.max(acc_bias, axis=1) if SUM_BY_DOT else acc_bias
            grad_bias_ptrs = grad_bias_ptr + part * N + offs_n
            tl.store(grad_bias_ptrs, grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def sum_splits_tile(
    pid,
    partial_weight_ptr,
    partial_bias_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    splits,
    weight_size,
    bias_size,
    SUM_BIAS: tl.constexpr,
    SUM_OFFSET_DTYPE: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """grad_weight[i] = sum_s partial_weight[s, i]; grad_bias likewise.

    The sum is in the order of s, then comes the one rounding. Computes SUM_BLOCK elements, the
    `pid`-th.
    """
    weight_blocks = tl.cdiv(weight_size, SUM_BLOCK)
    block = pid.to(SUM_OFFSET_DTYPE)
    if block < weight_blocks:
        offs = block * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
        mask = offs < weight_size
        acc = tl.zeros((SUM_BLOCK,), dtype=partial_weight_ptr.dtype.element_ty)
        for _ in range(splits):
            acc += tl.load(partial_weight_ptr + offs, mask=mask, other=0.0)
            partial_weight_ptr += weight_size
        tl.store(grad_weight_ptr + offs, acc.to(grad_weight_ptr.dtype.element_ty), mask=mask)
    elif SUM_BIAS:
        offs = (block - weight_blocks) * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
        mask = offs < bias_size
        acc = tl.zeros((SUM_BLOCK,), dtype=partial_bias_ptr.dtype.element_ty)
        for _ in range(splits):
            acc += tl.load(partial_bias_ptr + offs, mask=mask, other=0.0)
            partial_bias_ptr += bias_size
        tl.store(grad_bias_ptr + offs, acc.to(grad_bias_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_splits_kernel(
    partial_weight_ptr,
    partial_bias_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    splits,
    weight_size,
    bias_size,
    SUM_BIAS: tl.constexpr,
    SUM_OFFSET_DTYPE: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """`sum_splits_tile`, one a program."""
    sum_splits_tile(
        tl.program_id(0),
        partial_weight_ptr,
        partial_bias_ptr,
        grad_weight_ptr,
        grad_bias_ptr,
        splits,
        weight_size,
        bias_size,
        SUM_BIAS=SUM_BIAS,
        SUM_OFFSET_DTYPE=SUM_OFFSET_DTYPE,
        SUM_BLOCK=SUM_BLOCK,
    )


@triton.jit
def linear_forward_and_sums_kernel(
    input_ptr,
    weight_ptr,
    second_input_ptr,
    second_weight_ptr,
    bias_ptr,
    output_ptr,
    preactivation_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
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
    splits,
    weight_size,
    bias_size,
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
    SUM_BIAS: tl.constexpr,
    SUM_OFFSET_DTYPE: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """`sum_splits_tile` in the first programs, `forward_tile` in the others: a launch less.

    As the backward of a layer it is grad_input, and the sums that end its grad_weight.
    """
    sum_blocks = tl.cdiv(weight_size, SUM_BLOCK) + tl.cdiv(bias_size, SUM_BLOCK)
    if tl.program_id(0) < sum_blocks:
        sum_splits_tile(
            tl.program_id(0),
            partial_weight_ptr,
            partial_bias_ptr,
            grad_weight_ptr,
            grad_bias_ptr,
            splits,
            weight_size,
            bias_size,
            SUM_BIAS=SUM_BIAS,
            SUM_OFFSET_DTYPE=SUM_OFFSET_DTYPE,
            SUM_BLOCK=SUM_BLOCK,
        )
    else:
        forward_tile(
            tl.program_id(0) - sum_blocks,
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
            SECOND_PRODUCT=SECOND_PRODUCT,
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


class BackwardWeightLaunch(NamedTuple):
    """What `linear_backward_weight` launches and returns, and where the parts of a sum go.

    partial_weight, partial_bias: (splits, ...), None where there is one part, grad_weight itself.
    """

    config: Config
    kernel: launch.Launch
    grad_weight: launch.Operand
    grad_bias: launch.Operand
    partial_weight: launch.Operand | None
    partial_bias: launch.Operand
    copy_grad_output: bool
    copy_input: bool


@functools.lru_cache(maxsize=4096)
def plan_backward_weight(
    operands: tuple[launch.Fields, launch.Fields, None],
    bias: bool,
    batched: bool,
    precision: str,
    config: Config | None,
    splits: int | None,
) -> BackwardWeightLaunch:
    """How `linear_backward_weight` goes about tensors like `describe(grad_output, input)`."""
    grad_output, input = launch.Operand(*operands[0]), launch.Operand(*operands[1])
    check_same_kind(grad_output=grad_output, input=input)
    check_backward_shapes(grad_output.shape, input.shape, None, batched)

    dtype = input.dtype
    target = launch.target_of(input.device)
    grad_output_rows = launch.rows_of(grad_output, batched=batched)
    input_rows = launch.rows_of(input, batched=batched)
    layers = input.shape[:1] if batched else ()
    batch = input.shape[0] if batched else 1
    rows, out_features, in_features = input_rows.size, grad_output.shape[-1], input.shape[-1]
    if config is None:
        aligned = launch.aligned(grad_output_rows.operand, input_rows.operand)
        config = choose(
            "backward_weight",
            batch,
            rows,
            out_features,
            in_features,
            dtype,
            precision,
            aligned,
            target,
        )
    if splits is None:
        splits = choose_splits(config, batch, rows, out_features, in_features, target)
    # Splits hold whole blocks, which can leave fewer of them than was asked for.
    rows_per_split = config.block_m * triton.cdiv(rows, config.block_m * splits)
    splits = max(1, triton.cdiv(rows, rows_per_split)) if rows else 1
    partial_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    parts = input._replace(dtype=partial_dtype)
    partial_weight = parts.contiguous(splits, *layers, out_features, in_features)
    # in_features = 0 leaves no tile of grad_weight, and still a grad_bias to compute:
    # one column of tiles at least.
    tiles = triton.cdiv(out_features, config.block_n) * max(
        1, triton.cdiv(in_features, config.block_k)
    )
    return BackwardWeightLaunch(
        config,
        launch.Launch(
            grid=(splits * batch * tiles,),
            scalars=(
                rows,
                out_features,
                in_features,
                rows_per_split,
                batch,
                0.0,
                grad_output_rows.inner_size,
                input_rows.inner_size,
                grad_output_rows.stride_batch,
                grad_output_rows.stride_outer,
                grad_output_rows.stride_inner,
                grad_output_rows.stride_feature,
                input_rows.stride_batch,
                input_rows.stride_outer,
                input_rows.stride_inner,
                input_rows.stride_feature,
            ),
            constants={
                "HAS_BIAS": bias,
                "NESTED_GRAD_OUTPUT": grad_output_rows.nested,
                "NESTED_INPUT": input_rows.nested,
                "OFFSET_DTYPE": launch.offset_dtype(
                    grad_output_rows.operand, input_rows.operand, partial_weight
                ),
                "SUM_BY_DOT": dtype.itemsize == 2,
                **launch.product_constants(input.dtype, precision, config, target),
            },
        ),
        grad_weight=input.contiguous(*layers, out_features, in_features),
        grad_bias=input.contiguous(*layers, out_features),
        partial_weight=None if splits == 1 else partial_weight,
        partial_bias=parts.contiguous(splits, *layers, out_features),
        copy_grad_output=grad_output_rows.copied,
        copy_input=input_rows.copied,
    )


def linear_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    bias: bool = False,
    *,
    batched: bool = False,
    precision: str = "ieee",
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes `grad_weight = grad_output.mT @ input` and `grad_bias = grad_output.sum(rows)`.

    Both come from the same pass.

    Accumulates in float32 (float64 for float64) and rounds once. Where few tiles meet many rows,
    the rows are split over programs and a second launch adds their partial sums in a fixed order:
    the same call gives the same bits.

    Args:
        grad_output: (*, N), or (B, M, N) if batched; float16, bfloat16, float32 or float64; any
            strides.
        input: (*, K) or (B, M, K), with grad_output's leading dimensions, dtype and device; any
            strides.
        bias: whether grad_bias is wanted.
        batched: whether the first dimension counts independent layers.
        precision: how float32 products are formed: "ieee" or "tf32". grad_bias is a plain sum in
            any case.
        config: block sizes to use; None chooses by shape, dtype and device.
        splits: programs that share each tile's rows; None chooses.

    Returns:
        grad_weight (N, K) or (B, N, K), and grad_bias (N,) or (B, N), or None; contiguous, in
            input's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices are none of these, or the kernels cannot run on the
            device.
    """
    grad_weight, grad_bias, sums = backward_weight_but_sums(
        grad_output,
        input,
        bias,
        batched=batched,
        precision=precision,
        config=config,
        splits=splits,
    )
    if sums is not None:
        run_sums(sums)
    return grad_weight, grad_bias


# A launch of `sum_splits_kernel`: its pointers come with it.
Sums = tuple[launch.Launch, tuple[Tensor | None, ...]]


def run_sums(sums: Sums) -> None:
    launch.run(sum_splits_kernel, *sums)


@functools.lru_cache(maxsize=4096)
def _launch_of_sums(
    parts: launch.Launch | None, splits: int, weight_size: int, bias_size: int
) -> launch.Launch:
    """The launch that follows that of `parts`, whose dtypes and device it shares."""
    return launch.Launch(
        grid=(triton.cdiv(weight_size, SUM_BLOCK) + triton.cdiv(bias_size, SUM_BLOCK),),
        scalars=(splits, weight_size, bias_size),
        constants={
            "SUM_BIAS": bias_size > 0,
            "SUM_OFFSET_DTYPE": parts.constants["OFFSET_DTYPE"] if parts else tl.int32,
            "SUM_BLOCK": SUM_BLOCK,
        },
    )


NO_SUMS = _launch_of_sums(None, 0, 0, 0)


def backward_weight_but_sums(
    grad_output: Tensor,
    input: Tensor,
    bias: bool,
    *,
    batched: bool = False,
    precision: str = "ieee",
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor | None, Sums | None]:
    """`linear_backward_weight`, and the launch of `sum_splits_kernel` that is left to be done."""
    operands = launch.describe(grad_output, input)
    plan = plan_backward_weight(operands, bias, batched, precision, config, splits)
    if plan.copy_grad_output:
        grad_output = grad_output.contiguous()
    if plan.copy_input:
        input = input.contiguous()
    grad_weight = launch.allocate(input, plan.grad_weight)
    grad_bias = launch.allocate(input, plan.grad_bias) if bias else None
    if plan.kernel.grid == (0,):
        return grad_weight, grad_bias, None
    if plan.partial_weight is None:
        pointers = (grad_output, input, grad_weight, grad_bias)
        launch.run(linear_backward_weight_kernel, plan.kernel, pointers)
        return grad_weight, grad_bias, None

    partial_weight = launch.allocate(input, plan.partial_weight)
    partial_bias = launch.allocate(input, plan.partial_bias) if bias else None
    pointers = (grad_output, input, partial_weight, partial_bias)
    launch.run(linear_backward_weight_kernel, plan.kernel, pointers)
    sums = _launch_of_sums(
        plan.kernel,
        partial_weight.shape[0],
        grad_weight.numel(),
        0 if grad_bias is None else grad_bias.numel(),
    )
    return grad_weight, grad_bias, (sums, (partial_weight, partial_bias, grad_weight, grad_bias))


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    *,
    batched: bool = False,
    precision: str = "ieee",
    batch_invariant: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients of a layer together, in two launches at most.

    Args:
        grad_output: (*, N), or (B, M, N) if batched; any strides.
        input: (*, K) or (B, M, K); None where no grad_weight is wanted.
        weight: (N, K) or (B, N, K); None where no grad_input is wanted.
        bias: whether grad_bias is wanted; it comes with grad_weight only.
        batched, precision: as in `linear_backward_weight`.
        batch_invariant: whether a row's grad_input may not depend on the other rows, and rows are
            summed in their order, with no splits.

    Returns:
        grad_input, grad_weight and grad_bias, as `linear_backward_input` and
        `linear_backward_weight` give them; None for what is not wanted.
    """
    grad_input = grad_weight = grad_bias = sums = None
    if input is not None:
        grad_weight, grad_bias, sums = backward_weight_but_sums(
            grad_output,
            input,
            bias,
            batched=batched,
            precision=precision,
            splits=1 if batch_invariant else None,
        )
    if weight is not None and sums is not None:
        grad_input = backward_input_and_sums(grad_output, weight, sums, precision=precision)
    elif weight is not None:
        grad_input = linear_backward_input(
            grad_output, weight, precision=precision, batch_invariant=batch_invariant
        )
    elif sums is not None:
        run_sums(sums)
    return grad_input, grad_weight, grad_bias


def backward_input_and_sums(
    grad_output: Tensor,
    weight: Tensor,
    sums: Sums | None,
    second_grad_output: Tensor | None = None,
    second_weight: Tensor | None = None,
    *,
    precision: str,
    batch_invariant: bool = False,
) -> Tensor:
    """`grad_output @ weight`, plus a second such product, and `sums`, all in one launch.

    The second operands have the shapes and strides of the first.
    """
    weight = weight.mT
    operands = launch.describe(grad_output, weight)
    if second_grad_output is not None and second_weight is not None:
        second_weight = second_weight.mT
        seconds = launch.describe(second_grad_output, second_weight)
        operands = (
            _as_aligned_as_both(operands[0], seconds[0]),
            _as_aligned_as_both(operands[1], seconds[1]),
            None,
        )
    given = (precision, None, False, None, batch_invariant, "forward_and_sums")
    plan = plan_forward(operands, *given)
    if plan.copy_input:
        grad_output = grad_output.contiguous()
        if second_grad_output is not None:
            second_grad_output = second_grad_output.contiguous()
    grad_input = launch.allocate(grad_output, plan.output)
    if sums is None:
        sums = NO_SUMS, (grad_input,) * 4  # no program gets to look at them
    both = _launch_of_both(plan.launch.launch, sums[0], second_weight is not None)
    pointers = (
        grad_output,
        weight,
        second_grad_output,
        second_weight,
        None,
        grad_input,
        None,
        *sums[1],
    )
    if both.grid != (0,):
        launch.run(linear_forward_and_sums_kernel, both, pointers)
    return grad_input


@functools.lru_cache(maxsize=4096)
def _launch_of_both(
    product: launch.Launch, sums: launch.Launch, second_product: bool
) -> launch.Launch:
    return launch.Launch(
        grid=(sums.grid[0] + product.grid[0],),
        scalars=product.scalars + sums.scalars,
        constants=product.constants | sums.constants | {"SECOND_PRODUCT": second_product},
    )


def _as_aligned_as_both(first: launch.Fields, second: launch.Fields) -> launch.Fields:
    return (*first[:4], first[4] and second[4])
