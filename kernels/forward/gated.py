"""A gated pair of layers: output = activation(input @ gate_weight.T) * (input @ up_weight.T).

One launch, which reads the input once for both products.
"""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..configs.choose import choose
from ..configs.config import Config, Traits, resolved_precision
from ..language.epilogue import activate, load_bias, store_rounded
from ..language.indexing import as_offset, locate_tile, offsets, row_offsets
from ..language.precision import (
    accumulator_of,
    add_product,
    empty_sum,
    prepare_operand,
    total_of,
)
from ..launching import launch
from ..launching.operands import (
    GATED,
    Activation,
    check_activation,
    check_same_kind,
    check_shapes,
)


@triton.jit
def gated_linear_forward_kernel(
    input,
    gate_weight,
    up_weight,
    gate_bias,
    up_bias,
    output_ptr,
    gate_ptr,
    up_ptr,
    M,
    N,
    K,
    zero,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """output[m, n] = activation(gate[m, n]) * up[m, n].

    gate[m, n] = sum_k input[m, k] * gate_weight[n, k] + gate_bias[n], and up likewise. One program
    computes one BLOCK_M x BLOCK_N tile of both, for which it loads each tile of input once.

    input (M, K), the weights (N, K) and the biases (N,) have any strides; output, gate and up
    (M, N) are contiguous, the latter two stored where there is a place for them. `zero` is 0, which
    the compiler does not know.
    """
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    row_tiles = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = locate_tile(tl.program_id(0), row_tiles, tl.cdiv(N, BLOCK_N), TILE.group)
    offs_m = offsets(tile_m * BLOCK_M, BLOCK_M, OPTIONS)
    offs_n = offsets(tile_n * BLOCK_N, BLOCK_N, OPTIONS)
    offs_k = offsets(0, BLOCK_K, OPTIONS)
    mask_m = offs_m < M
    mask_n = offs_n < N

    input_offs = row_offsets(input, offs_m)[:, None]
    input_ptrs = input.ptr + input_offs + offs_k[None, :] * input.stride_column
    gate_ptrs = gate_weight.ptr + row_offsets(gate_weight, offs_n[None, :])
    gate_ptrs += offs_k[:, None] * gate_weight.stride_column
    up_ptrs = up_weight.ptr + row_offsets(up_weight, offs_n[None, :])
    up_ptrs += offs_k[:, None] * up_weight.stride_column
    step_k = as_offset(BLOCK_K, OPTIONS)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=accumulator_of(input.ptr).dtype)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=accumulator_of(input.ptr).dtype)
    fresh = gate + zero
    gate, up = empty_sum(gate, OPTIONS), empty_sum(up, OPTIONS)
    for k in range(0, max(tl.cdiv(K, BLOCK_K), 1)):  # at least one, as in tiled.py
        mask_k = offs_k < K - k * BLOCK_K
        input_tile = tl.load(input_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        gate_tile = tl.load(gate_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        up_tile = tl.load(up_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        input_tile = prepare_operand(input_tile, OPTIONS)
        gate = add_product(gate, input_tile, prepare_operand(gate_tile, OPTIONS), fresh, OPTIONS)
        up = add_product(up, input_tile, prepare_operand(up_tile, OPTIONS), fresh, OPTIONS)
        input_ptrs += step_k * input.stride_column
        gate_ptrs += step_k * gate_weight.stride_column
        up_ptrs += step_k * up_weight.stride_column
    gate, up = total_of(gate, OPTIONS), total_of(up, OPTIONS)

    if gate_bias is not None:
        gate += load_bias(gate_bias, 0, offs_n, mask_n).to(gate.dtype)[None, :]
    if up_bias is not None:
        up += load_bias(up_bias, 0, offs_n, mask_n).to(up.dtype)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if gate_ptr is not None:
        store_rounded(gate_ptr + offs, gate, mask)
        store_rounded(up_ptr + offs, up, mask)
    ACTIVATION: tl.constexpr = OPTIONS.activation
    store_rounded(output_ptr + offs, activate(gate, ACTIVATION) * up, mask)


_OPERANDS = ("input", "gate_weight", "up_weight", "gate_bias", "up_bias")


class GatedForwardPlan(NamedTuple):
    """What `gated_linear_forward` launches, what it returns, and whether input is copied first."""

    config: Config
    kernel: launch.Launch
    output: launch.Operand
    copy_input: bool


@functools.lru_cache(maxsize=4096)
def plan_gated_forward(
    operands: tuple[Any, ...],
    precision: str,
    activation: Activation,
    save_products: bool,
    config: Config | None,
    batch_invariant: bool = False,
) -> GatedForwardPlan:
    """How `gated_linear_forward` goes about tensors like these.

    Args:
        operands: `describe(input, gate_weight, up_weight, gate_bias, up_bias)`.
        precision, activation, save_products, config, batch_invariant: as in
            `gated_linear_forward`. A launch is of the pointers that are there: with save_products
            it is another.
    """
    input, gate_weight, up_weight = (launch.Operand(*fields) for fields in operands[:3])
    biases = [launch.operand(fields) for fields in operands[3:]]
    given = (input, gate_weight, up_weight, *biases)
    check_activation(activation, optional=False)
    check_same_kind(**dict(zip(_OPERANDS, given, strict=True)))
    check_shapes("gated_linear", GATED, *(one and one.shape for one in given))
    target = launch.target_of(input.device)
    out_features, in_features = gate_weight.shape
    rows = launch.rows_of(input)
    precision = resolved_precision(
        precision, input.dtype, None if batch_invariant else rows.size, in_features, target
    )
    output = input.contiguous(*input.shape[:-1], out_features)
    wide = launch.wide(rows.operand, gate_weight, up_weight, *biases, output)
    if config is None:
        read = (rows.operand, gate_weight, up_weight)
        aligned = launch.aligned_product(*read, features=(out_features,), whole=True)
        traits = Traits(input.dtype, precision, aligned, target, activation=True, wide=wide)
        sizes = (1, rows.size, out_features, in_features)
        config = choose("gated_forward", *sizes, traits, batch_invariant=batch_invariant)
    tiles = triton.cdiv(rows.size, config.block_m) * triton.cdiv(out_features, config.block_n)
    constants = {
        "OPTIONS": launch.options_of(input.dtype, precision, wide, activation),
        "TILE": config.blocks,
    }
    weights = map(launch.matrix_of, (gate_weight, up_weight))
    return GatedForwardPlan(
        config,
        launch.Launch(
            (tiles,),
            (rows.size, out_features, in_features, 0.0),
            constants | config.compile_options(target),
            (rows.matrix, *weights, *map(launch.vector_of, biases)),
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
    operands: tuple[Any, ...] = (input, gate_weight, up_weight, gate_bias, up_bias)
    given = (precision, activation, save_products, config, batch_invariant)
    plan = plan_gated_forward(launch.describe(*operands), *given)
    if plan.copy_input:
        operands = (input.contiguous(), *operands[1:])
    output = launch.allocate(input, plan.output)
    gate = launch.allocate(input, plan.output) if save_products else None
    up = launch.allocate(input, plan.output) if save_products else None
    if plan.kernel.grid != (0,):
        launch.run(gated_linear_forward_kernel, plan.kernel, (*operands, output, gate, up))
    return output, gate, up
