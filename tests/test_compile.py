"""Every kernel, configuration and dtype, compiled ahead of time for every GPU family.

No GPU need be at hand.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ahead_of_time.py")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_within_the_resources_of(target: str, tmp_path: Path) -> None:
    """No spill, no more shared memory than there is, and the expected matrix instructions."""
    found = tmp_path / "found.json"
    # A process of its own: this one may have imported Triton as an interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--targets", target, "--json", str(found)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert result.returncode in (0, 1), result.stderr
    rows = json.loads(found.read_text())
    print(result.stdout)
    assert len(rows) >= 90
    assert {row["label"]: row["faults"] for row in rows if row["faults"]} == {}
