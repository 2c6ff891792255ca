"""Where tables lie, and whether there are any: what reads them (lookup.py) is imported then."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import fastlinear.kernels as kernels
from fastlinear import ranks

if TYPE_CHECKING:
    import torch

    from fastlinear.kernels.tables import Row

SHIPPED = Path(kernels.__path__[0]) / "tuned"


def user_folder() -> Path:
    """Where the user's own tables lie.

    FASTLINEAR_CACHE, or fastlinear/ in XDG_CACHE_HOME, which is ~/.cache where it is not set.
    """
    given = os.environ.get("FASTLINEAR_CACHE")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fastlinear"


def folders() -> tuple[Path, ...]:
    """Where tables lie; a row of the second, the user's, counts before one of the first."""
    try:
        return SHIPPED, user_folder()
    except RuntimeError:  # nobody knows where the home folder is
        return (SHIPPED,)


def any_files() -> bool:
    """Whether there is a table for any device."""
    return any(name.endswith(".json") for folder in folders() for name in _names(folder))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


# Whether there is a table at all, which every call asks first. Another rank may have one.
available: bool = any_files() or ranks.expected()
settled: int | None = None  # the group whose ranks have agreed that there is none
generation = 0  # counts the times that tables were read anew
given: dict[torch.device, tuple[Row, ...]] | None = None  # in the place of all tables


def reload(rows: dict[torch.device, tuple[Row, ...]] | None = None) -> None:
    """Looks for tables again, or takes these rows for all that there is."""
    global available, settled, generation, given
    given = rows
    available = rows is not None or any_files() or ranks.expected()
    settled = None
    generation += 1


def settle() -> None:
    """Asks for tables no more: no rank of this group has one."""
    global available, settled
    available, settled = False, ranks.group()
