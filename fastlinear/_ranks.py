"""The ranks of a process group, and what they settle through its store.

No collective is called: ranks need not come to the same place, nor at the same time.
"""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

from fastlinear import _torch_internals as internals

AVAILABLE: bool = torch.distributed.is_available()
GRACE = 20.0  # seconds after a deadline in which the rank that works should be done


def in_group() -> bool:
    """Whether there is a process group."""
    return AVAILABLE and torch.distributed.is_initialized()


def group() -> int | None:
    """What tells the default group from one before it or after; None where there is none."""
    return id(torch.distributed.group.WORLD) if in_group() else None


def has_others() -> bool:
    """Whether there are other ranks in the default group."""
    return in_group() and torch.distributed.get_world_size() > 1


def expected() -> bool:
    """Whether this process is one of several, or will be, by what torchrun tells it."""
    if in_group():
        return has_others()
    return AVAILABLE and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def agreed(key: str, mine: str) -> str:
    """What the first rank that asked has put under a key; `mine` is what this one would.

    Raises:
        RuntimeError: it is a kind of store that cannot.
    """
    found: bytes = internals.default_store().compare_set(key, "", mine)
    return found.decode()


def by_one(
    key: str, deadline: float, work: Callable[[], object], result: tuple[str, Callable[[], str]]
) -> None:
    """`work()`, by one rank, the first to come; others wait.

    Where it fails, is gone or is late, by `deadline`, all go on as they were.

    Args:
        key: the work's, which no other has.
        deadline: by time.monotonic().
        work: what one rank is to do.
        result: a key of the store, and what is put there once that is done.
    """
    store: Any = None
    if has_others():
        store, rank = internals.default_store(), str(torch.distributed.get_rank())
        try:
            first = store.compare_set(f"{key}/rank", "", rank).decode() == rank
        except RuntimeError:  # not every kind of store can
            store = None
    if store is None:
        work()
    elif first:
        try:
            work()
        finally:  # an error too must not leave the others waiting
            if store.compare_set(f"{key}/end", "", "published") == b"published":
                place, text = result
                store.set(place, text())
            store.set(f"{key}/done", "")
    else:
        with contextlib.suppress(RuntimeError):  # the store went with the rank that had it
            while not store.check([f"{key}/done"]):
                late = time.monotonic() > deadline + GRACE
                # Either all go by the result, or none does.
                if late and store.compare_set(f"{key}/end", "", "given up") == b"given up":
                    return
                time.sleep(0.1)
