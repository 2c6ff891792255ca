"""How products are formed.

The operand types that matrix instructions take, rounding to them, and sums of their products.
"""

import triton
import triton.language as tl


@triton.jit
def prepare_operand(tile, INPUT_PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`tile` as `tl.dot` is to get it: as it is, but for two cases.

    TF32 instructions read the upper 19 bits of a float32 and so truncate, which doubles the error
    of cuBLAS, which rounds to nearest: round here. The interpreter (UPCAST) multiplies bfloat16's
    bit patterns: give it float32.
    """
    if UPCAST:
        tile = tile.to(tl.float32)
    if INPUT_PRECISION == "tf32":
        bits = tile.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # A NaN with a full mantissa would carry over into -0.0.
        tile = tl.where(tile == tile, rounded, tile)
    return tile


@triton.jit
def add_product(
    acc,
    a,
    b,
    fresh,
    INPUT_PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    SUM_STEPS_APART: tl.constexpr,
):
    """`acc + a @ b` for prepared operands.

    SUM_STEPS_APART sums the product from `fresh`, zeros that are no constant, before it joins the
    total (when and why: launch.sum_steps_apart). A constant Triton would fold into one sum.
    """
    if SUM_STEPS_APART:
        acc += tl.dot(a, b, fresh, input_precision=INPUT_PRECISION, out_dtype=ACC_DTYPE)
    else:
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=ACC_DTYPE)
    return acc
