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

from benchmarks.shared.files import read_json, write_json

PROGRESS = "progress.json"  # how far the training is, beside the shards


def save(
    folder: Path, step: int, network: nn.Module, optimizer: Optimizer, progress: dict[str, Any]
) -> None:
    """Puts the state after `step` steps in the place of the checkpoint before.

    It has its name once all is written, and only then the one before goes: a process killed at any
    moment leaves the one or the other. What else lies in the folder stays.
    """
    whole = folder / f"step-{step:08}"
    unfinished = whole.with_suffix(".part")
    if dist.get_rank() == 0 and unfinished.exists():  # of a process that was killed
        shutil.rmtree(unfinished)
    dist.barrier()
    dcp.save(_state(network, optimizer), checkpoint_id=unfinished)
    if dist.get_rank() == 0:  # it has heard from every other that its shards are written
        write_json(unfinished / PROGRESS, progress)
        unfinished.rename(whole)
        _keep_the_last(folder)


def last(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint in `folder`, if there is one, and how far its training was."""
    found: list[Any] = [None]
    if dist.get_rank() == 0 and (whole := _whole(folder)):
        found[0] = whole[-1], read_json(whole[-1] / PROGRESS)
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


def _whole(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the last one last; what others keep there is none."""
    return sorted(progress.parent for progress in folder.glob(f"step-{8 * '[0-9]'}/{PROGRESS}"))


def _keep_the_last(folder: Path) -> None:
    """Removes older checkpoints, and those that were not finished."""
    unfinished = (path for path in folder.glob(f"step-{8 * '[0-9]'}.part") if path.is_dir())
    for path in (*_whole(folder)[:-1], *unfinished):
        shutil.rmtree(path)
