"""One set of tables for all ranks of a process group.

Ranks that chose different kernels would round differently, and replicas of a parameter drift apart.
So all go by the tables of one of them: the first that asks for those of its kind of GPU puts them
into the group's store, where the others find them. No collective is called, and no rank waits for
another, but for the one that tunes.
"""

import json
import os
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed

from fastlinear import _torch_internals as internals

AVAILABLE: bool = torch.distributed.is_available()
Files = list[tuple[str, str]]  # paths of tables, with the text of each


def in_group() -> bool:
    """Whether there is a process group."""
    return AVAILABLE and torch.distributed.is_initialized()


def group() -> int | None:
    """What tells the default group from one before it or after; None where there is none."""
    return id(torch.distributed.group.WORLD) if in_group() else None


def expected() -> bool:
    """Whether this process is one of several, or will be, by what torchrun tells it."""
    if in_group():
        return torch.distributed.get_world_size() > 1
    return AVAILABLE and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def agreed(device: str, mine: Files) -> Files:
    """The tables for `device`, its name, that all ranks of the default group go by.

    Args:
        device: by which tables know it.
        mine: this rank's own.
    """
    if not in_group() or torch.distributed.get_world_size() == 1:
        return mine
    text = json.dumps(mine)
    try:
        # Sets what nobody has set yet, and returns what is there.
        found = internals.default_store().compare_set(_key(device), "", text)
    except RuntimeError as error:  # not every kind of store can
        warnings.warn(
            f"fastlinear cannot have all ranks go by one table: {error}; each goes by its own",
            RuntimeWarning,
            stacklevel=2,
        )
        return mine
    theirs: Files = [(path, table) for path, table in json.loads(found)]
    if [table for _, table in theirs] != [table for _, table in mine]:
        warnings.warn(
            f"fastlinear goes by another rank's tables for {device}, {_names(theirs)}, and not by "
            f"this rank's, {_names(mine)}, for all ranks to choose the same kernels",
            RuntimeWarning,
            stacklevel=2,
        )
    return theirs


GRACE = 20.0  # seconds after its deadline in which the rank that measures should be done
_turn = 0  # how often this process has begun to tune: as often as all


def begin() -> None:
    """At the start of each tuning, on every rank, whatever becomes of it there."""
    global _turn
    _turn += 1


def measured(
    device: str, deadline: float, measure: Callable[[], object], mine: Callable[[], Files]
) -> None:
    """`measure()`, by one rank for each kind of device, the first to come.

    Where it fails, is gone or is late, all go on by what they knew.

    Args:
        device: its name.
        deadline: by time.monotonic(), when it should be over.
        mine: this rank's tables for it, after measuring.
    """
    if not in_group() or torch.distributed.get_world_size() == 1:
        measure()
        return
    store, rank = internals.default_store(), str(torch.distributed.get_rank())
    key = f"fastlinear/tuning/{device}/{_turn}"
    try:
        first = store.compare_set(f"{key}/rank", "", rank).decode() == rank
    except RuntimeError:  # not every kind of store can
        measure()
        return
    if first:
        try:
            measure()
        finally:  # an error too must not leave the others waiting
            if store.compare_set(f"{key}/end", "", "published") == b"published":
                store.set(_key(device), json.dumps(mine()))
            store.set(f"{key}/done", "")
        return
    try:
        while not store.check([f"{key}/done"]):
            late = time.monotonic() > deadline + GRACE
            # Either all go by the new table, or none does.
            if late and store.compare_set(f"{key}/end", "", "given up") == b"given up":
                return
            time.sleep(0.1)
    except RuntimeError:  # the store went with the rank that had it
        pass


def _key(device: str) -> str:
    return f"fastlinear/tables/{device}"


def _names(files: Files) -> str:
    return ", ".join(path for path, _ in files) or "none"
