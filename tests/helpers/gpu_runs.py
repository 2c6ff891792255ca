"""Parts of `make gpu` that are made up, and points and files of their results."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]


def part(gpu: ModuleType, name: str, code: str, calls: tuple[int, ...] = (1,)) -> Any:
    return gpu.Part(name, 1, calls, lambda run: [sys.executable, "-c", code, str(run.scratch)])


def point(**changes: Any) -> dict[str, Any]:
    ordinary = {
        "shape": "a",
        "batch_size": 64,
        "dtype": "bfloat16",
        "precision": "highest",
        "mode": "forward",
        "activation": None,
        "bias": True,
        "arm": "fastlinear auto",
        "device_us": 10.0,
        "wall_us": 20.0,
        "ratio": 1.0,
        "ratio_low": 0.9,
        "ratio_high": 1.1,
    }
    return ordinary | changes


def write(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
