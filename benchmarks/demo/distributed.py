"""The demo on several processes, by PyTorch's own engines: they learn what one process does.

`torchrun --nproc-per-node=2 benchmarks/train.py --distributed ddp` trains fastlinear.Linear at one
batch size, on one machine: one process a GPU, or all on the CPU. Each epoch prints the loss and the
accuracy; at the end nn.Linear is trained in one process, and the exit status is 1 if the losses
part.

ddp: every process has the parameters, and takes its share of each batch.
fsdp: the same, and between uses a process keeps only its share of the parameters.
tp: every process takes the whole batch, and computes its share of the 128 hidden features.

With `--checkpoint FOLDER` a training that was stopped, or one of whose processes died (then
`torchrun --max-restarts` starts them anew), goes on from the last checkpoint.
"""

import os
import signal
import sys
from argparse import Namespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.demo import checkpoints
from benchmarks.demo.digits import LOSS_TOLERANCE, Digits, Row, Training, epoch_orders, loss_gap


def start(kind: str) -> torch.device:
    """Joins the other processes that torchrun started; returns this one's device."""
    if not dist.is_torchelastic_launched():
        sys.exit(
            f"--distributed {kind} needs the processes that torchrun starts, as in: "
            f"torchrun --nproc-per-node=2 benchmarks/train.py --distributed {kind}"
        )
    # Ctrl-C ends a process that waits for others only by the signal's own action: Python's would
    # come when they answer, or as the error that they are gone. The checkpoint can take it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    local_rank, processes = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
    # Processes started anew would find each other's last addresses in torchrun's store, and wait
    # there: https://github.com/pytorch/pytorch/issues/135712. The count is one machine's.
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    group: dict[str, Any] = {"store": store, "rank": rank, "world_size": world_size}
    if not torch.cuda.is_available():
        # torchrun leaves each process one thread, as it cannot know what else is running.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
        dist.init_process_group("gloo", **group)
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        sys.exit(f"process {local_rank} has no GPU: there are {gpus}, and each takes one")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, **group)
    return device


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def stop(sentence: str) -> NoReturn:
    """Ends all the processes; the first says why."""
    if dist.get_rank() == 0:
        print(sentence, file=sys.stderr, flush=True)
    dist.barrier()  # torchrun ends the others as soon as one has gone
    sys.exit(1)


# What holds a group of gloo, to the end of the process: to destroy one joins a thread of its own,
# which may be waiting for Python's lock, and that is held meanwhile. One run in some sixty hung so.
KEPT: list[Any] = []


def leave(status: int = 0) -> NoReturn:
    """Ends this process, whose work is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of Python's own end: it aborts if a thread of gloo then still holds a tensor, as
    # happens once in fifty times.
    os._exit(status)


class SharedTraining(Training):
    """`Training` by all the processes: the same steps, each with its share of the work."""

    def __init__(
        self, kind: str, layer: type[nn.Linear], digits: Digits, batch_size: int, seed: int
    ) -> None:
        super().__init__(layer, digits, batch_size, seed)
        self.kind = kind
        processes = dist.get_world_size()
        mesh = init_device_mesh(digits.images.device.type, (processes,))
        if kind == "ddp":
            self.network = DistributedDataParallel(self.network)
        elif kind == "fsdp":
            for part in self.network:
                fully_shard(part, mesh=mesh)
            fully_shard(self.network, mesh=mesh)
        else:
            features = self.network[0].out_features
            if features % processes:
                stop(
                    f"--distributed tp shares {features} features evenly: "
                    f"it takes a number of processes that divides them, not {processes}"
                )
            plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
            self.network = parallelize_module(self.network, mesh, plan)
        # fsdp and tp have put other parameters in the place of those that it had.
        self.optimizer = self.make_optimizer()

    def step(self, rows: Tensor) -> None:
        """ddp and fsdp take the mean of the processes' gradients, which here makes the batch's.

        Shares may differ by a row, or be empty: each gives its part of the sum.
        """
        share, weight = rows, 1
        if self.kind != "tp":
            processes = dist.get_world_size()
            share, weight = rows.tensor_split(processes)[dist.get_rank()], processes
        self.optimizer.zero_grad()
        output = self.network(self.digits.images[share])
        loss = F.cross_entropy(output, self.digits.labels[share], reduction="sum")
        (weight * loss / len(rows)).backward()
        self.optimizer.step()


def train(
    arguments: Namespace, layer: type[nn.Linear], digits: Digits, batch_size: int, epochs: int
) -> Row | None:
    """Trains, from the last checkpoint if there is one; the first process returns the losses.

    A checkpoint is written every so many steps, and after the last. In the end the first process
    trains nn.Linear, alone.
    """
    training = SharedTraining(arguments.distributed, layer, digits, batch_size, arguments.seed)
    row = {"distributed": arguments.distributed, "processes": dist.get_world_size()}
    row |= {"batch_size": batch_size, "losses": training.losses}
    row |= {"accuracies": training.accuracies}
    say(f"{row['processes']} processes share the work by {row['distributed']}")
    orders = epoch_orders(digits, epochs, arguments.seed)
    learn(training, orders, arguments)

    KEPT.append(training)
    first = dist.get_rank() == 0
    if digits.images.device.type == "cuda":
        dist.destroy_process_group()
    if not first:
        return None
    alone = Training(nn.Linear, digits, batch_size, arguments.seed)
    alone.evaluate()
    for order in orders:
        alone.epoch(order)
        alone.evaluate()
    return row | {"losses_alone": alone.losses}


def learn(training: SharedTraining, orders: list[Tensor], arguments: Namespace) -> None:
    batches = [order.split(training.batch_size) for order in orders]
    steps_per_epoch, steps = len(batches[0]), sum(map(len, batches))
    # What the curve depends on. How many processes share the work, and which way, may change.
    settings = {"batch_size": training.batch_size, "seed": arguments.seed}
    settings |= {"datapoints": len(training.digits.labels)}
    folder, done = arguments.checkpoint, 0
    if folder and (found := checkpoints.last(folder)):
        checkpoint, progress = found
        if progress.get("settings") != settings:
            stop(f"{checkpoint} is of another training: {progress.get('settings')}, not {settings}")
        done = progress["step"]
        if done > steps:
            stop(f"{checkpoint} has done {done} steps, more than the {steps} of --epochs")
        checkpoints.load(checkpoint, training.network, training.optimizer)
        training.losses += progress["losses"]
        training.accuracies += progress["accuracies"]
        say(f"resumed from {checkpoint}: {done} of {steps} steps are done")
    else:
        training.evaluate()

    say("epoch  loss      accuracy")
    for step in range(done, steps):
        epoch, batch = divmod(step, steps_per_epoch)
        training.step(batches[epoch][batch])
        if batch == steps_per_epoch - 1:
            training.evaluate()
            say(f"{epoch + 1:5}  {training.losses[-1]:.6f}  {training.accuracies[-1]:8.2%}")
        if folder and ((step + 1) % arguments.checkpoint_every == 0 or step + 1 == steps):
            progress = {"step": step + 1, "settings": settings}
            progress |= {"losses": training.losses, "accuracies": training.accuracies}
            checkpoints.save(folder, step + 1, training.network, training.optimizer, progress)


def conclude(row: Row) -> None:
    gap = loss_gap(row, {"losses": row["losses_alone"]})
    if not gap <= LOSS_TOLERANCE:
        sys.exit(f"one process with nn.Linear learns otherwise: losses differ by up to {gap:.1e}")
    print(
        "One process with nn.Linear learns the same: "
        f"losses differ by at most {1e6 * gap:.2g} millionths of the first."
    )
