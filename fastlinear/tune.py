"""`python -m fastlinear tune`: measures what is fastest on this GPU, and writes it to a table.

Each product of a layer is computed by PyTorch and by the kernels, in the configurations that the
model of their times ranks first; what is not as exact as PyTorch is left out. A kernel is entered
into the table where it is faster than PyTorch on the device or for the caller, by more than the
measurements scatter, and slower at neither. The table is written after each product, so that the
same command goes on where it was interrupted.
"""

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fastlinear import backend, lookup, tuned
from fastlinear.activations import ACTIVATIONS
from fastlinear.kernels import tables
from fastlinear.kernels.configs import PYTORCH
from fastlinear.kernels.tables import Row
from fastlinear.stopwatch import Measure, Stopwatch
from fastlinear.tune_layer import Layer
from fastlinear.tune_rows import measure_layer
from fastlinear.tune_store import Store

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
            tables.bucket(m),
        )
        for m in arguments.rows
        for dtype in arguments.dtypes
        for activation in arguments.activations
        for n, k in shapes
    ]
    return list(dict.fromkeys(found))


def run(arguments: argparse.Namespace, measure: Measure | None = None) -> int:
    """The command; `measure` takes the place of a GPU's clocks."""
    try:
        wanted = layers(arguments)
    except ValueError as error:
        return _refuse(str(error), 2)
    return tune(wanted, arguments.output, arguments.minutes, measure)


def tune(
    wanted: list[Layer], output: Path | None, minutes: float, measure: Measure | None = None
) -> int:
    """Measures those layers in turn; the other arguments are as the command and `run` have them."""
    if measure is None and not torch.cuda.is_available():
        return _refuse("measures kernels on a GPU, and finds none", 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    name = lookup.device_name(device) or str(device)
    if measure is None and name == lookup.INTERPRETER:
        return _refuse("measures no interpreted kernels: unset TRITON_INTERPRET", 1)
    try:
        backend.launchers().forward.launch.target_of(device)
        path = output or tuned.user_folder() / tables.file_name(name)
    except RuntimeError as error:  # no Triton, no kernels for this GPU, or no home folder
        return _refuse(str(error), 1)
    try:
        store = Store(path, device, own=output is None)
    except (OSError, ValueError) as error:
        return _refuse(f"cannot use {path} for the table: {error}", 1)
    measure = measure or Stopwatch(device)
    if store.replaces is not None:
        print(f"{path} is written anew: {store.replaces}")
    print(f"{len(wanted)} layers on {name}, to {path}")
    new: list[Row] = []
    try:
        for row in _rows(wanted, device, measure, store, 60 * minutes):
            store.add(row)
            new.append(row)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from the {len(new)} new rows in {path}")
        return 130
    except OSError as error:  # the disk is full, say
        kept = f"the {len(new)} new rows before are in it"
        return _refuse(f"cannot use {path} for the table: {error}; {kept}", 1)
    finally:
        backend.use_tables()
    print(gained(new))
    return 0


def _refuse(why: str, status: int) -> int:
    print(f"python -m fastlinear tune: {why}", file=sys.stderr)
    return status


def _rows(
    wanted: list[Layer], device: torch.device, measure: Measure, store: Store, seconds: float
) -> Iterator[Row]:
    known, deadline = store.rows(), time.monotonic() + seconds
    for layer in _with_progress(wanted):
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the last layer left counts as free
            if layer.bytes > torch.cuda.mem_get_info(device)[0]:
                print(f"left out, as it does not fit in memory: {layer}")
                continue
        before = torch.get_float32_matmul_precision()
        try:
            if layer.dtype == torch.float32:
                torch.set_float32_matmul_precision("high" if layer.tf32 else "highest")
            for row in measure_layer(layer, device, measure, known):
                yield row
                known[row.key] = row
                if time.monotonic() > deadline:
                    print("out of time; the same command goes on from here")
                    return
        except torch.OutOfMemoryError:
            print(f"left out, as it does not fit in memory: {layer}")
        finally:
            torch.set_float32_matmul_precision(before)


def _with_progress(wanted: list[Layer]) -> Iterator[Layer]:
    """With a progress bar where tqdm is installed, else a line a layer."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        for number, layer in enumerate(wanted):
            print(f"{number + 1} of {len(wanted)}: {layer}", flush=True)
            yield layer
        return
    with tqdm(wanted, unit="layer") as bar:
        for layer in bar:
            bar.set_postfix_str(str(layer))
            yield layer


def gained(rows: list[Row]) -> str:
    """In words: how often a kernel won, and what that gained."""
    lines = []
    for product in tables.PRODUCTS:
        of_product = [row for row in rows if row.product == product]
        won = [row for row in of_product if row.candidate != PYTORCH]
        if not of_product:
            continue
        line = f"{product}: a kernel is faster for {len(won)} of {len(of_product)}"
        if won:
            device = statistics.geometric_mean(row.pytorch_device_us / row.device_us for row in won)
            wall = statistics.geometric_mean(row.pytorch_wall_us / row.wall_us for row in won)
            line += f", there {device:.2f} times PyTorch's speed on the device"
            line += f" and {wall:.2f} times for the caller"
        lines.append(line)
    return "\n".join(lines) or "nothing new was measured"
