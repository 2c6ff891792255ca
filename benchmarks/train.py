"""Handwritten digits, learnt with fastlinear.Linear and with nn.Linear, a datapoint a step to all.

`python -m benchmarks.train` trains Linear(64, 128) -> ReLU -> Linear(128, 10) by plain gradient
descent on scikit-learn's 1,797 digits, with both layers from the same seed and in the same order;
fastlinear.Linear applies the ReLU itself. Per batch size it prints the loss, the accuracy, the time
and the memory of a step; the exit status is 1 if the layers disagree. Then it trains an ensemble of
16 such networks, one after another and, with BatchedLinear, at once. It runs on the GPU if there is
one. `--backend triton` without a GPU runs the kernels in Triton's interpreter, on a few of the
digits. `--compare-step` instead times single steps of the two layers in turn. With `--distributed`,
torchrun's processes train fastlinear.Linear together: benchmarks/demo/distributed.py.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

if not __package__:  # run by its path, as torchrun does: its siblings are found from the root
    sys.path[0] = str(Path(__file__).parent.parent)

import fastlinear
from benchmarks.demo.digits import Digits, read_digits
from benchmarks.demo.ensemble import conclude_ensemble, train_ensemble
from benchmarks.demo.picture import caption, draw
from benchmarks.demo.side_by_side import FAST, NATIVE, conclude, disagreement, train
from benchmarks.demo.steps import compare_steps
from benchmarks.shared.environment import environment
from benchmarks.shared.files import write_json

NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
WHOLE = sys.maxsize  # the batch size that stands for the whole set
LAYERS = {FAST: fastlinear.Linear, NATIVE: nn.Linear}


@dataclass(frozen=True)
class Plan:
    """What the arguments come to on this machine.

    interpreted: whether the kernels run in Triton's interpreter.
    results: the file of results, without its ending.
    """

    digits: Digits
    batch_sizes: list[int]
    epochs: int
    interpreted: bool
    results: Path


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"takes 1 or more, got {number}")
    return number


def positive_or_all(text: str) -> int:
    return WHOLE if text == "all" else positive(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backend", choices=["auto", "triton", "torch"], default="auto")
    add("--epochs", type=positive, help="default: 20, or 5 with --quick or in the interpreter")
    add("--batch-sizes", type=positive_or_all, nargs="+", metavar="N", help="numbers, or all")
    add("--seed", type=int, default=0, help="of the parameters and the order of the digits")
    add("--quick", action="store_true", help="few epochs, no small batches")
    add("--compare-step", action="store_true", help="time single steps of the layers in turn")
    add("--out", type=Path, help="folder of the results; default: benchmarks/results/DEVICE")
    add = parser.add_argument_group("several processes, started by torchrun").add_argument
    add("--distributed", choices=["ddp", "fsdp", "tp"], help="how they share the work")
    add("--checkpoint", type=Path, metavar="FOLDER", help="keep the last state here; go on from it")
    add("--checkpoint-every", type=positive, default=100, metavar="STEPS", help="default: 100")
    arguments = parser.parse_args()
    if arguments.distributed and arguments.compare_step:
        parser.error("--compare-step is of one process: leave out --distributed")
    if arguments.distributed and len(arguments.batch_sizes or [1]) > 1:
        parser.error("--distributed takes one batch size")
    if arguments.checkpoint and arguments.checkpoint.exists() and not arguments.checkpoint.is_dir():
        parser.error(f"--checkpoint takes a folder, but {arguments.checkpoint} is a file")
    if arguments.checkpoint and not arguments.distributed:
        parser.error("--checkpoint is of several processes: it takes --distributed")
    return arguments


def plan_of(arguments: argparse.Namespace, interpreted: bool, device: torch.device) -> Plan:
    digits = read_digits(128 if interpreted else None, arguments.seed, device)
    small = interpreted or arguments.quick
    chosen = arguments.batch_sizes or ([16, 64, WHOLE] if small else [1, 4, 16, 64, 256, WHOLE])
    if arguments.distributed and not arguments.batch_sizes:
        chosen = [64]
    batch_sizes = sorted({min(batch_size, len(digits.labels)) for batch_size in chosen})

    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    folder = arguments.out or Path(__file__).parent / "results" / slug
    name = f"train-{arguments.distributed or 'steps' * arguments.compare_step}".rstrip("-")
    name += "-interpreted" * interpreted + "-quick" * arguments.quick
    epochs = arguments.epochs or (5 if small else 20)
    return Plan(digits, batch_sizes, epochs, interpreted, folder / name)


def what_it_is(arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What a file of results says before them."""
    return {
        "environment": environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": arguments.backend,
        "interpreted": plan.interpreted,
        "dtype": "float32",
        "seed": arguments.seed,
        "datapoints": len(plan.digits.labels),
        "datapoints_tested": len(plan.digits.test_labels),
        "rows": [],
    }


def train_shared(arguments: argparse.Namespace, interpreted: bool) -> NoReturn:
    """This process's part of a training that torchrun's processes share."""
    from benchmarks.demo import distributed  # takes a second

    plan = plan_of(arguments, interpreted, distributed.start(arguments.distributed))
    (batch_size,) = plan.batch_sizes
    with fastlinear.use_backend(arguments.backend):
        try:
            row = distributed.train(
                arguments, fastlinear.Linear, plan.digits, batch_size, plan.epochs
            )
        except SystemExit:  # why has been said
            distributed.leave(1)
    if row:
        plan.results.parent.mkdir(parents=True, exist_ok=True)
        results = what_it_is(arguments, plan) | {"rows": [row]}
        write_json(plan.results.with_suffix(".json"), results)
        distributed.conclude(row)
    distributed.leave()


def train_alone(arguments: argparse.Namespace, plan: Plan) -> None:
    """Trains both layers, or times their steps; what there is by the end, or Ctrl-C, is kept."""
    results = what_it_is(arguments, plan)
    size, tested = len(plan.digits.labels), len(plan.digits.test_labels)
    print(f"{size} digits to learn from, {tested} to test on; {caption(results)}")
    if plan.interpreted:
        print(
            "A slice of the digits, as the interpreter is slow; its times say nothing of a GPU's."
        )
    rows = results["rows"]
    given = LAYERS, plan.digits, plan.batch_sizes
    try:
        with fastlinear.use_backend(arguments.backend):
            if arguments.compare_step:
                compare_steps(*given, arguments.seed, rows)
            else:
                train(*given, plan.epochs, arguments.seed, rows)
                if sentence := disagreement(rows, tested):
                    sys.exit(sentence)
                conclude(rows, size, plan.interpreted)
                layers = fastlinear.Linear, fastlinear.BatchedLinear
                epochs = 1 if plan.interpreted else plan.epochs
                row = train_ensemble(*layers, plan.digits, epochs, arguments.seed)
                results["ensemble"] = row
                conclude_ensemble(row, plan.interpreted)
    except KeyboardInterrupt:
        print(f"stopped: what was measured is kept in {plan.results.parent}", file=sys.stderr)
        sys.exit(130)  # what a shell gives a program ended by Ctrl-C
    finally:
        plan.results.parent.mkdir(parents=True, exist_ok=True)
        plan.results.with_suffix(".json").write_text(json.dumps(results, indent=1))
        if any(row.get("epoch_seconds") for row in rows):
            draw(results, plan.results.with_suffix(".png"))


def main() -> None:
    arguments = parse()
    missing = [package for module, package in NEEDS.items() if find_spec(module) is None]
    if missing:
        sys.exit(f"benchmarks.train needs {', '.join(missing)}: pip install {' '.join(missing)}")
    gpu = torch.cuda.is_available()
    interpreted = arguments.backend == "triton" and not gpu
    if interpreted and arguments.compare_step:
        sys.exit("--compare-step needs a GPU for the kernels: interpreted, their time says nothing")
    if interpreted:
        # Triton reads it when first imported, by the kernels or by torch for an optimizer.
        os.environ["TRITON_INTERPRET"] = "1"
    if arguments.distributed:
        train_shared(arguments, interpreted)
    train_alone(arguments, plan_of(arguments, interpreted, torch.device("cuda" if gpu else "cpu")))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped before anything was measured")
