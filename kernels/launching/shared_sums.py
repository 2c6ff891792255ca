"""Launches of kernels whose programs share sums: the workspaces and the counters that takes.

reduction.py has what the programs do with them.
"""

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch

MOST_STREAMS = 64  # whose counters are kept; PyTorch's own pools have 32 a device and priority

_counters: dict[tuple[torch.device, int], Tensor] = {}
_in_order: set[tuple[torch.device, int]] = set()  # streams within `replayed_in_order`


def counters(like: Tensor, count: int) -> Tensor:
    """At least `count` zeros (int32) on `like`'s device, which the kernel that counts leaves so.

    Every stream has its own, so that launches that share them run one after the other. A graph that
    is being captured gets some of its own, zeroed when it is replayed, unless it is to be
    `replayed_in_order`; and so does what Inductor runs before it captures it.
    """
    device, stream, capturing = like.device, 0, False
    if device.type == "cuda":
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream
    found = _counters.get((device, stream))
    enough = found is not None and found.numel() >= count
    if capturing and not (enough and (device, stream) in _in_order):
        return like.new_zeros(count, dtype=torch.int32)
    if found is None or not enough:
        if _in_the_pool_of_a_graph(device, stream):
            return like.new_zeros(count, dtype=torch.int32)
        size = max(1024, 1 << (count - 1).bit_length())
        if len(_counters) >= MOST_STREAMS:
            # Memory of a stream's own is not used again before what is queued there has run.
            _counters.clear()
        found = _counters[device, stream] = like.new_zeros(size, dtype=torch.int32)
    return found


def _in_the_pool_of_a_graph(device: torch.device, stream: int) -> bool:
    """Whether memory comes from the pool of a CUDA graph of Inductor's, which nobody may keep.

    It does on the stream where compiled functions of mode "reduce-overhead" run, captured or not.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
    except AssertionError:  # in a thread that such a function cannot run in
        return False
    return manager is not None and manager.stream.cuda_stream == stream


@contextlib.contextmanager
def replayed_in_order(device: torch.device, stream: int) -> Iterator[Tensor | None]:
    """Within it graphs captured on `stream` take its own counters, which are not set to 0 for each.

    They must be replayed on that stream alone, so that they run one after the other, and as long as
    what this gives is kept.
    """
    _in_order.add((device, stream))
    try:
        yield _counters.get((device, stream))
    finally:
        _in_order.discard((device, stream))


class KernelLaunch(NamedTuple):
    """A kernel's launch, and what it takes where programs share sums.

    kernel: takes the operands and results, then `partials` and the counters if there are any.
    partials: workspaces for parts of sums, None for one that the kernel does without.
    counters: how many counters follow those.
    unsplit: makes what takes neither, for where there is no memory for them.
    """

    kernel: Any
    launch: launch.Launch
    partials: tuple[launch.Operand | None, ...] = ()
    counters: int = 0
    unsplit: Callable[[], "KernelLaunch"] | None = None

    def run(self, pointers: tuple[Tensor | None, ...]) -> None:
        """Launches the kernel, unless there is nothing to compute.

        Where there is no memory for the workspaces no sum is split, and a warning says so.

        Args:
            pointers: all but the workspaces.
        """
        kernel, launched, partials, count, unsplit = self
        if launched.grid == (0,):
            return
        if unsplit is None:
            launch.run(kernel, launched, pointers)
            return
        like: Any = pointers[0]
        try:
            workspaces = [None if one is None else launch.allocate(like, one) for one in partials]
            counted = counters(like, count)
        except torch.OutOfMemoryError:
            size = sum(math.prod(one.shape) * one.dtype.itemsize for one in partials if one)
            warnings.warn(
                f"fastlinear splits no sums of this call: {like.device} has no {size} bytes left "
                "for the parts; the result is as exact, and may differ in its last bits",
                RuntimeWarning,
                stacklevel=2,
            )
            unsplit().run(pointers)
            return
        try:
            launch.run(kernel, launched, (*pointers, *workspaces, counted))
        except BaseException:
            # A kernel that is interpreted may be interrupted before it has set them back to 0.
            _counters.clear()
            raise
