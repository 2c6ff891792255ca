"""What every launcher needs.

How operands lie in memory, where outputs come from, and what the device is.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..configs.config import INTERPRETER, TARGETS, Config, Target
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


def describe(
    first: Tensor, second: Tensor, third: Tensor | None = None
) -> tuple[Fields, Fields, Fields | None]:
    """The fields of the Operand of each tensor, as plain tuples, which are made in half the time.

    Of all the launcher's Python this is what takes longest: hence no call for each either.
    """
    return (
        (
            first.shape,
            first.stride(),
            first.dtype,
            first.device,
            first.data_ptr() % 16 == 0,
        ),
        (
            second.shape,
            second.stride(),
            second.dtype,
            second.device,
            second.data_ptr() % 16 == 0,
        ),
        third
        if third is None
        else (
            third.shape,
            third.stride(),
            third.dtype,
            third.device,
            third.data_ptr() % 16 == 0,
        ),
    )


class Rows(NamedTuple):
    """A tensor (*, F) seen as rows of features.

    Row m of batch b starts after this many elements:
    `b * stride_batch + (m // inner_size) * stride_outer + (m % inner_size) * stride_inner`.
    """

    operand: Operand
    size: int
    inner_size: int
    stride_batch: int
    stride_outer: int
    stride_inner: int
    stride_feature: int
    copied: bool = False  # it describes a contiguous copy, which is to be made

    @property
    def nested(self) -> bool:
        return self.inner_size != self.size


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
        return Rows(operand, shape[1], shape[1], strides[0], 0, strides[1], stride_feature)
    if len(shape) == 2:
        return Rows(operand, shape[0], shape[0], 0, 0, strides[0], stride_feature)

    size = math.prod(shape[:-1])
    if size == 0:  # strides say nothing then
        return Rows(operand, 0, 0, 0, 0, 0, stride_feature)
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
    inner_size, stride_inner = groups[0] if groups else (size, 0)
    stride_outer = groups[1][1] if len(groups) == 2 else 0
    return Rows(operand, size, inner_size, 0, stride_outer, stride_inner, stride_feature)


def batch_strides(operand: Operand, dims: int) -> tuple[int, ...]:
    """Strides of a tensor with a batch dimension of stride 0 in front where it has none."""
    return operand.strides if len(operand.shape) == dims else (0, *operand.strides)


def allocate(like: Tensor, output: Operand) -> Tensor:
    """Uninitialised memory for `output`, on `like`'s device; the tests put NaN in it.

    `new_empty`, which works strides out by itself, takes a third longer, and so does a dtype.
    """
    shape, strides, dtype, _, _ = output
    if dtype is like.dtype:
        return like.new_empty_strided(shape, strides)
    return like.new_empty_strided(shape, strides, dtype=dtype)


def offset_dtype(*operands: Operand | None) -> tl.dtype:
    """int64 where offsets within one of `operands` need it, else int32.

    They do where an element lies 2**31 or more elements from the tensor's first.
    """
    far = any(operand is not None and operand.last_offset > LARGEST_INT32 for operand in operands)
    return tl.int64 if far else tl.int32


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


class Stored(NamedTuple):
    """How a matrix lies in memory.

    transposed: whether its columns are contiguous, rather than its rows.
    stride: from one of those to the next.
    """

    transposed: bool
    stride: int


def stored(
    rows: int, columns: int, stride_row: int, stride_column: int, itemsize: int
) -> Stored | None:
    """How a matrix lies that Hopper's tensor memory accelerator can load tiles of, else None.

    Its rows, or its columns, are contiguous, apart from one another, and multiples of 16 bytes away
    from the first; that one's address is not asked for here.
    """
    for transposed, size, inner, outer in (
        (False, columns, stride_column, stride_row),
        (True, rows, stride_row, stride_column),
    ):
        if inner == 1 and outer >= size and outer * itemsize % 16 == 0 and rows and columns:
            return Stored(transposed, outer)
    return None


def describable(rows: Rows, weight: Operand) -> bool:
    """Whether tiles of input and weight can be loaded by descriptors."""
    input = rows.operand
    if not (input.aligned and weight.aligned and len(weight.shape) == 2) or rows.nested:
        return False
    features, itemsize = input.shape[-1], input.dtype.itemsize
    (outputs, inputs), (stride_output, stride_input) = weight.shape, weight.strides
    return (
        stored(rows.size, features, rows.stride_inner, rows.stride_feature, itemsize) is not None
        and stored(outputs, inputs, stride_output, stride_input, itemsize) is not None
    )


def accumulator_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def input_precision(dtype: torch.dtype, precision: str) -> str:
    """How products are formed; only float32 has a choice."""
    return precision if dtype == torch.float32 else "ieee"


def sum_steps_apart(dtype: torch.dtype, precision: str) -> bool:
    """Whether each step's products are summed apart before they join the total.

    In exact float32 and float64 the order of additions is most of the error. With one running sum
    over K, results on an H100 came out up to 4.5 times as far from the truth as cuBLAS's, which
    sums in parts (benchmarks/results/nvidia-h100-80gb-hbm3/tests-a2eab24.txt). Where products are
    rounded more coarsely than sums, the order does not matter. Tensor cores cut their sums off
    instead of rounding them, always to the same side.
    """
    return dtype == torch.float64 or (dtype == torch.float32 and precision != "tf32")


def upcast(dtype: torch.dtype, precision: str) -> bool:
    """The interpreter holds bfloat16 as bit patterns and would multiply those."""
    pieces = dtype == torch.float32 and precision == "bf16x6"
    return INTERPRETING and (dtype == torch.bfloat16 or pieces)


def product_constants(
    dtype: torch.dtype, precision: str, config: Config, target: Target
) -> dict[str, Any]:
    """The constexprs, and Triton's options, that every kernel with a matrix product has."""
    return {
        "ACC_DTYPE": accumulator_dtype(dtype),
        "INPUT_PRECISION": input_precision(dtype, precision),
        "UPCAST": upcast(dtype, precision),
        "SUM_STEPS_APART": sum_steps_apart(dtype, precision),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        **config.compile_options(target),
    }


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
