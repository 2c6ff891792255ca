"""One rank of a process group measures, and the others wait for its table."""

import time
from collections.abc import Callable

import torch
import torch.distributed

from fastlinear import _torch_internals as internals
from fastlinear.choice import known, ranks

GRACE = 20.0  # seconds after its deadline in which the rank that measures should be done
_turn = 0  # how often this process has begun to tune: as often as all


def begin() -> None:
    """At the start of each tuning, on every rank, whatever becomes of it there."""
    global _turn
    _turn += 1


def measured(device: torch.device, deadline: float, measure: Callable[[], object]) -> None:
    """`measure()`, by one rank for each kind of device.

    The first to come is the one. Where it fails, is gone or is late, all go on by what they knew.
    """
    if not ranks.in_group() or torch.distributed.get_world_size() == 1:
        measure()
        return
    name, store = known.device_name(device) or str(device), internals.default_store()
    key, rank = f"fastlinear/tuning/{name}/{_turn}", str(torch.distributed.get_rank())
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
                ranks.publish(name, known.readable(name))
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
