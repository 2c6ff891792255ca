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
import math
import os
import re
import statistics
import sys
import time
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # run by its path, as torchrun does: its siblings are found from the root
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.demo.digits import (
    DIGITS_TOLERANCE,
    LOSS_TOLERANCE,
    Digits,
    Row,
    Training,
    epoch_orders,
    learning_rate,
    loss_gap,
    network,
    now,
    read_digits,
)
from benchmarks.shared.environment import environment
from benchmarks.shared.files import write_json

NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
FAST, NATIVE = "fastlinear.Linear", "nn.Linear"
WHOLE = sys.maxsize  # the batch size that stands for the whole set
SECONDS_PER_COMPARISON = 3.0

# Networks in the ensemble, and its batches.
MEMBERS, ENSEMBLE_BATCH = 16, 64
# How far their outputs may part, trained at once or not, as a share of the largest.
ENSEMBLE_TOLERANCE = 1e-2

Layers = dict[str, type[nn.Linear]]

HEADER = (
    "batch  layer              final loss  accuracy"
    "     ms/epoch      us/step  us/datapoint    KiB/step"
)


def train(
    layers: Layers, digits: Digits, batch_sizes: list[int], epochs: int, seed: int, rows: list[Row]
) -> None:
    """Trains both layers at every batch size; adds a row for each to `rows`, prints it when done.

    The layers take turns by the epoch, the first one changing, so that a slow moment of the
    machine strikes both.
    """
    from tqdm import tqdm

    size = len(digits.labels)
    orders = epoch_orders(digits, epochs, seed)
    steps = len(layers) * epochs * sum(math.ceil(size / batch_size) for batch_size in batch_sizes)
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=steps, unit="step", leave=False, disable=None) as bar:
        bar.write(HEADER)
        for batch_size in batch_sizes:
            bar.set_description(f"batch {batch_size}")
            pair = []
            for name, layer in layers.items():
                rehearsal = Training(layer, digits, batch_size, seed)
                rehearsal.warm_up()
                training = Training(layer, digits, batch_size, seed)
                training.evaluate()
                pair.append(training)
                row = {"batch_size": batch_size, "layer": name}
                row |= {"learning_rate": learning_rate(batch_size)}
                row |= {"step_memory_bytes": rehearsal.step_memory()}
                row |= {"losses": training.losses, "accuracies": training.accuracies}
                row |= {"epoch_seconds": training.epoch_seconds}
                rows.append(row)
            for order in orders:
                for training in pair:
                    training.epoch(order)
                    training.evaluate()
                    bar.update(math.ceil(size / batch_size))
                pair.reverse()
            for row in rows[-len(layers) :]:
                bar.write(table_line(row, size))


def table_line(row: Row, size: int) -> str:
    return (
        f"{row['batch_size']:5}  {row['layer']:17}  {row['losses'][-1]:10.6f}"
        f"  {row['accuracies'][-1]:8.2%}  {1e3 * epoch_seconds(row):11.2f}"
        f"  {1e6 * step_seconds(row, size):11.1f}  {1e6 * epoch_seconds(row) / size:12.2f}"
        f"  {row['step_memory_bytes'] / 1024:10.1f}"
    )


def epoch_seconds(row: Row) -> float:
    return statistics.median(row["epoch_seconds"])


def step_seconds(row: Row, size: int) -> float:
    return epoch_seconds(row) / math.ceil(size / row["batch_size"])


def of_layer(rows: list[Row], layer: str) -> list[Row]:
    return [row for row in rows if row["layer"] == layer]


def disagreement(rows: list[Row], tested: int) -> str | None:
    """A sentence on the first batch size with which the layers learn differently, if any."""
    for row, native in zip(of_layer(rows, FAST), of_layer(rows, NATIVE), strict=True):
        gap = loss_gap(row, native)
        digits = round(tested * abs(row["accuracies"][-1] - native["accuracies"][-1]))
        if math.isnan(gap) or gap > LOSS_TOLERANCE or digits > DIGITS_TOLERANCE:
            return (
                f"the layers disagree with batches of {row['batch_size']}: losses by up to "
                f"{gap:.1e} of the first, and {digits} of {tested} digits tested"
            )
    return None


def conclude(rows: list[Row], size: int, interpreted: bool) -> None:
    """Prints how well the layers agree, and what a batch costs or, interpreted, what was learnt."""
    fast, native = of_layer(rows, FAST), of_layer(rows, NATIVE)
    gap = max(map(loss_gap, fast, native))
    print(f"The layers agree: losses differ by at most {1e6 * gap:.2g} millionths of the first.")
    first, *others = fast
    if interpreted:
        before, *_, after = first["losses"]
        print(f"The kernels learn, {first['batch_size']} a step: loss {before:.2f} to {after:.2f}.")
        return
    for row in others:
        seconds = step_seconds(row, size) / step_seconds(first, size)
        memory = row["step_memory_bytes"] / first["step_memory_bytes"]
        print(
            f"A step on {row['batch_size']} costs {seconds:.2f} times the time and {memory:.2f} "
            f"times the memory of a step on {first['batch_size']}."
        )


def compare_steps(
    layers: Layers, digits: Digits, batch_sizes: list[int], seed: int, rows: list[Row]
) -> None:
    """Prints the median over pairs of steps of a layer's time over nn.Linear's; adds rows of it.

    nn.Linear is compared with itself too: how far that is from 1 is the noise of the machine.
    """
    print("Time of a training step over that of nn.Linear: median of pairs [quartiles]")
    print("batch  layer                    ratio                pairs  us/step of nn.Linear")
    for batch_size in batch_sizes:
        for name, layer in layers.items():
            pairs = step_pairs(layer, layers[NATIVE], digits, batch_size, seed)
            quartiles = statistics.quantiles([mine / native for mine, native in pairs], n=4)
            native_seconds = statistics.median(native for _, native in pairs)
            row = {"batch_size": batch_size, "layer": name, "ratio_quartiles": quartiles}
            row |= {"pairs": len(pairs), "native_step_seconds": native_seconds}
            rows.append(row)
            low, median, high = quartiles
            print(
                f"{batch_size:5}  {name:17}  {median:6.3f} [{low:.3f}, {high:.3f}]"
                f"  {len(pairs):7}  {1e6 * native_seconds:20.1f}",
                flush=True,
            )


def step_pairs(
    layer: type[nn.Linear], native: type[nn.Linear], digits: Digits, batch_size: int, seed: int
) -> list[tuple[float, float]]:
    """Seconds of a step of each layer on the same batch, the first one changing, pair by pair."""
    pair = [Training(kind, digits, batch_size, seed) for kind in (layer, native)]
    for training in pair:
        training.warm_up()
    size, device = len(digits.labels), digits.labels.device
    shuffler = torch.Generator().manual_seed(seed)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS_PER_COMPARISON
    while time.perf_counter() < end:
        order = torch.randperm(size, generator=shuffler).to(device)
        # Whole batches only: a short last one would be a step of another size.
        for rows in order[: size // batch_size * batch_size].split(batch_size):
            spent = [0.0, 0.0]
            for turn in (0, 1) if len(times) % 2 else (1, 0):
                start = now(device)
                pair[turn].step(rows)
                spent[turn] = now(device) - start
            times.append((spent[0], spent[1]))
    return times


def train_ensemble(layer: Any, batched: Any, digits: Digits, epochs: int, seed: int) -> Row:
    """Trains MEMBERS networks from their own seeds, one after another and all at once, in turn.

    Each batch goes to every member. At once, it is expanded, not copied, and the loss is the sum of
    the members', so that each gets its own gradient.
    """
    members = []
    for member in range(MEMBERS):
        torch.manual_seed(seed + member)
        members.append(network(layer).to(digits.images.device))
    ensemble = nn.Sequential(*map(batched.from_linears, zip(*members, strict=True)))
    labels = digits.labels.repeat(MEMBERS, 1)
    rate = learning_rate(ENSEMBLE_BATCH)
    optimizers = [torch.optim.SGD(member.parameters(), lr=rate) for member in members]
    together = torch.optim.SGD(ensemble.parameters(), lr=rate)

    def step_each(rows: Tensor) -> None:
        for member, optimizer in zip(members, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(member(digits.images[rows]), digits.labels[rows]).backward()
            optimizer.step()

    def step_all(rows: Tensor) -> None:
        together.zero_grad()
        output = ensemble(digits.images[rows].expand(MEMBERS, -1, -1))
        loss = F.cross_entropy(output.flatten(0, 1), labels[:, rows].flatten())
        (MEMBERS * loss).backward()
        together.step()

    seconds: dict[Any, list[float]] = {step_each: [], step_all: []}
    for order in epoch_orders(digits, epochs, seed):
        for rows in order.split(ENSEMBLE_BATCH):
            for step, spent in seconds.items():
                start = now(rows.device)
                step(rows)
                spent.append(now(rows.device) - start)
    with torch.no_grad():
        apart = torch.stack([member(digits.images) for member in members])
        gap = (ensemble(digits.images.expand(MEMBERS, -1, -1)) - apart).abs().max()
    return {
        "members": MEMBERS,
        "batch_size": ENSEMBLE_BATCH,
        "step_seconds_one_after_another": statistics.median(seconds[step_each]),
        "step_seconds_at_once": statistics.median(seconds[step_all]),
        "largest_gap_of_outputs": gap.item() / apart.abs().max().item(),
    }


def ensemble_line(row: Row) -> str:
    apart, together = row["step_seconds_one_after_another"], row["step_seconds_at_once"]
    return (
        f"A step of {row['members']} networks on {row['batch_size']} takes {1e3 * apart:.2f} ms "
        f"one after another and {1e3 * together:.2f} ms at once, {apart / together:.1f} times less."
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss by epoch, time per datapoint and memory per step by batch size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    rows = [row for row in results["rows"] if row["epoch_seconds"]]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, times, memory = figure.subplots(1, 3)

    # Viridis is told apart by all eyes, and in grey.
    fast = of_layer(rows, FAST)
    for index, row in enumerate(fast):
        shade = colormaps["viridis"](0.3 + 0.65 * index / len(fast))
        curves.plot(row["losses"], color=shade, linewidth=4, label="" if index else FAST)
        end = (len(row["losses"]) - 1, row["losses"][-1])
        offset = {"xytext": (5, -3), "textcoords": "offset points"}
        curves.annotate(str(row["batch_size"]), end, **offset, fontsize=8)
    for index, row in enumerate(of_layer(rows, NATIVE)):
        curves.plot(row["losses"], "k:", linewidth=1, label="" if index else NATIVE)
    curves.set(title="Loss, by batch size", xlabel="epoch")
    curves.margins(x=0.22)
    curves.legend(fontsize=8, loc="lower left")

    # Blue and vermilion of Okabe and Ito, and a marker and a line of its own for each.
    looks = {"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "x", "ls": "--"}
    for layer, look in zip((FAST, NATIVE), looks, strict=True):
        mine = of_layer(rows, layer)
        batch_sizes = [row["batch_size"] for row in mine]
        microseconds = [1e6 * epoch_seconds(row) / results["datapoints"] for row in mine]
        kibibytes = [row["step_memory_bytes"] / 1024 for row in mine]
        times.plot(batch_sizes, microseconds, label=layer, **look)
        memory.plot(batch_sizes, kibibytes, label=layer, **look)
    times.set(title="Time per datapoint (µs)")
    memory.set(title="Memory per step (KiB)")
    ticks = sorted({row["batch_size"] for row in rows})
    for panel in (times, memory):
        panel.set(xscale="log", xlabel="batch size")
        panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.legend(fontsize=8)

    for panel in (curves, times, memory):
        panel.set(yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
        panel.grid(alpha=0.3)
    figure.supxlabel(caption(results), fontsize=8)
    figure.savefig(path, dpi=200)


def caption(results: dict[str, Any]) -> str:
    machine = results["environment"]
    kernels = ", kernels in Triton's interpreter" if results["interpreted"] else ""
    return (
        f"{machine['device']}{kernels}, backend {results['backend']}, {results['dtype']}, "
        f"torch {machine['torch']}, {results['date'][:10]}"
    )


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


def what_it_is(arguments: argparse.Namespace, digits: Digits, interpreted: bool) -> dict[str, Any]:
    """What a file of results says before them."""
    return {
        "environment": environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": arguments.backend,
        "interpreted": interpreted,
        "dtype": "float32",
        "seed": arguments.seed,
        "datapoints": len(digits.labels),
        "datapoints_tested": len(digits.test_labels),
        "rows": [],
    }


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
    import fastlinear

    layers = {FAST: fastlinear.Linear, NATIVE: nn.Linear}
    device = torch.device("cuda" if gpu else "cpu")
    if arguments.distributed:
        from benchmarks.demo import distributed  # takes a second

        device = distributed.start(arguments.distributed)
    digits = read_digits(128 if interpreted else None, arguments.seed, device)
    size, tested = len(digits.labels), len(digits.test_labels)

    small = interpreted or arguments.quick
    epochs = arguments.epochs or (5 if small else 20)
    chosen = arguments.batch_sizes or ([16, 64, WHOLE] if small else [1, 4, 16, 64, 256, WHOLE])
    batch_sizes = sorted({min(batch_size, size) for batch_size in chosen})

    device_name = torch.cuda.get_device_name() if gpu else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    folder = arguments.out or Path(__file__).parent / "results" / slug
    name = f"train-{arguments.distributed or 'steps' * arguments.compare_step}".rstrip("-")
    name += "-interpreted" * interpreted + "-quick" * arguments.quick

    if arguments.distributed:
        batch_size = batch_sizes[0] if arguments.batch_sizes else min(64, size)
        with fastlinear.use_backend(arguments.backend):
            try:
                row = distributed.train(arguments, fastlinear.Linear, digits, batch_size, epochs)
            except SystemExit:  # why has been said
                distributed.leave(1)
        if row:
            folder.mkdir(parents=True, exist_ok=True)
            results = what_it_is(arguments, digits, interpreted) | {"rows": [row]}
            write_json(folder / f"{name}.json", results)
            distributed.conclude(row)
        distributed.leave()

    results = what_it_is(arguments, digits, interpreted)
    print(f"{size} digits to learn from, {tested} to test on; {caption(results)}")
    if interpreted:
        print(
            "A slice of the digits, as the interpreter is slow; its times say nothing of a GPU's."
        )
    rows = results["rows"]
    try:
        with fastlinear.use_backend(arguments.backend):
            if arguments.compare_step:
                compare_steps(layers, digits, batch_sizes, arguments.seed, rows)
            else:
                train(layers, digits, batch_sizes, epochs, arguments.seed, rows)
                if sentence := disagreement(rows, tested):
                    sys.exit(sentence)
                conclude(rows, size, interpreted)
                row = train_ensemble(
                    fastlinear.Linear,
                    fastlinear.BatchedLinear,
                    digits,
                    1 if interpreted else epochs,
                    arguments.seed,
                )
                results["ensemble"] = row
                if not row["largest_gap_of_outputs"] <= ENSEMBLE_TOLERANCE:
                    gap = row["largest_gap_of_outputs"]
                    sys.exit(f"the ensemble trained at once disagrees by {gap:.1e} of its outputs")
                if not interpreted:
                    print(ensemble_line(row))
    except KeyboardInterrupt:
        print(f"stopped: what was measured is kept in {folder}", file=sys.stderr)
        sys.exit(130)  # what a shell gives a program ended by Ctrl-C
    finally:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(results, indent=1))
        if any(row.get("epoch_seconds") for row in rows):
            draw(results, folder / f"{name}.png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped before anything was measured")
