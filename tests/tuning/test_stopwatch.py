"""The tuner's stopwatch, on a made-up GPU that runs behind its host."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlinear.kernels.launching import shared_sums
from fastlinear.tuning import stopwatch
from fastlinear.tuning.stopwatch import FLUSHES, ROUNDS, WARM_UPS, Stopwatch

STREAM = 77
FLUSH = 100.0  # microseconds of flushing L2 once


class Gpu:
    """In the place of torch.cuda: what is launched runs in order, as soon as the host is there."""

    def __init__(self) -> None:
        self.host = self.done = 0.0  # microseconds, of the host's clock and of all that is launched
        self.capturing: list[Callable[[], None]] | None = None
        self.log: list[str] = []
        self.pools: set[int] = set()

    def launch(self, name: str, host: float, device: float) -> None:
        """`host` microseconds later the device starts what takes it `device` microseconds."""
        if self.capturing is not None:
            self.capturing.append(lambda: self.launch(name, 0, device))
            return
        self.host += host
        self.done = max(self.done, self.host) + device
        self.log.append(name)

    def synchronize(self, device: object = None) -> None:
        assert self.capturing is None
        self.host = max(self.host, self.done)

    def call(self, name: str, host: float, device: float) -> Callable[[], None]:
        return lambda: self.launch(name, host, device)

    def start_of_next(self) -> float:
        return max(self.done, self.host)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = gpu.start_of_next()
            gpu.log.append("event")

        def synchronize(self) -> None:
            gpu.synchronize()

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) / 1000

    class Graph:
        def replay(self) -> None:
            gpu.host += 5
            for launched in self.launches:
                launched()

    @contextlib.contextmanager
    def graph(captured: Any, pool: int, stream: object) -> Iterator[None]:
        gpu.pools.add(pool)
        gpu.capturing = captured.launches = []
        try:
            yield
        finally:
            gpu.capturing = None

    handles = iter(range(100))
    stand_ins = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: next(handles),
        "Stream": lambda device: SimpleNamespace(cuda_stream=STREAM),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": gpu.synchronize,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host / 1e6)
    monkeypatch.setattr(stopwatch, "Flush", lambda device: gpu.call("flush", 3, FLUSH))
    return gpu


@pytest.mark.gpu
def test_flush_reads_all_of_its_bytes(device: torch.device) -> None:
    flush = stopwatch.Flush(device, 4096)
    flush.read.fill_(1)
    flush()
    assert flush.total.item() == 1024


def test_device_time_is_the_kernel_s_alone(gpu: Gpu) -> None:
    calls = {"slow": gpu.call("slow", 40, 7.5), "fast": gpu.call("fast", 90, 2.0)}
    times = Stopwatch(torch.device("cuda", 0))(calls, "device")
    assert times["slow"] == pytest.approx([7.5] * ROUNDS)
    assert times["fast"] == pytest.approx([2.0] * ROUNDS), "the host's time is not in it"
    assert gpu.log[: 2 * WARM_UPS] == ["slow"] * WARM_UPS + ["fast"] * WARM_UPS
    turn = [*["flush"] * FLUSHES, "event", "slow", "event"]
    turn += [*["flush"] * FLUSHES, "event", "fast", "event"]
    assert gpu.log[-len(turn) :] == turn, "each in its turn, out of L2"
    assert len(gpu.pools) == 1


def test_captured_launches_take_the_counters_that_eager_ones_take(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, eager, captured = torch.device("cuda", 0), [], []
    counters = torch.zeros(4)
    monkeypatch.setattr(shared_sums, "_counters", {(device, STREAM): counters})

    def call() -> None:
        (eager if gpu.capturing is None else captured).append(set(shared_sums._in_order))
        gpu.launch("kernel", 3, 5)

    stopwatch = Stopwatch(device)
    replay = stopwatch._captured(call, 0)
    assert captured == [{(device, STREAM)}]
    assert not shared_sums._in_order
    assert replay.args[1] is counters, "kept for as long as the graph"  # type: ignore[attr-defined]
    stopwatch({"call": call}, "device")
    assert eager == [set()] * WARM_UPS
    assert len(captured) == 2


def test_what_cannot_be_captured_is_launched_while_l2_is_flushed(gpu: Gpu) -> None:
    def synchronizing() -> None:
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        for _ in range(8):
            gpu.launch("kernel", 20, 3)

    times = Stopwatch(torch.device("cuda", 0))({"call": synchronizing}, "device")
    assert times["call"] == pytest.approx([24.0] * ROUNDS)


def test_what_does_not_fit_in_memory_is_not_timed_without_its_graph(gpu: Gpu) -> None:
    def too_large() -> None:
        if gpu.capturing is not None:
            raise torch.OutOfMemoryError("2 TiB")

    with pytest.raises(torch.OutOfMemoryError):
        Stopwatch(torch.device("cuda", 0))({"call": too_large}, "device")


@pytest.mark.parametrize(("host", "device", "wall"), [(12.0, 3.0, 12.0), (2.0, 30.0, 30.0)])
def test_wall_time_is_what_takes_longer(gpu: Gpu, host: float, device: float, wall: float) -> None:
    calls = {"call": gpu.call("call", host, device)}
    times = Stopwatch(torch.device("cuda", 0))(calls, "wall")
    assert times["call"] == pytest.approx([wall] * ROUNDS, rel=0.05)
    calls_a_round = (len(gpu.log) - WARM_UPS - 5) / ROUNDS
    assert calls_a_round * wall / 1e6 == pytest.approx(stopwatch.LEAST_SECONDS, rel=0.2)
