"""Fixtures of `fastlinear.tune`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up import Clocks

from fastlinear.choice import backend
from fastlinear.tuning import tune


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clocks]:
    """In the place of the CPU's; tables go into a folder of their own."""
    clocks = Clocks()
    monkeypatch.setenv("FASTLINEAR_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "CpuStopwatch", lambda limit: clocks)
    yield clocks
    monkeypatch.undo()
    backend.use_tables()
