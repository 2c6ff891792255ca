"""Fixtures of `make gpu` without a GPU."""

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gpu_runs import ROOT


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.gpu

    monkeypatch.setattr(benchmarks.gpu, "GRACE", 0.5)
    setting = dataclasses.replace(benchmarks.gpu.SETTING, missing=lambda: None)
    monkeypatch.setattr(benchmarks.gpu, "SETTING", setting)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield benchmarks.gpu
    for number, handler in before.items():  # main sets its own
        signal.signal(number, handler)


@pytest.fixture
def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    def main(parts: list[Any], *arguments: str) -> int:
        monkeypatch.setattr(gpu, "PARTS", parts)
        arguments = arguments or ("--call", "1")
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), *arguments])
        return gpu.main()

    return main
