"""Results that are written as they come, and read while or after they are."""

import json
import os
from pathlib import Path
from typing import Any


def put(path: Path, text: str) -> None:
    """Puts `text` in the place of what `path` held, so that a kill leaves the one or the other."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def write_json(path: Path, value: Any) -> None:
    put(path, json.dumps(value, indent=1))


def write_rows(path: Path, value: dict[str, Any], name: str = "rows") -> None:
    """The same, with each of the many rows that `value` has by `name` on a line of its own."""
    rows = ",\n".join(json.dumps(row) for row in value[name])
    head = {key: one for key, one in value.items() if key != name}
    put(path, json.dumps(head, indent=1)[:-2] + f',\n "{name}": [\n{rows}\n]\n}}\n')


def read_json(path: Path) -> dict[str, Any]:
    """What `path` holds; {} where there is no such file, or a broken one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
