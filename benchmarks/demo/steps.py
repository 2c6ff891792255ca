"""Single steps of the two layers, timed in turn: `python -m benchmarks.train --compare-step`."""

import statistics
import time

import torch
from torch import nn

from benchmarks.demo.digits import Digits, Row, Training, now
from benchmarks.demo.side_by_side import NATIVE, Layers

SECONDS_PER_COMPARISON = 3.0


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
