"""How the sweep measures: times of a call on device and host, memory, the two ceilings."""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlinear.tuning.stopwatch import Flush, Measure, Stopwatch

Step = Callable[[], object]


class Clock:
    """Times single calls, with the GPU's L2 cache flushed before each.

    On a GPU, `device_seconds` is the time between two events around a replay of the call's CUDA
    graph, or around the call itself where one of the arms cannot be captured (`captured` says
    which): then it has the gaps in which the GPU waits for Python in it. A graph's own start, some
    microseconds, is in both times of a ratio. On a CPU there is no device time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self.flush: Flush | None = None
        self.stream: torch.cuda.Stream | None = None
        if self.gpu:
            # Backward runs on the stream of its forward, and only what is on the captured stream
            # is captured: so all is on one.
            self.stream = torch.cuda.Stream(device)
            self.flush = Flush(device)  # which takes long enough to hide the launch that follows
            # Graphs share their memory: they run one after another, and nobody reads their outputs.
            self.pool = torch.cuda.graph_pool_handle()

    def prepare(self, step: Step) -> tuple[Step, str | None]:
        """A CUDA graph's replay of `step`; or `step`, warmed up, and why it is none."""
        for _ in range(3):
            step()
        if not self.gpu:
            return step, "no GPU"
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, pool=self.pool):
                step()
        except RuntimeError as error:  # what it calls cannot be captured
            torch.cuda.synchronize()
            return step, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, None

    def device_seconds(self, prepared: Step) -> float | None:
        """One call's time on the device."""
        if not self.gpu:
            return None
        assert self.flush is not None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        prepared()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wall_seconds(self, step: Step, calls: int) -> float:
        """One call's time on the host, in a row of `calls`, until the device is done."""
        self.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            step()
        self.synchronize()
        return (time.perf_counter() - started) / calls

    @functools.cached_property
    def stopwatch(self) -> Measure:
        """What times many calls of a product in turn, as the tuner does."""
        return Stopwatch(self.device)

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


class Scripted(Clock):
    """In the place of a GPU's: makes each call once, and says that it took what comes next."""

    MICROSECONDS = (12.0, 10.0, 11.0)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.times = itertools.cycle(self.MICROSECONDS)

    def wall_seconds(self, step: Step, calls: int) -> float:
        step()
        return next(self.times) / 1e6

    @property
    def stopwatch(self) -> Measure:  # type: ignore[override]
        return self._in_turn

    def _in_turn(self, calls: dict[str, Step], clock: str) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: 3 * [next(self.times)] for name in calls}


def peak_bytes(step: Step, parameters: list[Tensor]) -> int:
    """Bytes that a training step needs beside what is there before it.

    On a GPU: the allocator's peak during the step. On a CPU, where PyTorch keeps no such count:
    what the forward keeps for the backward, each storage once and parameters not, and the gradients
    of the parameters. The two are not to be compared.
    """
    if parameters[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    for parameter in parameters:
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(saved.values()) + sum(parameter.nbytes for parameter in parameters)


def ceilings(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """Bytes and operations a second that this device reaches: a large copy, a large product.

    Bytes are those read and those written. Each is the best of a few, as a ceiling is.
    """
    gpu = clock.gpu
    source = torch.randn((2**28 if gpu else 2**24), device=clock.device)
    target = torch.empty_like(source)
    size = 8192 if gpu else 1024
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))

    def best(step: Step, rounds: int) -> float:
        prepared, _ = clock.prepare(step)
        times: list[Any] = [
            clock.device_seconds(prepared) if gpu else clock.wall_seconds(step, 1)
            for _ in range(rounds)
        ]
        return min(times)

    copied = 2 * source.nbytes / best(lambda: target.copy_(source), 10)
    product = 2 * size**3 / best(lambda: a @ b, 10)
    return {"bytes_per_second": copied, "operations_per_second": product}
