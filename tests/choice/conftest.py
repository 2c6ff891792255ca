"""Fixtures of tables: where one lies, a table that is in use, and what is launched then."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up import table
from torch import Tensor

from fastlinear.choice import backend, known
from fastlinear.choice import table as tables
from fastlinear.choice.table import Row
from fastlinear.kernels.launching import launch


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's table of the interpreter is to lie."""
    monkeypatch.setenv("FASTLINEAR_CACHE", str(tmp_path))
    yield tmp_path / "triton-interpreter.json"
    monkeypatch.undo()
    backend.use_tables()
    assert not known.available


@pytest.fixture
def use(path: Path) -> Callable[..., None]:
    def write_and_use(*rows: Row, **changes: Any) -> None:
        tables.write(path, table(*rows, **changes))
        backend.use_tables()

    return write_and_use


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The kernels that are launched, each with its BLOCK_M."""
    found: list[tuple[str, int]] = []
    run = launch.run

    def spy(kernel: Any, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:
        found.append((kernel.__name__, plan.constants["TILE"].M if "TILE" in plan.constants else 0))
        run(kernel, plan, pointers)

    monkeypatch.setattr(launch, "run", spy)
    return found
