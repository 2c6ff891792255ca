"""How calls are timed, on a GPU and on a CPU."""

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
# Microseconds of each call, by its name, one for each round in which all took turns. The second
# argument is "device" or "wall".
Measure = Callable[[dict[str, Call], str], dict[str, list[float]]]

ROUNDS = 11
CPU_ROUNDS, CPU_SECONDS = (7, 31), 1.5  # at least and at most; what all should take together
WARM_UPS = 3  # calls, of which the first may compile
LEAST_SECONDS = 0.002  # that a row of calls takes whose wall time is measured
FLUSHED_BYTES = 2**28  # more than any L2 holds
# Times that so much is read before a call: in all a third of a millisecond at the bandwidth of an
# H100's data sheet, in which the host gets ahead of the device, for a call's many launches too.
FLUSHES = 4


class Flush:
    """Empties a GPU's L2 cache of what the next call reads, by reading other memory.

    Had that been written, it would go back to memory while the call runs, in the call's time.
    """

    def __init__(self, device: torch.device, size: int = FLUSHED_BYTES) -> None:
        """size: bytes that each flush reads."""
        self.read = torch.zeros(size // 4, device=device)
        self.total = torch.empty((), device=device)

    def __call__(self) -> None:
        torch.sum(self.read, 0, out=self.total)


class Stopwatch:
    """Times calls in turn, so that a slow moment of the machine meets them all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Backward runs on the stream of its forward, and only what is on the captured stream is
        # captured: so all is on one.
        self.stream = torch.cuda.Stream(device)
        self.flush = Flush(device)

    def __call__(self, calls: dict[str, Call], clock: str) -> dict[str, list[float]]:
        """Each call's times, in microseconds.

        Args:
            calls: by name.
            clock: "device" is from the first kernel's start to the last one's end, with nothing of
                the operands in L2; "wall" is the time until the next call can be made, or the
                device's where that is longer.
        """
        # Operands were made on the current stream.
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            for call in calls.values():
                for _ in range(WARM_UPS):
                    call()
            if clock == "device":
                # They run one at a time, and nobody reads their outputs: one memory is for all.
                pool = torch.cuda.graph_pool_handle()
                time_of = {name: self._on_the_device(call, pool) for name, call in calls.items()}
            else:
                time_of = {name: self._on_the_wall(call) for name, call in calls.items()}
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(ROUNDS):
                for name, measure in time_of.items():
                    times[name].append(measure())
        torch.cuda.synchronize(self.device)
        return times

    def _on_the_device(self, call: Call, pool: Any) -> Callable[[], float]:
        replay = self._captured(call, pool)

        def measure() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(FLUSHES):
                self.flush()
            start.record()
            replay()
            end.record()
            end.synchronize()
            return 1000 * start.elapsed_time(end)

        return measure

    def _captured(self, call: Call, pool: Any) -> Call:
        """A CUDA graph's replay of `call`, or `call` itself where it cannot be captured."""
        from fastlinear.kernels.launching.shared_sums import replayed_in_order

        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                # An eager call sets no counters to 0, and so its graph does not either.
                replayed_in_order(self.device, self.stream.cuda_stream) as counters,
                torch.cuda.graph(graph, pool=pool, stream=self.stream),
            ):
                call()
        except torch.OutOfMemoryError:  # a RuntimeError too
            raise
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return call
        graph.replay()
        return functools.partial(_replay, graph, counters)

    def _on_the_wall(self, call: Call) -> Callable[[], float]:
        def measure(count: int) -> float:
            torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            for _ in range(count):
                call()
            torch.cuda.synchronize(self.device)
            return 1e6 * (time.perf_counter() - started) / count

        count = max(5, round(LEAST_SECONDS / (measure(5) / 1e6)))
        return lambda: measure(count)


class OutOfTime(Exception):
    """What is to be timed would take longer than there is."""


class CpuStopwatch:
    """Times calls in turn on a CPU, where the caller's clock is the only one.

    Args:
        limit: by time.monotonic(), when all has to be over.

    Raises:
        RuntimeError: kernels are interpreted, which says nothing of their time.
    """

    def __init__(self, limit: float = math.inf) -> None:
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise RuntimeError("tuning measures no interpreted kernels: unset TRITON_INTERPRET")
        self.limit = limit

    def __call__(self, calls: dict[str, Call], clock: str) -> dict[str, list[float]]:
        """Each call's times, in microseconds; `clock` is "wall" or "device", and no matter.

        Raises:
            OutOfTime: not even the least number of rounds would end within the limit.
        """
        counts = {name: self._count(call) for name, call in calls.items()}
        a_round = sum(self._time(call, counts[name]) * counts[name] for name, call in calls.items())
        least, most = CPU_ROUNDS
        if time.monotonic() + least * a_round / 1e6 > self.limit:
            raise OutOfTime("it would take longer than there is")
        rounds = min(most, max(least, round(CPU_SECONDS * 1e6 / a_round)))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            # Every other round the other way about: what comes first may find another cache.
            for name in list(calls)[:: -1 if number % 2 else 1]:
                times[name].append(self._time(calls[name], counts[name]))
        return times

    def _count(self, call: Call) -> int:
        """How often it is called at a time; warms it up."""
        first = self._time(call, 1)
        for _ in range(WARM_UPS - 1 if first < 1e5 else 0):  # a long one is as good as warm
            first = self._time(call, 1)
        return max(1, round(LEAST_SECONDS / (first / 1e6)))

    def _time(self, call: Call, count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            call()
        return 1e6 * (time.perf_counter() - started) / count


def _replay(graph: torch.cuda.CUDAGraph, counters: Tensor | None) -> None:
    """Replays `graph`, which takes `counters`: they are to be kept as long as it."""
    graph.replay()
