"""The benchmarks run, and write what they print."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels
from benchmarks.speed import kernel_times
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.launching import launch
from fastlinear.tuning.stopwatch import Call

ROOT = Path(__file__).parents[2]


def test_host_time_writes_what_it_prints(tmp_path: Path) -> None:
    written = tmp_path / "host-time.json"
    command = ["-m", "benchmarks.host_time", "--rounds", "1", "--calls", "3", "--json"]
    result = subprocess.run(
        [sys.executable, *command, str(written)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(written.read_text())
    assert found["environment"]["torch"]
    for row in found["rows"]:
        assert f"| {row['call']} | {row['backend'] or '-'} | {row['no grad']} |" in result.stdout
    assert [row["backend"] for row in found["rows"]].count("auto, with a table") == 2


def test_kernels_are_timed_in_the_configurations_that_the_model_ranks_first(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """By a clock that counts calls, with one kernel that does not launch."""
    setting = dataclasses.replace(kernel_times.SETTING, timed=((48, 32),), timed_rows=(1, 40))
    monkeypatch.setattr(kernel_times, "SETTING", setting)
    rows: list[dict[str, Any]] = []
    count = itertools.count(1)
    asked: list[str] = []

    def stopwatch(calls: dict[str, Call], clock: str) -> dict[str, list[float]]:
        asked.append(clock)
        for call in calls.values():
            call()
        return {name: [float(next(count))] for name in calls}

    def persistent(*given: Any, **options: Any) -> Any:
        raise launch.CannotLaunch("no such kernel")

    monkeypatch.setitem(forward.KINDS, "persistent", persistent)
    forward.plan_forward.cache_clear()
    kernel_times.measure(rows.append, ["bfloat16", "bf16x6"], float("inf"), stopwatch, device)
    forward.plan_forward.cache_clear()
    found = {(row["dtype"], row["product"], row["m"]) for row in rows}
    assert len(found) == len(rows) == 2 * 2 * 4
    assert set(asked) == {"device"}
    failed = [why for row in rows for why in row.get("failed", {}).values()]
    assert set(failed) == {"CannotLaunch: no such kernel"}
    for row in rows:
        assert row["chosen"] in row["kernel_us"]
        assert len(row["kernel_us"]) <= kernel_times.CANDIDATES
    output = next(row for row in rows if row["product"] == "output" and row["m"] == 1)
    assert next(iter(output["kernel_us"])) == output["chosen"]
    assert len(output["kernel_us"]) + len(output.get("failed", {})) == 4, "one of each kind"
    results = {"environment": dict.fromkeys(("device", "driver", "torch", "triton"))}
    table = kernels.table(results | {"date": "2000-01-01", "rows": rows})
    assert table.count("| bf16x6 | backward | 48 x 32 |") == 1
    assert "of the best one's speed" in kernels.summary({"rows": rows})
