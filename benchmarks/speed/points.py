"""The points of the sweep: a layer, a batch size, an activation, a bias, and the modes to time."""

import itertools
from typing import Any

from benchmarks.shared.shapes import Layer, memory

MODES = ("forward", "backward", "forward+backward")

Point = dict[str, Any]


def points(
    layers: list[Layer],
    batch_sizes: list[int],
    activations: list[str],
    bias: str,
    modes: list[str],
    most_operations: float,
    most_bytes: float,
    itemsize: int,
) -> list[Point]:
    """What to measure: every layer, batch size and variant that fits; the modes go together.

    Each layer comes in turn, with another batch size each, so that a run cut short has seen all of
    both.
    """
    sizes = _coarse_first(batch_sizes)
    found = []
    for turn, (index, layer) in itertools.product(range(len(sizes)), enumerate(layers)):
        rows = sizes[(turn + index) % len(sizes)]
        if 3 * 2 * rows * layer.in_features * layer.out_features > most_operations:
            continue
        if memory(layer, rows, itemsize) > most_bytes:
            continue
        names = [layer.activation if name == "model" else name for name in activations]
        for activation in dict.fromkeys(None if name == "none" else name for name in names):
            found.append(
                {
                    "layer": layer,
                    "rows": rows,
                    "activation": activation,
                    "bias": layer.bias if bias == "model" else bias == "yes",
                    "modes": modes,
                }
            )
    return found


def _coarse_first(sizes: list[int]) -> list[int]:
    """Every eighth, then every fourth of the rest, and so on."""
    order: list[int] = []
    for stride in (8, 4, 2, 1):
        order += [size for size in sizes[::stride] if size not in order]
    return order


def about(point: Point) -> dict[str, Any]:
    """What a row, or a note of an arm that was dropped, says of its point."""
    return {
        "shape": point["layer"].name,
        "batch_size": point["rows"],
        "activation": point["activation"],
        "bias": point["bias"],
    }
