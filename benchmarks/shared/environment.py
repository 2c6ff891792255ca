"""What a measurement was taken on: device, driver, versions, commit."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.files import write_json

_CHANGES = ("git", "status", "--porcelain", "--untracked-files=no", "--", ".")
_NOT_RESULTS = ":!benchmarks/results"  # what a measurement itself writes does not count


def _first_line(*command: str) -> str | None:
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True)
            .stdout.splitlines()[0]
            .strip()
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return next(
                line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return str(__import__(package).__version__)
    except ImportError:
        return None


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Device (None: the GPU, if there is one), driver, versions and commit, as JSON takes them."""
    gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "driver": (
            _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            if gpu
            else None
        ),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        # A copy of the tree without its history says which commit it is by FASTLINEAR_COMMIT.
        "commit": os.environ.get("FASTLINEAR_COMMIT") or _first_line("git", "rev-parse", "HEAD"),
        "uncommitted": bool(_first_line(*_CHANGES, _NOT_RESULTS)),
    }


def main() -> None:
    """Prints what there is to know of the machine, and writes the short of it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    found = environment() | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        with contextlib.suppress(OSError):
            subprocess.run(["nvidia-smi"], check=False)
    if arguments.json:
        write_json(arguments.json, found)
    print(json.dumps(found), found["device"], sep="\n", flush=True)


if __name__ == "__main__":
    main()
