"""What every launcher needs.

How operands lie in memory, where outputs come from, and what the device is.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs.config import INTERPRETER, TARGETS, Target
from ..language.arguments import Matrix, Options, Vector
from .compiled_launch import INTERPRETING as INTERPRETING
from .compiled_launch import CannotLaunch as CannotLaunch
from .compiled_launch import Launch as Launch
from .compiled_launch import run as run

LARGEST_INT32 = 2**31 - 1


class Operand(NamedTuple):
    """What a launch depends on of a tensor, besides its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool  # its address divides by 16

    def contiguous(self, *shape: int) -> "Operand":
        """A contiguous tensor like this one, of the given shape."""
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return self._replace(shape=shape, strides=strides, aligned=True)

    @property
    def last_offset(self) -> int:
        """Elements from the tensor's first to its farthest: a slice of few can reach far."""
        if 0 in self.shape:
            return 0
        return sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )


Fields = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device, bool]


def operand(fields: Fields | None) -> Operand | None:
    """The Operand of a tensor that there may be none of."""
    return None if fields is None else Operand(*fields)


def describe(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The fields of the Operand of each tensor, as plain tuples, which are made in half the time.

    Of all the launcher's Python this is what takes longest.
    """
    return tuple(
        [
            None
            if one is None
            else (one.shape, one.stride(), one.dtype, one.device, not one.data_ptr() % 16)
            for one in tensors
        ]
    )


class Rows(NamedTuple):
    """A tensor (*, F) seen as a matrix of so many rows of features."""

    operand: Operand
    size: int
    matrix: Matrix
    copied: bool = False  # it describes a contiguous copy, which is to be made


def rows_of(operand: Operand, *, batched: bool = False) -> Rows:
    """Describes the rows of a tensor.

    It asks for no copy where the leading dimensions lie on at most two strides.

    This is the one place that asks for a copy of an operand, besides a gated pair's weights that
    lie differently: leading dimensions on three or more strides, which takes a permutation of a
    tensor of at least four dimensions or the like.

    Args:
        operand: (*, F), or (B, M, F) if batched.
        batched: whether the first dimension counts independent layers instead of rows.
    """
    shape, strides = operand.shape, operand.strides
    stride_feature = strides[-1] if shape else 1
    if batched:
        return Rows(operand, shape[1], Matrix(None, strides[0], strides[1], stride_feature))
    if len(shape) == 2:
        return Rows(operand, shape[0], Matrix(None, 0, strides[0], stride_feature))

    size = math.prod(shape[:-1])
    if size == 0:  # strides say nothing then
        return Rows(operand, 0, Matrix(None, 0, 0, stride_feature))
    groups: list[tuple[int, int]] = []  # (size, stride), innermost first
    for extent, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if extent == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1] = (groups[-1][0] * extent, groups[-1][1])
        else:
            groups.append((extent, stride))
    if len(groups) > 2:
        return rows_of(operand.contiguous(*shape))._replace(copied=True)
    inner_size, stride_row = groups[0] if groups else (size, 0)
    nested = (inner_size, groups[1][1]) if len(groups) == 2 else ()
    return Rows(operand, size, Matrix(None, 0, stride_row, stride_feature, *nested))


def matrix_of(weight: Operand) -> Matrix:
    """That of (N, K), or (B, N, K)."""
    return Matrix(None, *(0, *weight.strides)[-3:])


def vector_of(bias: Operand | None) -> Vector | None:
    """That of (N,), or (B, N)."""
    return bias and Vector(None, *(0, *bias.strides)[-2:])


def allocate(like: Tensor, output: Operand) -> Tensor:
    """Uninitialised memory for `output`, on `like`'s device; the tests put NaN in it.

    `new_empty`, which works strides out by itself, takes a third longer, and so does a dtype.
    """
    shape, strides, dtype, _, _ = output
    if dtype is like.dtype:
        return like.new_empty_strided(shape, strides)
    return like.new_empty_strided(shape, strides, dtype=dtype)


def wide(*operands: Operand | None) -> bool:
    """Whether offsets within one of `operands` take 64 bits.

    They do where an element lies 2**31 or more elements from the tensor's first.
    """
    return any(one is not None and one.last_offset > LARGEST_INT32 for one in operands)


def aligned(*operands: Operand) -> bool:
    """Whether Triton can prove that each of `operands` may be read 16 bytes at a time.

    It goes by what divides by 16: the address, every stride but the one that is 1, and the size
    along that one.
    """
    for operand in operands:
        if not operand.aligned:
            return False
        unit = False
        for size, stride in zip(operand.shape, operand.strides, strict=True):
            if stride == 1 and not unit:
                unit = True
                if size % 16:
                    return False
            elif stride % 16 and size != 1:
                return False
        if not unit:
            return False
    return True


def aligned_product(*operands: Operand, features: tuple[int, ...], whole: bool) -> bool:
    """Whether a product counts as aligned, as configurations have to fit it.

    Its operands have to be. An activation and 64-bit offsets need the registers too that a store of
    rows of another size than a multiple of 16 takes for its addresses.

    Args:
        operands: that are read.
        features: out_features; of a gradient, in_features too.
        whole: whether those have to be multiples of 16.
    """
    return aligned(*operands) and not (whole and any(size % 16 for size in features))


def transposed_in_memory(rows: int, columns: int, matrix: Matrix, itemsize: int) -> bool | None:
    """Whether a matrix's columns are contiguous; None where neither they nor its rows are.

    That is, as Hopper's tensor memory accelerator has to have them to load tiles: apart from one
    another, and multiples of 16 bytes away from the first, whose address is not asked for here.
    """
    row, column = matrix.stride_row, matrix.stride_column
    for transposed, size, inner, outer in (
        (False, columns, column, row),
        (True, rows, row, column),
    ):
        if inner == 1 and outer >= size and outer * itemsize % 16 == 0 and rows and columns:
            return transposed
    return None


def describable(rows: Rows, weight: Operand) -> bool:
    """Whether tiles of input and weight can be loaded by descriptors."""
    input = rows.operand
    if not (input.aligned and weight.aligned and len(weight.shape) == 2) or rows.matrix.inner_size:
        return False
    itemsize, k = input.dtype.itemsize, weight.shape[1]
    matrices = (rows.size, rows.matrix), (weight.shape[0], matrix_of(weight))
    return all(transposed_in_memory(m, k, one, itemsize) is not None for m, one in matrices)


def options_of(
    dtype: torch.dtype, precision: str, wide: bool, activation: str | None = None
) -> Options:
    """How a kernel computes for operands of such a dtype; only float32 has a choice of precision.

    Steps are summed apart in exact float32 and float64, where the order of additions is most of the
    error. With one running sum over K, results on an H100 came out up to 4.5 times as far from the
    truth as cuBLAS's, which sums in parts (benchmarks/results/nvidia-h100-80gb-hbm3/
    tests-a2eab24.txt). Where products are rounded more coarsely than sums, the order does not
    matter. Tensor cores cut their sums off instead of rounding them, always to the same side.
    """
    precision = precision if dtype == torch.float32 else "ieee"
    return Options(
        activation=activation,
        precision=precision,
        sum_steps_apart=dtype in (torch.float32, torch.float64) and precision != "tf32",
        wide=wide,
        # It holds bfloat16 as bit patterns and would multiply those.
        upcast=INTERPRETING and (dtype == torch.bfloat16 or precision == "bf16x6"),
    )


@functools.lru_cache
def target_of(device: torch.device) -> Target:
    """What configurations have to fit on `device`.

    Raises:
        RuntimeError: the kernels cannot run on it; the message says what is missing.
    """
    if INTERPRETING:
        return INTERPRETER
    if device.type != "cuda":
        raise RuntimeError(
            f"backend 'triton' takes tensors on a GPU, but these are on {device}; "
            "to run the kernels in Triton's interpreter set TRITON_INTERPRET=1 before Python "
            "starts, or use backend 'auto'"
        )
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda and capability < (8, 0):
        raise RuntimeError(
            "backend 'triton' takes NVIDIA GPUs of compute capability 8.0 or newer, "
            f"but {device} has {capability[0]}.{capability[1]}; use backend 'auto'"
        )
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        family = "gfx942"
    else:
        # Consumer Blackwell (sm_120) has Ampere's matrix instructions,
        # and like it no wgmma or tcgen05.
        family = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return Target(
        family=family,
        shared_memory=getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
        ),
        multiprocessors=properties.multi_processor_count,
        warp_size=properties.warp_size,
        clock=getattr(properties, "clock_rate", 0) // 1000 or TARGETS[family].clock,
        memory_bandwidth=_memory_bandwidth(properties) or TARGETS[family].memory_bandwidth,
    )


def _memory_bandwidth(properties: Any) -> int:
    """GB/s by what NVIDIA's driver says, two transfers a clock over the bus; 0 where it does not.

    AMD's has four, or two, by the memory.
    """
    if torch.version.hip:
        return 0
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    return 2 * kilohertz * bits // 8_000_000
