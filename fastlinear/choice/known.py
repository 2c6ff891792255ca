"""What is known of the device at hand: the tables that hold for it, and their rows.

A device's tables are read once, when they are first asked for, or again when there is a process
group. Ranks that chose different kernels would round differently, and replicas of a parameter drift
apart. So all go by the tables of one of them: the first that asks for those of its kind of GPU puts
them into the group's store, where the others find them. No collective is called, and no rank waits
for another, but for the one that tunes. The answer depends on the tables and on shapes alone, and
nothing is measured here.
"""

import collections
import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import fastlinear.kernels as kernels
from fastlinear import _machine as machine
from fastlinear import _ranks as ranks
from fastlinear._files import user_folder
from fastlinear.choice import table
from fastlinear.choice.launchers import target_of
from fastlinear.choice.table import BY_ROWS, PYTORCH, Key, Row, Table
from fastlinear.kernels.configs.config import Target
from fastlinear.kernels.configs.products import traits_of, why_illegal_for

SHIPPED = Path(kernels.__path__[0]) / "tuned"
# How many times PyTorch's speed counts; and where it was measured with another torch or Triton.
MARGIN, MARGIN_OF_OTHERS = 1.05, 1.15
Files = list[tuple[str, str]]  # paths of tables, with the text of each


class Found(NamedTuple):
    """A row, and where it is from."""

    row: Row
    file: Path
    date: str


class Rows(dict[Key, Found]):
    """All that count for a device here."""

    @functools.cached_property
    def faster(self) -> list[Key]:
        """Those for which there is another way than PyTorch's."""
        return [key for key, found in self.items() if found.row.candidate != PYTORCH]

    @functools.cached_property
    def faster_calls(self) -> list[Key]:
        """Those of `linear`'s calls, by which "auto" goes another way."""
        return [key for key in self.faster if key.product in ("output", "training")]

    @functools.cached_property
    def any_gradients(self) -> bool:
        """Whether one is for a gradient's product."""
        return len(self.faster) > len(self.faster_calls)


def folders() -> tuple[Path, ...]:
    """Where tables lie; a row of the second, the user's, counts before one of the first."""
    try:
        return SHIPPED, user_folder()
    except RuntimeError:  # nobody knows where the home folder is
        return (SHIPPED,)


def any_files() -> bool:
    """Whether there is a table for any device."""
    for folder in folders():
        with contextlib.suppress(OSError):
            if any(name.endswith(".json") for name in os.listdir(folder)):
                return True
    return False


# Whether there is a table at all, which every call asks first. Another rank may have one.
available: bool = any_files() or ranks.expected()
seen: bool = available  # whether there has ever been one: a forward may have gone by it
generation = 0  # counts the times that tables were read anew
given: dict[torch.device, tuple[Row, ...]] | None = None  # in the place of all tables
_settled: int | None = None  # the group whose ranks have agreed that there is none
_group: int | None = None  # whose ranks the tables that were read are those of


watchers: list[Callable[[], None]] = []  # called when other tables hold than before


def reload(rows: dict[torch.device, tuple[Row, ...]] | None = None) -> None:
    """Looks for tables again, or takes these rows for all that there is."""
    global available, seen, generation, given, _settled
    given = rows
    available = rows is not None or any_files() or ranks.expected()
    seen = seen or available
    _settled = None
    generation += 1
    for watcher in watchers:
        watcher()


def settled() -> bool:
    """Whether the ranks of this group have agreed that there is no table."""
    return _settled is not None and _settled == ranks.group()


def follow_group() -> None:
    """Reads tables anew where there has come to be another process group, or the first."""
    global _group
    if (now := ranks.group()) != _group:
        _group = now
        reload(given)


def row(device: torch.device, key: Key) -> Found | None:
    """The row for a product, if there is one; `key.m` is any number of rows.

    Of a training with other gradients than were measured, it is that with all of them.
    """
    follow_group()
    key, found = key._replace(m=table.bucket(key.m)), rows(device)
    if key not in found and key.product == "training":
        key = key._replace(wanted="input weight bias" if key.bias else "input weight")
    return found.get(key)


def rows(device: torch.device) -> Rows:
    """All rows for a device that count here, in the group that was last followed."""
    return _read(device, torch.get_num_threads() if device.type == "cpu" else 0, generation)


@functools.lru_cache
def _read(device: torch.device, threads: int, generation: int) -> Rows:
    global available, _settled
    if given is not None:
        return Rows({one.key: Found(one, Path(), "") for one in given.get(device, ())})
    found, name = Rows(), machine.device_name(device)
    if name is None:
        return found
    files = agreed(name, readable(name))
    for path, text in files:
        parsed = table.parse(text)
        for one in _usable(parsed, device):
            found[one.key] = Found(one, Path(path), parsed.date)
    # Where there are GPUs, it is theirs that settle it.
    last = device.type == "cuda" or not torch.cuda.device_count()
    if not files and not any_files() and ranks.in_group() and last:
        # No rank of this group has one: tables are asked for no more.
        available, _settled = False, ranks.group()
        for watcher in watchers:
            watcher()
    return found


def agreed(device: str, mine: Files) -> Files:
    """The tables for a device of this name that all ranks of the group go by; `mine` are my own."""
    if not ranks.has_others():
        return mine
    try:
        found = ranks.agreed(shared(device)[0], json.dumps(mine))
    except RuntimeError as error:  # not every kind of store can
        _warn(f"fastlinear cannot have all ranks go by one table: {error}; each goes by its own")
        return mine
    theirs: Files = [(path, text) for path, text in json.loads(found)]
    if [text for _, text in theirs] != [text for _, text in mine]:
        names, own = (", ".join(path for path, _ in one) or "none" for one in (theirs, mine))
        _warn(
            f"fastlinear goes by another rank's tables for {device}, {names}, and not by "
            f"this rank's, {own}, for all ranks to choose the same kernels"
        )
    return theirs


def shared(device: str) -> tuple[str, Callable[[], str]]:
    """Where the group's store has the tables for a device of this name, and what I would put there.

    That is read anew: it may have been measured since.
    """
    return f"fastlinear/tables/{device}", lambda: json.dumps(readable(device))


def readable(name: str) -> Files:
    """This process's own tables for a device."""
    files = []
    for folder in folders():
        path = folder / table.file_name(name)
        if not os.path.exists(path):  # nor in a folder that nobody may look into
            continue
        why = said = None
        try:
            parsed = table.read(path)
            if parsed.device != name:
                why = f"it is for {parsed.device!r}, and this is {name!r}"
        except (OSError, ValueError) as error:
            why = str(error)
        if why is not None:
            said = f"ignores the table {path}: {why}; fastlinear.tune writes another"
        else:
            files.append((str(path), table.as_text(parsed)))
            if (why := parsed.outdated(machine.software())) is not None:
                margin = f"{MARGIN_OF_OTHERS - 1:.0%}"
                said = f"goes by the table {path} only where it gains {margin}: {why}"
        # Those that are shipped are the user's to replace, not to repair.
        if said is not None and folder != SHIPPED:
            _warn(f"fastlinear {said}")
    return files


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _usable(parsed: Table, device: torch.device) -> list[Row]:
    """The rows by which a call can go here: PyTorch's way where the gain does not count."""
    margin = MARGIN if parsed.outdated(machine.software()) is None else MARGIN_OF_OTHERS
    target = target_of(device) if parsed.kernels == machine.software()["kernels"] else None
    rows = [
        row if row.wins(margin) else row.by_pytorch()
        for row in parsed.rows
        # Whether a library is there is asked when it is taken.
        if isinstance(row.candidate, str) or (target is not None and _is_legal(row, target))
    ]

    def layer(row: Row) -> tuple[object, ...]:
        return row.dtype, row.precision, row.n, row.k, row.m

    ours = {layer(row) for row in rows if row.candidate not in (PYTORCH, BY_ROWS)}
    return [
        row.by_pytorch() if row.candidate == BY_ROWS and layer(row) not in ours else row
        for row in rows
    ]


def _is_legal(row: Row, target: Target) -> bool:
    dtype = getattr(torch, row.dtype)
    sizes = row.n, row.k, row.m
    traits = traits_of(row.product, *sizes, dtype, row.precision, target, row.activation)
    return why_illegal_for(row.product, row.candidate, traits) is None


def files(device: torch.device) -> dict[Path, int]:
    """The tables in use for a device, with the rows that each gives."""
    return dict(collections.Counter(one.file for one in rows(device).values()))
