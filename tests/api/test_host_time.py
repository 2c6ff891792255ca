"""Host time: how much is done between a call and its launch."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastlinear
from benchmarks.host_time import without_launches
from fastlinear.choice import known
from fastlinear.kernels.launching import launch


def calls_of(function: Callable[[], object]) -> int:
    """How many functions `function` calls, Python's and C's."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


allocate = launch.allocate  # not that of the tests


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "allocate", allocate)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # more take a step more
    monkeypatch.setattr(known, "seen", False)  # and so does a process that has had a table
    with without_launches():
        yield


@pytest.mark.parametrize(
    ("what", "grad", "most"),
    [("linear", False, 38), ("linear", True, 44), ("Linear", False, 44), ("Linear", True, 50)],
)
def test_a_call_gets_to_its_launch_in_few_steps(
    what: str,
    grad: bool,
    most: int,
    triton_backend: None,
    unlaunched: None,
    device: torch.device,
) -> None:
    """Some more than it takes. Microseconds would depend on the machine, and what else it does."""
    layer = fastlinear.Linear(16, 16, device=device)
    weight, bias, input = layer.weight, layer.bias, torch.randn(4, 16, device=device)
    with torch.set_grad_enabled(grad):
        call = {
            "linear": lambda: fastlinear.linear(input, weight, bias),
            "Linear": lambda: layer(input),
        }[what]
        for _ in range(3):
            call()
        assert calls_of(call) <= most
