"""The benchmarks run, and write what they print."""

import json
import subprocess
import sys
from pathlib import Path

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
