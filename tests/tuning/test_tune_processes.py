"""`fastlinear.tune` on several ranks, and in processes that share a table or are killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from made_up import Clocks, converted
from torch import nn

import fastlinear
from fastlinear import _machine as machine
from fastlinear import _ranks as ranks
from fastlinear import _torch_internals as internals
from fastlinear.choice import table
from fastlinear.kernels.launching import launch
from fastlinear.tuning import tune

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not launch.INTERPRETING, reason="the clocks are made up")


# Ranks.


@pytest.fixture
def two_ranks(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    store = dist.HashStore()
    monkeypatch.setattr(ranks, "in_group", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(internals, "default_store", lambda: store)
    monkeypatch.setattr(internals, "default_group", lambda: store)
    monkeypatch.setattr(ranks, "group", lambda: id(store))
    monkeypatch.setattr(tune, "_turn", 0)
    return store


def test_one_rank_measures_and_the_other_goes_by_it(
    two_ranks: dist.Store, clocks: Clocks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8))).eval()
    with torch.no_grad():
        assert fastlinear.tune(model, torch.randn(4, 8)).calls[0].way == "kernel"
        asked = clocks.asked
        assert asked
        # As rank 1, on another machine: without the file.
        next(tmp_path.glob("*.json")).unlink()
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        monkeypatch.setattr(tune, "_turn", 0)
        with pytest.warns(RuntimeWarning, match="another rank's tables"):
            tuned = fastlinear.tune(model, torch.randn(4, 8))
    assert clocks.asked == asked
    assert (tuned.calls[0].way, tuned.finished) == ("kernel", True)


def test_rank_that_dies_is_not_waited_for(
    two_ranks: dist.Store, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = machine.device_name(torch.device("cpu"))
    two_ranks.set(f"fastlinear/tuning/{name}/1/rank", "1")  # and never done
    monkeypatch.setattr(ranks, "GRACE", 0.2)
    model = converted(nn.Sequential(nn.Linear(8, 8))).eval()
    started = time.monotonic()
    with torch.no_grad():
        tuned = fastlinear.tune(model, torch.randn(4, 8), seconds=0.2)
    assert time.monotonic() - started < 5
    assert not tuned.finished
    assert clocks.asked == 0


def test_rank_that_fails_lets_the_others_go_on(
    two_ranks: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        ranks.by_one("CPU", time.monotonic(), failing, ("table", str))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    ranks.by_one("CPU", time.monotonic() + 60, failing, ("table", str))


def test_rank_that_is_late_keeps_its_table_to_itself(
    two_ranks: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that all choose alike: the others have gone on by the one before."""
    published: list[str] = []

    def publish() -> str:
        published.append("a table")
        return "[]"

    monkeypatch.setattr(ranks, "GRACE", 0.0)

    def late() -> None:
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        ranks.by_one("CPU", time.monotonic(), lambda: None, ("table", publish))

    ranks.by_one("CPU", time.monotonic(), late, ("table", publish))
    assert not published


# With a CPU's own clocks.

PROGRAM = """
import sys, torch, fastlinear
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(96, 192), torch.nn.GELU(), torch.nn.Linear(192, 96))
fastlinear.convert(model)
with torch.no_grad():
    for rows in map(int, sys.argv[1].split(",")):
        print(fastlinear.tune(model.eval(), torch.randn(rows, 96), seconds=30), flush=True)
"""


def program(folder: Path, rows: str) -> "subprocess.Popen[str]":
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given |= {"FASTLINEAR_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, rows]
    how = {"cwd": ROOT, "text": True, "env": given, "start_new_session": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)  # type: ignore[call-overload]


def rows_in(folder: Path) -> set[Any]:
    return {row.key for path in folder.glob("*.json") for row in table.read(path).rows}


def test_two_at_once_and_one_that_is_killed_leave_a_whole_table(tmp_path: Path) -> None:
    every = ",".join(str(2**power) for power in range(10))
    both = [program(tmp_path, every), program(tmp_path, every)]
    while not rows_in(tmp_path):
        time.sleep(0.01)
        assert any(one.poll() is None for one in both), [one.communicate() for one in both]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(both[0].pid, signal.SIGKILL)
    rows_in(tmp_path)  # raises where a table is broken
    said, errors = both[1].communicate(timeout=120)
    assert both[1].returncode == 0, errors
    both[0].communicate()
    assert len(rows_in(tmp_path)) == 20
    assert "a step's linear layers" in said
    assert "1 thread" in said
    again, _ = program(tmp_path, "4").communicate(timeout=120)
    assert "not measured" not in again
