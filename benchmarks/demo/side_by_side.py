"""fastlinear.Linear and nn.Linear side by side: both learn, in turn, and have to agree."""

import math
import statistics

from torch import nn

from benchmarks.demo.digits import (
    DIGITS_TOLERANCE,
    LOSS_TOLERANCE,
    Digits,
    Row,
    Training,
    epoch_orders,
    learning_rate,
    loss_gap,
)

FAST, NATIVE = "fastlinear.Linear", "nn.Linear"

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
