"""How calls are timed, on a GPU and on a CPU."""

import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
# Microseconds of each call, by its name, one for each round in which all took turns.
Times = dict[str, list[float]]
Measure = Callable[[dict[str, Call], str], Times]  # the second argument is "device" or "wall"

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


def _timed(call: Call, count: int, wait: Callable[[], None] = lambda: None) -> float:
    """Microseconds of one of so many calls; `wait` is for what they have begun, and before them."""
    wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return 1e6 * (time.perf_counter() - started) / count


def _rounds(time_of: Mapping[str, Callable[[], float]], rounds: int, turn: int = 1) -> Times:
    """The times of so many rounds, so that a slow moment of the machine meets them all.

    turn: -1 has every other round go the other way about.
    """
    times: Times = {name: [] for name in time_of}
    for number in range(rounds):
        for name in list(time_of)[:: turn if number % 2 else 1]:
            times[name].append(time_of[name]())
    return times


class Stopwatch:
    """Times calls on a GPU, in turn."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Backward runs on the stream of its forward, and only what is on the captured stream is
        # captured: so all is on one.
        self.stream = torch.cuda.Stream(device)
        self.flush = Flush(device)

    def __call__(self, calls: dict[str, Call], clock: str) -> Times:
        """Each call's times, in microseconds.

        Args:
            calls: by name.
            clock: "device" is from the first kernel's start to the last one's end, with nothing of
                the operands in L2; "wall" is the time until the next call can be made, or the
                device's where that is longer.
        """
        self._wait()  # operands were made on the current stream
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            for call in calls.values():
                for _ in range(WARM_UPS):
                    call()
            time_of: dict[str, Callable[[], float]] = {}
            # They run one at a time, and nobody reads their outputs: one memory is for all.
            pool = torch.cuda.graph_pool_handle() if clock == "device" else None
            for name, call in calls.items():
                if clock == "device":
                    time_of[name] = partial(self._on_the_device, self._captured(call, pool))
                else:
                    count = max(5, round(1e6 * LEAST_SECONDS / _timed(call, 5, self._wait)))
                    time_of[name] = partial(_timed, call, count, self._wait)
            times = _rounds(time_of, ROUNDS)
        self._wait()
        return times

    def _wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def _on_the_device(self, replay: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            self.flush()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end)

    def _captured(self, call: Call, pool: Any) -> Call:
        """A CUDA graph's replay of `call`, or `call` itself where it cannot be captured."""
        from fastlinear.kernels.launching.shared_sums import replayed_in_order

        self._wait()
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
            self._wait()
            return call
        graph.replay()
        return partial(_replay, graph, counters)


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

    def __call__(self, calls: dict[str, Call], clock: str) -> Times:
        """Each call's times, in microseconds; `clock` is "wall" or "device", and no matter.

        Raises:
            OutOfTime: not even the least number of rounds would end within the limit.
        """
        counts = {name: _count_of(call) for name, call in calls.items()}
        a_round = sum(_timed(call, counts[name]) * counts[name] for name, call in calls.items())
        least, most = CPU_ROUNDS
        if time.monotonic() + least * a_round / 1e6 > self.limit:
            raise OutOfTime("it would take longer than there is")
        rounds = min(most, max(least, round(CPU_SECONDS * 1e6 / a_round)))
        time_of = {name: partial(_timed, call, counts[name]) for name, call in calls.items()}
        return _rounds(time_of, rounds, turn=-1)  # what comes first may find another cache


def _count_of(call: Call) -> int:
    """How often a call on a CPU is made at a time; warms it up."""
    taken = _timed(call, 1)
    for _ in range(WARM_UPS - 1 if taken < 1e5 else 0):  # a long one is as good as warm
        taken = _timed(call, 1)
    return max(1, round(1e6 * LEAST_SECONDS / taken))


def _replay(graph: torch.cuda.CUDAGraph, counters: Tensor | None) -> None:
    """Replays `graph`, which takes `counters`: they are to be kept as long as it."""
    graph.replay()
