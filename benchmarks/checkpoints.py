"""Checkpoints of a training on several processes: a folder keeps the last one, and keeps it whole.

Each process writes its shards, by torch.distributed.checkpoint, into a folder that all of them see.
What was saved by some number of processes, whichever way they shared the work, another number reads
in another way.
"""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from benchmarks.files import read_json, write_json

PROGRESS = "progress.json"  # how far the training is, beside the shards


def save(
    folder: Path, step: int, network: nn.Module, optimizer: Optimizer, progress: dict[str, Any]
) -> None:
    """Puts the state after `step` steps in the place of the checkpoint before.

    It has its name once all is written, and only then the one before goes: a process killed at any
    moment leaves the one or the other.
    """
    whole = folder / f"step-{step:08}"
    unfinished = whole.with_suffix(".part")
    dcp.save(_state(network, optimizer), checkpoint_id=unfinished)
    if dist.get_rank() == 0:  # it has heard from every other that its shards are written
        write_json(unfinished / PROGRESS, progress)
        unfinished.rename(whole)
        _keep_the_last(folder)


def last(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint in `folder`, if there is one, and how far its training was."""
    found: list[Any] = [None]
    if dist.get_rank() == 0 and (checkpoint := _keep_the_last(folder)):
        found[0] = checkpoint, read_json(checkpoint / PROGRESS)
    dist.broadcast_object_list(found)
    return found[0]


def load(checkpoint: Path, network: nn.Module, optimizer: Optimizer) -> None:
    state = _state(network, optimizer)
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        network,
        optimizer,
        model_state_dict=state["network"],
        optim_state_dict=state["optimizer"],
    )


def _state(network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Under the names that the parameters have in one process."""
    of_network, of_optimizer = get_state_dict(network, optimizer)
    return {"network": of_network, "optimizer": of_optimizer}


def _keep_the_last(folder: Path) -> Path | None:
    """Removes what was not finished, and what is older than the checkpoint that it returns."""
    whole = sorted(folder.glob("step-????????"))
    for path in folder.glob("step-*"):
        if path not in whole[-1:]:
            shutil.rmtree(path)
    return whole[-1] if whole else None
