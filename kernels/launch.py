"""What every launcher needs.

How operands lie in memory, where outputs come from, and what the device is.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import INTERPRETER, Target
from .indexing import locate_tile

# Kernels interpret, or compile, for the life of the process:
# triton.jit decides when it decorates them.
INTERPRETING: bool = not isinstance(locate_tile, triton.runtime.JITFunction)

LARGEST_INT32 = 2**31 - 1


class Rows(NamedTuple):
    """A tensor (*, F) seen as rows of features.

    Row m of batch b starts after this many elements:
    `b * stride_batch + (m // inner_size) * stride_outer + (m % inner_size) * stride_inner`.
    """

    tensor: Tensor
    size: int
    inner_size: int
    stride_batch: int
    stride_outer: int
    stride_inner: int
    stride_feature: int

    @property
    def nested(self) -> bool:
        return self.inner_size != self.size


def rows_of(tensor: Tensor, *, batched: bool = False) -> Rows:
    """Describes the rows of `tensor`.

    It makes no copy where the leading dimensions lie on at most two strides.

    This is the one place that may copy an operand: leading dimensions on three or more strides,
    which takes a permutation of a tensor of at least five dimensions or the like.

    Args:
        tensor: (*, F), or (B, M, F) if batched.
        batched: whether the first dimension counts independent layers instead of rows.
    """
    shape, strides = tensor.shape, tensor.stride()
    stride_feature = strides[-1] if shape else 1
    if batched:
        return Rows(tensor, shape[1], shape[1], strides[0], 0, strides[1], stride_feature)
    if len(shape) == 2:
        return Rows(tensor, shape[0], shape[0], 0, 0, strides[0], stride_feature)

    size = math.prod(shape[:-1])
    if size == 0:  # strides say nothing then
        return Rows(tensor, 0, 0, 0, 0, 0, stride_feature)
    groups: list[tuple[int, int]] = []  # (size, stride), innermost first
    for extent, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if extent == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1] = (groups[-1][0] * extent, groups[-1][1])
        else:
            groups.append((extent, stride))
    if len(groups) > 2:
        return rows_of(tensor.contiguous())
    inner_size, stride_inner = groups[0] if groups else (size, 0)
    stride_outer = groups[1][1] if len(groups) == 2 else 0
    return Rows(tensor, size, inner_size, 0, stride_outer, stride_inner, stride_feature)


def batch_strides(tensor: Tensor, dims: int) -> tuple[int, ...]:
    """Strides of `tensor` with a batch dimension of stride 0 in front where it has none."""
    return tensor.stride() if tensor.dim() == dims else (0, *tensor.stride())


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for an output or a workspace; the tests put NaN in it."""
    return torch.empty(shape, dtype=dtype, device=device)


def offset_dtype(*tensors: Tensor | None) -> tl.dtype:
    """int64 where offsets within one of `tensors` need it, else int32.

    They do where an element lies 2**31 or more elements from the tensor's first.

    What counts is the extent in storage: a slice of few elements can reach far.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_contiguous():
            last = tensor.numel() - 1
        else:
            last = sum(
                (size - 1) * stride
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
        if last > LARGEST_INT32:
            return tl.int64
    return tl.int32


def aligned(*tensors: Tensor) -> bool:
    """Whether Triton can prove that each of `tensors` may be read 16 bytes at a time.

    It goes by what divides by 16: the address, every stride but the one that is 1, and the size
    along that one.
    """
    for tensor in tensors:
        if tensor.data_ptr() % 16:
            return False
        unit = False
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride == 1 and not unit:
                unit = True
                if size % 16:
                    return False
            elif stride % 16 and size != 1:
                return False
        if not unit:
            return False
    return True


def accumulator_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def input_precision(dtype: torch.dtype, precision: str) -> str:
    """`tl.dot`'s input_precision; only float32 has a choice."""
    return precision if dtype == torch.float32 else "ieee"


def sum_steps_apart(dtype: torch.dtype, precision: str) -> bool:
    """Whether each step's products are summed apart before they join the total.

    In exact float32 and float64 the order of additions is most of the error. With one running sum
    over K, results on an H100 came out up to 4.5 times as far from the truth as cuBLAS's, which
    sums in parts (benchmarks/results/nvidia-h100-80gb-hbm3/tests-a2eab24.txt). Where products are
    rounded more coarsely than sums, the order does not matter.
    """
    return dtype == torch.float64 or (dtype == torch.float32 and precision == "ieee")


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter holds bfloat16 as bit patterns and would multiply those."""
    return INTERPRETING and dtype == torch.bfloat16


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@functools.lru_cache
def target_of(device: torch.device) -> Target:
    """What configurations have to fit on `device`."""
    if INTERPRETING:
        return INTERPRETER
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
    )
