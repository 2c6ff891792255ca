"""The examples run, on a CPU and within a minute, and say what they found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str, folder: Path, *given: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"FASTLINEAR_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", [[], ["--train"]], ids=["", "train"])
def test_tune(how: list[str], tmp_path: Path) -> None:
    said = run("tune.py", tmp_path, "--rows", "4", "--seconds", "8", *how)
    for line in (
        "6 converted, 0 skipped",
        "1 folded",
        "a step's linear layers: ",
        "backend 'auto' takes ",
    ):
        assert line in said
    assert said.splitlines()[-1].startswith("fastlinear, tuned ")
