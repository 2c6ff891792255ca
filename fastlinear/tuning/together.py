"""One rank of a process group measures, and the others wait for its table."""

import time
from collections.abc import Callable

import torch
import torch.distributed

from fastlinear import _torch_internals as internals
from fastlinear.choice import known, ranks

GRACE = 20.0  # seconds after its deadline in which the rank that measures should be done
_rounds: dict[str, int] = {}  # how often this process has come here, by device: as often as all


def measured(device: torch.device, deadline: float, measure: Callable[[], bool]) -> bool:
    """`measure()`, by one rank for each kind of device; whether it measured all there was.

    The first to come is the one. Where it fails, or is gone, the others go on by what they know.
    """
    if not ranks.in_group() or torch.distributed.get_world_size() == 1:
        return measure()
    name, store = known.device_name(device) or str(device), internals.default_store()
    _rounds[name] = _rounds.get(name, 0) + 1
    turn = f"fastlinear/tuning/{name}/{_rounds[name]}"
    rank = str(torch.distributed.get_rank())
    if store.compare_set(f"{turn}/rank", "", rank).decode() == rank:
        finished = False
        try:
            finished = measure()
        finally:  # an error too must not leave the others waiting
            ranks.publish(name, known.readable(name))
            store.set(f"{turn}/done", str(int(finished)))
        return finished
    try:
        while time.monotonic() < deadline + GRACE:
            if store.check([f"{turn}/done"]):
                return store.get(f"{turn}/done") == b"1"
            time.sleep(0.1)
    except RuntimeError:  # the store went with the rank that had it
        pass
    return False
