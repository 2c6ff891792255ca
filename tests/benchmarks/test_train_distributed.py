"""The demo on several processes learns what one process does, whoever is killed meanwhile."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.demo import checkpoints, distributed
from benchmarks.demo.digits import Training, epoch_orders, read_digits

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/train.py"
PATIENCE = 120  # seconds; a run takes 5 on two cores that do nothing else

# How far two orders of adding up a batch may part the losses, as a share of the first. That is 1e-7
# in the median of 480 trainings with seeds at random, and 6e-5 at most: rounding may decide a ReLU.
# Here the seed is the demo's own. Means of uneven shares, for sums, part them by 2e-4 and more.
ROUNDING = 1e-4


@dataclass
class Run:
    """torchrun with two processes, all of which carry `token` in their environment."""

    torchrun: subprocess.Popen[str]
    token: str

    def pids(self, rank: int | None = None) -> list[int]:
        """The processes of this run, torchrun's own and all that it started; or one rank's."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                variables = (process / "environ").read_bytes().split(b"\0")
                if f"TEST_RUN={self.token}".encode() in variables and (
                    rank is None or f"RANK={rank}".encode() in variables
                ):
                    found.append(int(process.name))
        return found

    def kill(self) -> None:
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.torchrun.poll()
            time.sleep(0.01)

    def output(self) -> str:
        """Once it has ended: what all have printed. One that does not end says where it is."""
        try:
            return self.torchrun.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)  # on which faulthandler prints every stack
            pytest.fail(f"no end within {PATIENCE} s: {self.torchrun.communicate()[0]}")


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """Starts a run; none of its processes outlives the test."""
    runs = []

    def start(*arguments: object) -> Run:
        token = uuid.uuid4().hex
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        process = subprocess.Popen(
            [sys.executable, *torchrun, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ
            | {"TEST_RUN": token, "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"},
        )
        runs.append(Run(process, token))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.torchrun.communicate()


def assert_as_one_process(file: Path, batch_size: int, epochs: int) -> None:
    """The losses in `file` are those of nn.Linear in one process."""
    digits = read_digits(None, 0, torch.device("cpu"))
    alone = Training(nn.Linear, digits, batch_size, 0)
    alone.evaluate()
    for order in epoch_orders(digits, epochs, 0):
        alone.epoch(order)
        alone.evaluate()
    (row,) = json.loads(file.read_text())["rows"]
    assert row["processes"] == 2
    torch.testing.assert_close(row["losses"], alone.losses, rtol=0, atol=ROUNDING * alone.losses[0])


def wait_for_checkpoint(folder: Path, run: Run) -> str:
    end = time.monotonic() + PATIENCE
    while run.torchrun.poll() is None and time.monotonic() < end:
        whole = [name for name in os.listdir(folder) if re.fullmatch(r"step-\d+", name)]
        if whole:
            return max(whole)
        time.sleep(0.002)
    run.kill()
    pytest.fail(run.output())


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_several_processes_learn_what_one_does(
    kind: str, start: Callable[..., Run], tmp_path: Path
) -> None:
    """The digits are three batches of 479 and one digit: shares differ by a row, or are empty."""
    settings = "--batch-sizes", 479, "--epochs", 6, "--out", tmp_path
    target = ("-m", "benchmarks.train") if kind == "tp" else (SCRIPT,)  # both ways to name it
    run = start(*target, "--distributed", kind, *settings)
    output = run.output()
    assert run.torchrun.returncode == 0, output
    assert output.count("epoch  loss") == 1  # one process prints
    assert_as_one_process(tmp_path / f"train-{kind}.json", 479, 6)
    assert not run.pids()


# 44 steps an epoch, and no checkpoint at the end of one but the last.
LONGER = "--batch-sizes", 33, "--epochs", 8, "--checkpoint-every", 9


def test_killed_process_costs_the_steps_since_the_checkpoint(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    settings = *LONGER, "--out", tmp_path, "--checkpoint", tmp_path
    run = start("--max-restarts=1", SCRIPT, "--distributed", "fsdp", *settings)
    seen = wait_for_checkpoint(tmp_path, run)
    (victim,) = run.pids(rank=1)
    os.kill(victim, signal.SIGKILL)
    output = run.output()
    assert run.torchrun.returncode == 0, output
    resumed = re.findall(r"resumed from \S+(step-\d+): \d+ of 352 steps are done", output)
    assert len(resumed) == 1, output
    assert seen <= resumed[0] < "step-00000352"
    assert_as_one_process(tmp_path / "train-fsdp.json", 33, 8)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000352"]


def test_stopped_run_goes_on_in_another_way(start: Callable[..., Run], tmp_path: Path) -> None:
    """Ctrl-C ends every process without a word, and leaves a checkpoint for the same command."""
    settings = *LONGER, "--out", tmp_path, "--checkpoint", tmp_path
    run = start(SCRIPT, "--distributed", "ddp", *settings)
    seen = wait_for_checkpoint(tmp_path, run)
    os.killpg(run.torchrun.pid, signal.SIGINT)
    output = run.output()
    assert run.torchrun.returncode != 0
    assert "[rank" not in output
    assert not run.pids()
    assert not (tmp_path / "train-ddp.json").exists()

    run = start(SCRIPT, "--distributed", "tp", *settings)
    output = run.output()
    assert run.torchrun.returncode == 0, output
    assert (resumed := re.search(r"resumed from \S+(step-\d+)", output)), output
    assert seen <= resumed[1] < "step-00000352"
    assert_as_one_process(tmp_path / "train-tp.json", 33, 8)


def test_without_torchrun_the_command_is_named() -> None:
    command = [sys.executable, SCRIPT, "--distributed", "ddp"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 1
    assert result.stderr == (
        "--distributed ddp needs the processes that torchrun starts, as in: "
        "torchrun --nproc-per-node=2 benchmarks/train.py --distributed ddp\n"
    )


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_unfinished_checkpoint_is_not_taken(one_process: None, tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    assert checkpoints.last(tmp_path / "not there") is None
    others = ["step-00000099", "step-2000", "step-by-step", "step-notes.txt"]
    for name in others[:3]:
        (tmp_path / name).mkdir()
    (tmp_path / others[3]).touch()
    checkpoints.save(tmp_path, 8, layer, optimizer, {"step": 8})
    (tmp_path / "step-00000009.part").mkdir()
    (tmp_path / "step-00000009.part" / "half").touch()
    assert checkpoints.last(tmp_path) == (tmp_path / "step-00000008", {"step": 8})
    (tmp_path / "step-00000010.part").mkdir()
    checkpoints.save(tmp_path, 9, layer, optimizer, {"step": 9})
    assert checkpoints.last(tmp_path) == (tmp_path / "step-00000009", {"step": 9})
    assert not (tmp_path / "step-00000009" / "half").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", *others]

    expected = layer.weight.detach().clone()
    nn.init.zeros_(layer.weight)
    checkpoints.load(tmp_path / "step-00000009", layer, optimizer)
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("progress", "why"),
    [
        ({}, "is of another training: None, not {'batch_size': 64, 'seed': 0, 'datapoints': 80}"),
        (
            {"step": 3, "settings": {"batch_size": 64, "seed": 0, "datapoints": 80}},
            "has done 3 steps, more than the 2 of --epochs",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(
    progress: dict[str, Any],
    why: str,
    one_process: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = tmp_path / "step-00000003"
    checkpoint.mkdir()
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    digits = read_digits(100, 0, torch.device("cpu"))
    training = distributed.SharedTraining("ddp", nn.Linear, digits, 64, 0)
    arguments = Namespace(checkpoint=tmp_path, seed=0)
    with pytest.raises(SystemExit):
        distributed.learn(training, epoch_orders(digits, 1, 0), arguments)
    assert capsys.readouterr().err == f"{checkpoint} {why}\n"
