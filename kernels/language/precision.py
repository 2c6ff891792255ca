"""How products are formed.

The operand types that matrix instructions take, rounding to them, pieces that together hold a
float32, and sums of their products.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_nearest(tile, DROPPED: tl.constexpr):
    """float32 without the last DROPPED bits of 24; ties away from zero."""
    bits = tile.to(tl.uint32, bitcast=True) + (1 << DROPPED - 1)
    return (bits & (0xFFFFFFFF ^ (1 << DROPPED) - 1)).to(tl.float32, bitcast=True)


@triton.jit
def is_moderate(tile):
    """Whether a float32 is finite, and still is when it is rounded to bfloat16."""
    return tl.abs(tile) < 3.3961775e38


@triton.jit
def leading_piece(tile):
    """`tile`, but 1 with its sign where it is not moderate; the pieces after it have the value.

    Infinity itself would make NaN with another number's later pieces, which may be 0.
    """
    return tl.where(is_moderate(tile), tile, tl.where(tile > 0, 1.0, -1.0))


@triton.jit
def as_bfloat16(tile, UPCAST: tl.constexpr):
    """float32 without its last 16 bits; the interpreter keeps the type (UPCAST).

    By bits, because conversions run at a fraction of the other instructions' rate.
    """
    bits = tile.to(tl.uint32, bitcast=True)
    if UPCAST:
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def accumulator_of(ptr):
    """A zero of the type that products of such elements are summed in."""
    if ptr.dtype.element_ty == tl.float64:
        return tl.full((), 0.0, tl.float64)
    else:
        return tl.full((), 0.0, tl.float32)


@triton.jit
def prepare_operand(tile, OPTIONS: tl.constexpr):
    """`tile` as `add_product` is to get it: as it is, but for these.

    "tf32": TF32 instructions read the upper 19 bits of a float32 and so truncate, which doubles the
    error of cuBLAS, which rounds to nearest: round here. "bf16x6": three pieces of bfloat16, which
    together are the float32, but for bits below 2**-133, where bfloat16 ends.

    The interpreter (upcast) multiplies bfloat16's bit patterns: give it float32.
    """
    if OPTIONS.upcast:
        tile = tile.to(tl.float32)
    if OPTIONS.precision == "tf32":
        rounded = round_to_nearest(tile, 13)
        # A NaN with a full mantissa would carry over into -0.0.
        return tl.where(tile == tile, rounded, tile)
    elif OPTIONS.precision == "bf16x6":
        first = round_to_nearest(leading_piece(tile), 16)
        rest = tile - first
        second = tl.where(is_moderate(tile), round_to_nearest(rest, 16), 0.0)
        third = rest - second  # has 8 bits, unless it is one of the largest numbers
        UPCAST: tl.constexpr = OPTIONS.upcast
        return as_bfloat16(first, UPCAST), as_bfloat16(second, UPCAST), as_bfloat16(third, UPCAST)
    else:
        return tile


@triton.jit
def empty_sum(zeros, OPTIONS: tl.constexpr):
    """What `add_product` is to add to first: for products of pieces, with what additions lost."""
    if OPTIONS.precision == "bf16x6":
        return zeros, zeros
    else:
        return zeros


@triton.jit
def total_of(acc, OPTIONS: tl.constexpr):
    """The sum alone."""
    if OPTIONS.precision == "bf16x6":
        return acc[0]
    else:
        return acc


@triton.jit
def add_product(acc, a, b, fresh, OPTIONS: tl.constexpr):
    """`acc + a @ b` for prepared operands.

    sum_steps_apart sums the product from `fresh`, zeros that are no constant, before it joins the
    total (when and why: launch.options_of). A constant Triton would fold into one sum.

    Of pieces the smallest products come first, while the sum is small and is cut off at smaller
    bits. What is left out of a product is 2**-24 of it at most.
    """
    if OPTIONS.precision == "bf16x6":
        partial = tl.dot(a[2], b[0], fresh)
        partial = tl.dot(a[0], b[2], partial)
        partial = tl.dot(a[1], b[1], partial)
        partial = tl.dot(a[1], b[0], partial)
        partial = tl.dot(a[0], b[1], partial)
        partial = tl.dot(a[0], b[0], partial)
        return add_compensated(acc[0], acc[1], partial)
    elif OPTIONS.sum_steps_apart:
        acc += tl.dot(a, b, fresh, input_precision=OPTIONS.precision, out_dtype=fresh.dtype)
        return acc
    else:
        return tl.dot(a, b, acc, input_precision=OPTIONS.precision, out_dtype=fresh.dtype)


@triton.jit
def add_compensated(total, lost, term):
    """(total, lost) with `term` added: what rounding adds to a total the next term gives back.

    Kahan's summation: its error does not grow with the number of terms.
    """
    term -= lost
    raised = total + term
    # Infinity has lost nothing, where infinity - infinity would be NaN.
    lost = tl.where(tl.abs(raised) < float("inf"), (raised - total) - term, 0.0)
    return raised, lost
