"""Threads, streams and processes that call layers at the same time.

The interpreter runs one kernel at a time, for which threads take turns. test_launch and
test_compiled_launch have what launches share.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlinear
from fastlinear.choice import running, way
from fastlinear.kernels.backward import linear as backward
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.launching import launch, shared_sums
from fastlinear.ops import implementations

THREADS = 4
ALLOCATE = launch.allocate  # as users have it: memory of what is gone is used again
needs_streams = pytest.mark.skipif(launch.INTERPRETING, reason="there are no streams on a CPU")


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads change as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Results of `work(index)` from as many threads, which all start at once."""
    barrier = threading.Barrier(count)

    def begin(index: int) -> Any:
        barrier.wait(60)
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def step(layer: torch.nn.Linear, input: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of input, weight and bias."""
    input = input.detach().requires_grad_()
    output = layer(input)
    grad_output = output.detach().cos()
    gradients = torch.autograd.grad(output, (input, layer.weight, layer.bias), grad_output)
    return output.detach(), *gradients


def assert_same_bits(found: list[tuple[Tensor, ...]], expected: tuple[Tensor, ...]) -> None:
    for results in found:
        for result, one in zip(results, expected, strict=True):
            assert torch.equal(result, one)


@pytest.mark.gpu
@pytest.mark.usefixtures("hurried", "triton_backend")
def test_threads_get_what_each_would_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(way, "_ways", {})
    # One that all share, whose sums are split in forward and in backward, and one of each's own.
    shared = fastlinear.Linear(300, 9, device=device)
    layers = [fastlinear.Linear(20 + index % 2, 12, device=device) for index in range(THREADS)]
    inputs = [torch.randn(40, 20 + index % 2, device=device) for index in range(THREADS)]
    rows = torch.randn(20, 300, device=device)
    monkeypatch.setattr(shared_sums, "_counters", {})
    alone = [step(layer, input) for layer, input in zip(layers, inputs, strict=True)]
    of_shared = step(shared, rows)
    forward.plan_forward.cache_clear()
    backward.plan_backward.cache_clear()
    way._ways.clear()

    def work(index: int) -> None:
        for _ in range(2):
            assert_same_bits([step(layers[index], inputs[index])], alone[index])
            assert_same_bits([step(shared, rows)], of_shared)

    in_threads(work)
    (counted,) = shared_sums._counters.values()
    assert not counted.any()


def test_caches_stay_bounded_and_right_under_threads(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans, shortcuts and counters, with nothing launched: what is looked at is the arguments."""
    monkeypatch.setattr(way, "_ways", {})
    monkeypatch.setattr(way, "LARGEST_CACHE", 5)
    monkeypatch.setattr(way, "WAYS_A_SHAPE", 2)
    launched = threading.local()
    monkeypatch.setattr(launch, "run", lambda *given: launched.given.append(given))
    monkeypatch.setattr(launch, "allocate", ALLOCATE)
    sizes = [(rows, features) for rows in (1, 3, 8) for features in (16, 17, 80)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(index: int) -> int:
        launched.given, most = [], 0
        weights = {features: torch.randn(7, features, device=device) for _, features in sizes}
        for turn in range(60):
            rows, features = sizes[(turn * (index + 1)) % len(sizes)]
            input = torch.randn(rows, features, device=device)
            if turn % 3 == 0:
                input = torch.randn(features, rows, device=device).t()
            output = fastlinear.linear(input, weights[features])
            _, planned, pointers = launched.given.pop()
            assert not launched.given
            expected = (input, weights[features], None, output)
            for given, mine in zip(pointers[:4], expected, strict=True):
                assert given is mine or given.data_ptr() == mine.data_ptr()
            scalars = [one for one in planned.scalars if one is not None]
            assert scalars[:3] == [rows, 7, features]
            if len(scalars) > 9:
                assert scalars[8] == input.stride(1), "of an input that lies like this one"
            most = max(most, len(way._ways))
        return most

    try:
        with fastlinear.use_backend("triton"), torch.no_grad():
            most = max(in_threads(work))
    finally:
        sys.setswitchinterval(interval)
    # Each thread may have found room for one before another took it.
    assert most <= 5 + THREADS
    assert all(len(found) <= 2 + THREADS for found in way._ways.values())


def test_settings_that_change_while_a_call_is_remembered_are_not_remembered(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(way, "_ways", {})
    monkeypatch.setattr(launch, "run", lambda *given: None)
    straight, precisions = implementations.straight, iter(("high", "highest"))

    def changed(*given: Any) -> Any:
        """Another thread has "high" in force while the plan is made."""
        torch.set_float32_matmul_precision(next(precisions))
        return straight(*given)

    monkeypatch.setattr(implementations, "straight", changed)
    input, weight = torch.randn(40, 600, device=device), torch.randn(9, 600, device=device)
    with fastlinear.use_backend("triton"):
        fastlinear.linear(input, weight)
        assert not way._ways
        torch.set_float32_matmul_precision("highest")
        fastlinear.linear(input, weight)
    assert len(way._ways) == 1


def test_backend_of_a_backward_is_its_thread_s_alone() -> None:
    both = threading.Barrier(2)

    def work(index: int) -> bool | None:
        with running.as_its_forward(bool(index)):
            both.wait(60)
            found = running._forward.auto
            both.wait(60)
        return found

    assert in_threads(work, 2) == [False, True]
    assert running._forward.auto is None


# Processes.

FORKED = """
import multiprocessing, sys, threading, torch
import fastlinear
from torch.utils.data import DataLoader, Dataset

torch.manual_seed(0)
torch.set_num_threads(1)  # as DataLoader has it in its workers
layer = fastlinear.Linear(40, 9)
native = torch.nn.Linear(40, 9)
native.load_state_dict(layer.state_dict())
rows = torch.randn(4, 12, 40)

def step(layer, input):
    layer.zero_grad()
    output = layer(input)
    output.cos().sum().backward()
    return output.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()

def right(which):
    for found, expected in zip(step(layer, rows[which]), step(native, rows[which])):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return True

class Rows(Dataset):
    def __len__(self):
        return len(rows)

    def __getitem__(self, index):
        with torch.no_grad():
            assert right_without_gradients(index)
        return layer(rows[index]).detach()

def right_without_gradients(index):
    torch.testing.assert_close(layer(rows[index]), native(rows[index]), rtol=1e-4, atol=1e-4)
    return True

for name in ("auto", "triton"):
    with fastlinear.use_backend(name):
        right(0)
        thread = threading.Thread(target=right, args=(1,))  # autograd has run in a thread too
        thread.start()
        thread.join()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            forked = pool.map_async(right, range(4), chunksize=2).get(60)
        loader = DataLoader(
            Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        loaded = torch.cat(list(loader))
        torch.testing.assert_close(loaded, native(rows).detach(), rtol=1e-4, atol=1e-4)
        print(name, all(forked), tuple(loaded.shape), right(2))
print(multiprocessing.active_children())
"""


@pytest.mark.skipif(not launch.INTERPRETING, reason="it is interpreted, GPU or not")
def test_forked_processes_and_data_loaders_compute_as_their_parent() -> None:
    run = subprocess.run(
        # From Python 3.12 on a fork of a process that has threads is warned of.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines() == [
        "auto True (4, 12, 9) True",
        "triton True (4, 12, 9) True",
        "[]",
    ]


# Streams, of a GPU alone. Each test compares bits with what one stream computes by itself, and
# waits for the device only at the end, so that launches of several streams are there at once.


@pytest.fixture
def split(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Tensor]]:
    """Layers and inputs whose sums are split, forward, backward or both."""
    monkeypatch.setattr(launch, "allocate", ALLOCATE)
    monkeypatch.setattr(shared_sums, "_counters", {})
    sizes = [(16, 4096, 512), (64, 8192, 256), (4096, 64, 48), (333, 1000, 77)]
    cases = []
    for rows, features, outputs in sizes:
        layer = fastlinear.Linear(features, outputs, device=device, dtype=torch.bfloat16)
        input = torch.randn(rows, features, device=device, dtype=torch.bfloat16)
        cases.append((layer, input))
    return cases


@pytest.mark.gpu
@needs_streams
# Threads that share layers share the nodes that gather their gradients; torch says that they wait.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@pytest.mark.usefixtures("triton_backend")
def test_threads_on_streams_of_their_own_get_the_same_bits(split: list[tuple[Any, Tensor]]) -> None:
    expected = [step(*case) for case in split]
    torch.cuda.synchronize()

    def work(index: int) -> list[tuple[Tensor, ...]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [step(*split[(index + turn) % len(split)]) for turn in range(40)]
        return found

    found = in_threads(work)
    torch.cuda.synchronize()
    for index, results in enumerate(found):
        for offset in range(len(split)):
            case = (index + offset) % len(split)
            assert_same_bits(results[offset :: len(split)], expected[case])
    assert all(not counted.any() for counted in shared_sums._counters.values())


@pytest.mark.gpu
@needs_streams
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("most", [shared_sums.MOST_STREAMS, 2], ids=["kept", "forgotten"])
def test_streams_that_come_and_go_get_the_same_bits(
    most: int, split: list[tuple[Any, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_sums, "MOST_STREAMS", most)
    expected = [step(*case) for case in split]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(5)]
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in split]
    for turn in range(100):
        with torch.cuda.stream(streams[turn % len(streams)]):
            case = turn % len(split)
            found[case].append(step(*split[case]))
        assert len(shared_sums._counters) <= most
    torch.cuda.synchronize()
    for results, one in zip(found, expected, strict=True):
        assert_same_bits(results, one)


@pytest.mark.gpu
@needs_streams
@pytest.mark.usefixtures("triton_backend")
def test_graphs_and_eager_calls_share_nothing(split: list[tuple[Any, Tensor]]) -> None:
    expected = [step(*case) for case in split]
    own = torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    graphs = []
    with torch.cuda.stream(own):
        for case in split:
            step(*case)  # what is captured must have been run
    torch.cuda.synchronize()
    for case in split:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=own):
            results = step(*case)
        graphs.append((graph, results))
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in split]
    torch.cuda.synchronize()
    others = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(40):
        for stream in others:  # a graph and eager calls on each, and no order between them
            with torch.cuda.stream(stream):
                case = turn % len(split)
                if stream is others[turn % 2]:
                    graphs[case][0].replay()
                    # Replays of one graph share its results: these are kept apart.
                    found[case].append(tuple(one.clone() for one in graphs[case][1]))
                found[case].append(step(*split[case]))
        if turn % len(split) == len(split) - 1:
            torch.cuda.synchronize()  # before a graph is replayed again, on the other stream
    torch.cuda.synchronize()
    for results, one in zip(found, expected, strict=True):
        assert_same_bits(results, one)
