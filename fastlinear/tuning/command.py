"""`python -m fastlinear tune`: measures what is fastest on this device, and writes it to a table.

As `fastlinear.tune` does for the layers that a model calls, for layers that are named: on a GPU, or
on a CPU where there is none. Each product is computed by PyTorch and by what may be faster; what is
not as exact as PyTorch is left out. The table is written after each product, so that the same
command goes on where it was interrupted.
"""

import argparse
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch

from fastlinear.choice import known, table
from fastlinear.choice.table import PYTORCH, Row
from fastlinear.elementwise import ACTIVATIONS
from fastlinear.tuning.products import Layer
from fastlinear.tuning.stopwatch import Measure
from fastlinear.tuning.tune import measure_all, table_of

# out_features x in_features of common models: squares and MLPs of Llama 3 8B, ViT-B and BERT-base.
COMMON = ("4096x4096", "14336x4096", "4096x14336", "1024x4096", "3072x768", "768x3072", "768x768")
# Those that most calls have first: training's, decoding's, and then what lies between.
ROWS = (4096, 1, 16, 64, 256, 1024, 8192, 8, 32, 128, 512, 2048, 2, 4, 16384)
DTYPES = ("bfloat16", "float16", "float32", "tf32", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        default=["common"],
        help="OUT_FEATURESxIN_FEATURES of layers, as in 4096x1024; 'common' is " + " ".join(COMMON),
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        metavar="DTYPE",
        choices=DTYPES,
        default=["bfloat16", "float32"],
        help=f"of {', '.join(DTYPES)}; bfloat16 and float32 if not given",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        metavar="M",
        default=ROWS,
        help="batch sizes, each rounded up to a power of two; 1 to 16384 if not given",
    )
    names = ("none", *ACTIVATIONS)
    parser.add_argument(
        "--activations",
        nargs="+",
        metavar="ACTIVATION",
        choices=names,
        default=["none"],
        help=f"of {', '.join(names)}",
    )
    parser.add_argument("--no-bias", action="store_true", help="layers without a bias")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--output", type=Path, help="the table; the user's own if not given")


def layers(arguments: argparse.Namespace) -> list[Layer]:
    """What is asked for, the most valuable first.

    Raises:
        ValueError: a shape or a number is none; the message says which.
    """
    shapes: list[tuple[int, int]] = []
    for shape in arguments.shapes:
        for text in COMMON if shape == "common" else (shape,):
            match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
            if match is None:
                raise ValueError(
                    f"--shapes takes OUT_FEATURESxIN_FEATURES, as in 4096x1024, or 'common', "
                    f"but got {shape!r}"
                )
            shapes.append((int(match[1]), int(match[2])))
    for m in arguments.rows:
        if not 0 < m <= 2**24:
            raise ValueError(f"--rows takes numbers from 1 to 16777216, but got {m}")
    if not arguments.minutes > 0:
        raise ValueError(f"--minutes takes a number above 0, but got {arguments.minutes}")
    found = [
        Layer(
            getattr(torch, "float32" if dtype == "tf32" else dtype),
            dtype == "tf32",
            None if activation == "none" else activation,
            not arguments.no_bias,
            n,
            k,
            table.bucket(m),
        )
        for m in arguments.rows
        for dtype in arguments.dtypes
        for activation in arguments.activations
        for n, k in shapes
    ]
    return list(dict.fromkeys(found))


def run(arguments: argparse.Namespace, measure: Measure | None = None) -> int:
    """The command; `measure` takes the place of the device's clocks."""
    try:
        wanted = layers(arguments)
    except ValueError as error:
        return _refuse(str(error), 2)
    return tune(wanted, arguments.output, arguments.minutes, measure)


def tune(
    wanted: list[Layer], output: Path | None, minutes: float, measure: Measure | None = None
) -> int:
    """Measures those layers in turn; the other arguments are as the command and `run` have them."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    name = known.device_name(device) or str(device)
    try:
        path = output or table_of(device)
    except RuntimeError as error:  # no home folder
        return _refuse(str(error), 1)
    print(f"{len(wanted)} layers on {name}, to {path}")
    deadline, before = time.monotonic() + 60 * minutes, _rows(path)
    try:
        finished = measure_all(wanted, device, path, deadline, measure, own=output is None)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        return _refuse(str(error), 1)
    if not finished:
        print("out of time; the same command goes on from here")
    print(gained([row for row in _rows(path) if row not in before]))
    return 0


def _refuse(why: str, status: int) -> int:
    print(f"python -m fastlinear tune: {why}", file=sys.stderr)
    return status


def _rows(path: Path) -> list[Row]:
    try:
        return list(table.read(path).rows)
    except (OSError, ValueError):
        return []


def gained(rows: list[Row]) -> str:
    """In words: how often a kernel won, and what that gained."""
    lines = []
    for product in table.PRODUCTS:
        of_product = [row for row in rows if row.product == product]
        won = [row for row in of_product if row.candidate != PYTORCH]
        if not of_product:
            continue
        line = f"{product}: something else is faster for {len(won)} of {len(of_product)}"
        if won:
            device = statistics.geometric_mean(row.pytorch_device_us / row.device_us for row in won)
            wall = statistics.geometric_mean(row.pytorch_wall_us / row.wall_us for row in won)
            line += f", there {device:.2f} times PyTorch's speed on the device"
            line += f" and {wall:.2f} times for the caller"
        lines.append(line)
    return "\n".join(lines) or "nothing new was measured"
