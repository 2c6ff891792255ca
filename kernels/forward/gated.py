"""A gated pair of layers: output = activation(input @ gate_weight.T) * (input @ up_weight.T).

One launch, which reads the input once for both products.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..configs.choose import choose
from ..configs.config import Config, Traits, resolved_precision
from ..language.epilogue import activate
from ..language.indexing import locate_rows, locate_tile
from ..language.precision import add_product, empty_sum, prepare_operand, total_of
from ..launching import launch
from ..launching.operands import Activation, check_activation, check_gated_shapes, check_same_kind


@triton.jit
def gated_linear_forward_kernel(
    input_ptr,
    gate_weight_ptr,
    up_weight_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    output_ptr,
    gate_ptr,
    up_ptr,
    M,
    N,
    K,
    zero,
    input_inner_size,
    stride_io,
    stride_im,
    stride_ik,
    stride_gn,
    stride_gk,
    stride_un,
    stride_uk,
    stride_gate_bias,
    stride_up_bias,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PRODUCTS: tl.constexpr,
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
    """output[m, n] = activation(gate[m, n]) * up[m, n].

    gate[m, n] = sum_k input[m, k] * gate_weight[n, k] + gate_bias[n], and up likewise. One program
    computes one BLOCK_M x BLOCK_N tile of both, for which it loads each tile of input once.

    input (M, K), the weights (N, K) and the biases (N,) have any strides; output, gate and up
    (M, N) are contiguous, the latter two stored if asked for. `zero` is 0, which the compiler does
    not know.
    """
    tile_m, tile_n = locate_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(OFFSET_DTYPE)
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(OFFSET_DTYPE)
    offs_k = tl.arange(0, BLOCK_K).to(OFFSET_DTYPE)
    mask_m = offs_m < M
    mask_n = offs_n < N

    input_rows = locate_rows(offs_m, input_inner_size, stride_io, stride_im, NESTED_INPUT)
    input_ptrs = input_ptr + input_rows[:, None] + offs_k[None, :] * stride_ik
    gate_ptrs = gate_weight_ptr + offs_n[None, :] * stride_gn + offs_k[:, None] * stride_gk
    up_ptrs = up_weight_ptr + offs_n[None, :] * stride_un + offs_k[:, None] * stride_uk
    step_k = tl.full((), BLOCK_K, OFFSET_DTYPE)  # as in add_rows_by_rows
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    fresh = gate + zero
    gate, up = empty_sum(gate, INPUT_PRECISION), empty_sum(up, INPUT_PRECISION)
    for k in range(0, max(tl.cdiv(K, BLOCK_K), 1)):  # at least one, as in tiled.py
        mask_k = offs_k < K - k * BLOCK_K
        input_tile = tl.load(input_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        gate_tile = tl.load(gate_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        up_tile = tl.load(up_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        input_tile = prepare_operand(input_tile, INPUT_PRECISION, UPCAST)
        gate = add_product(
            gate,
            input_tile,
            prepare_operand(gate_tile, INPUT_PRECISION, UPCAST),
            fresh,
            INPUT_PRECISION=INPUT_PRECISION,
            ACC_DTYPE=ACC_DTYPE,
            SUM_STEPS_APART=SUM_STEPS_APART,
        )
        up = add_product(
            up,
            input_tile,
            prepare_operand(up_tile, INPUT_PRECISION, UPCAST),
            fresh,
            INPUT_PRECISION=INPUT_PRECISION,
            ACC_DTYPE=ACC_DTYPE,
            SUM_STEPS_APART=SUM_STEPS_APART,
        )
        input_ptrs += step_k * stride_ik
        gate_ptrs += step_k * stride_gk
        up_ptrs += step_k * stride_uk
    gate, up = total_of(gate, INPUT_PRECISION), total_of(up, INPUT_PRECISION)

    if HAS_GATE_BIAS:
        bias = tl.load(gate_bias_ptr + offs_n * stride_gate_bias, mask=mask_n, other=0.0)
        gate += bias.to(ACC_DTYPE)[None, :]
    if HAS_UP_BIAS:
        bias = tl.load(up_bias_ptr + offs_n * stride_up_bias, mask=mask_n, other=0.0)
        up += bias.to(ACC_DTYPE)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if SAVE_PRODUCTS:
        tl.store(gate_ptr + offs, gate.to(gate_ptr.dtype.element_ty), mask=mask)
        tl.store(up_ptr + offs, up.to(up_ptr.dtype.element_ty), mask=mask)
    output = activate(gate, ACTIVATION) * up
    tl.store(output_ptr + offs, output.to(output_ptr.dtype.element_ty), mask=mask)


class GatedForwardLaunch(NamedTuple):
    """What `gated_linear_forward` launches, what it returns, and whether input is copied first."""

    config: Config
    kernel: launch.Launch
    output: launch.Operand
    copy_input: bool


@functools.lru_cache(maxsize=4096)
def plan_gated_forward(
    operands: tuple[launch.Fields, launch.Fields, launch.Fields],
    biases: tuple[launch.Fields | None, launch.Fields | None],
    precision: str,
    activation: Activation,
    save_products: bool,
    config: Config | None,
    batch_invariant: bool = False,
) -> GatedForwardLaunch:
    """How `gated_linear_forward` goes about tensors like these.

    Args:
        operands: `describe(input, gate_weight, up_weight)`.
        biases: the fields of gate_bias and up_bias.
        precision, activation, save_products, config, batch_invariant: as in `gated_linear_forward`.
    """
    input, gate_weight, up_weight = (launch.Operand(*fields) for fields in operands)
    gate_bias, up_bias = (fields and launch.Operand(*fields) for fields in biases)
    check_activation(activation, optional=False)
    check_same_kind(
        input=input,
        gate_weight=gate_weight,
        up_weight=up_weight,
        gate_bias=gate_bias,
        up_bias=up_bias,
    )
    check_gated_shapes(
        input.shape,
        gate_weight.shape,
        up_weight.shape,
        gate_bias and gate_bias.shape,
        up_bias and up_bias.shape,
    )

    target = launch.target_of(input.device)
    out_features, in_features = gate_weight.shape
    rows = launch.rows_of(input)
    precision = resolved_precision(
        precision, input.dtype, None if batch_invariant else rows.size, in_features, target
    )
    output = input.contiguous(*input.shape[:-1], out_features)
    offsets = launch.offset_dtype(rows.operand, gate_weight, up_weight, gate_bias, up_bias, output)
    if config is None:
        read = (rows.operand, gate_weight, up_weight)
        traits = Traits(
            input.dtype,
            precision,
            aligned=launch.aligned_product(*read, features=(out_features,), whole=True),
            target=target,
            activation=True,
            wide=offsets == tl.int64,
        )
        config = choose(
            "gated_forward",
            1,
            rows.size,
            out_features,
            in_features,
            traits,
            batch_invariant=batch_invariant,
        )
    return GatedForwardLaunch(
        config,
        launch.Launch(
            grid=(
                triton.cdiv(rows.size, config.block_m) * triton.cdiv(out_features, config.block_n),
            ),
            scalars=(
                rows.size,
                out_features,
                in_features,
                0.0,
                rows.inner_size,
                rows.stride_outer,
                rows.stride_inner,
                rows.stride_feature,
                *gate_weight.strides,
                *up_weight.strides,
                0 if gate_bias is None else gate_bias.strides[0],
                0 if up_bias is None else up_bias.strides[0],
            ),
            constants={
                "HAS_GATE_BIAS": gate_bias is not None,
                "HAS_UP_BIAS": up_bias is not None,
                "ACTIVATION": activation,
                "SAVE_PRODUCTS": save_products,
                "NESTED_INPUT": rows.nested,
                "OFFSET_DTYPE": offsets,
                **launch.product_constants(input.dtype, precision, config, target),
            },
        ),
        output,
        rows.copied,
    )


def gated_linear_forward(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: Activation,
    save_products: bool,
    *,
    precision: str = "ieee",
    config: Config | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes `activation(gate) * up` in one launch, from both products over one input.

    gate is `input @ gate_weight.T + gate_bias`, up is `input @ up_weight.T + up_bias`. Both are
    accumulated in float32 (float64 for float64), and so are activation and product, before the one
    rounding to the output's dtype. Against two layers, an activation and a product that spares a
    read of input and six reads and writes of (*, N), or four where gate and up are saved.

    Args:
        input: (*, K); float16, bfloat16, float32 or float64; any strides.
        gate_weight, up_weight: (N, K), in input's dtype and on its device; any strides.
        gate_bias, up_bias: None or (N,), in input's dtype and on its device.
        activation: one of `operands.ACTIVATIONS`.
        save_products: whether gate and up are wanted too, for backward.
        precision: how float32 products are formed, as in `linear_forward`.
        config: block sizes to use; None chooses by shape, dtype and device.
        batch_invariant: as in `linear_forward`.

    Returns:
        The output, and gate and up or None: (*, N), contiguous, in input's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices are none of these, or the kernels cannot run on the
            device.
    """
    plan = plan_gated_forward(
        launch.describe(input, gate_weight, up_weight),
        (_described(gate_bias), _described(up_bias)),
        precision,
        activation,
        save_products,
        config,
        batch_invariant,
    )
    if plan.copy_input:
        input = input.contiguous()
    output = launch.allocate(input, plan.output)
    gate = launch.allocate(input, plan.output) if save_products else None
    up = launch.allocate(input, plan.output) if save_products else None
    if plan.kernel.grid != (0,):
        pointers = (input, gate_weight, up_weight, gate_bias, up_bias, output, gate, up)
        launch.run(gated_linear_forward_kernel, plan.kernel, pointers)
    return output, gate, up


def _described(bias: Tensor | None) -> launch.Fields | None:
    return None if bias is None else launch.describe(bias, bias)[0]
