"""Results that are written as they come, and read while or after they are."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Puts `value` in the place of what `path` held, so that a kill leaves the one or the other."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(value, indent=1))
    os.replace(unfinished, path)


def read_json(path: Path) -> dict[str, Any]:
    """What `path` holds; {} where there is no such file, or a broken one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
