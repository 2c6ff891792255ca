"""The benchmarks run, and write what they print."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels

ROOT = Path(__file__).parent.parent


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
    assert len(found["rows"]) == 8


def test_kernels_are_timed_in_every_configuration(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """By a clock that counts calls: all of them run, and the table finds the chosen one's time."""
    monkeypatch.setattr(kernels, "LAYERS", [(48, 32)])
    monkeypatch.setattr(kernels, "ROWS", [1, 40])
    monkeypatch.setattr(kernels, "ROUNDS", 1)
    rows: list[dict[str, Any]] = []
    count = itertools.count(1)

    def clock(call: Callable[[], Any]) -> float:
        call()
        return float(next(count))

    kernels.measure(rows.append, ["bfloat16", "bf16x6"], float("inf"), clock, device.type)
    found = {(row["dtype"], row["product"], row["m"]) for row in rows}
    assert len(found) == len(rows) == 2 * 2 * 4
    for row in rows:
        assert row["chosen"] in row["kernel_us"]
    results = {"environment": dict.fromkeys(("device", "driver", "torch", "triton"))}
    table = kernels.table(results | {"date": "2000-01-01", "rows": rows})
    assert table.count("| bf16x6 | backward | 48 x 32 |") == 1
    assert "of the best one's speed" in kernels.summary({"rows": rows})
