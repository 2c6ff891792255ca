"""`python -m fastlinear`: `info` says what can run here, `tune` measures what is fastest."""

import argparse
import json
import math
import re
import sys
import time

import torch

from fastlinear.choice import table
from fastlinear.explanation import info
from fastlinear.ops.elementwise import ACTIVATIONS
from fastlinear.tuning.measure import on_cpu
from fastlinear.tuning.record import Call, Noted
from fastlinear.tuning.stopwatch import Measure
from fastlinear.tuning.tune import tune_calls

TUNE = """Measures layers that are named, as fastlinear.tune does those that a model calls: on a
GPU, or on a CPU where there is none. Each product is computed by PyTorch and by what may be faster;
what is not as exact as PyTorch is left out. The table, in the folder FASTLINEAR_CACHE or else
~/.cache/fastlinear, is written after each product: the same command goes on where it stopped."""
# out_features x in_features of common models: squares and MLPs of Llama 3 8B, ViT-B and BERT-base.
COMMON = ("4096x4096", "14336x4096", "4096x14336", "1024x4096", "3072x768", "768x3072", "768x768")
# Those that most calls have first: training's, decoding's, and then what lies between.
ROWS = (4096, 1, 16, 64, 256, 1024, 8192, 8, 32, 128, 512, 2048, 2, 4, 16384)
DTYPES = ("bfloat16", "float16", "float32", "tf32", "float64")


def arguments_of(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastlinear", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, settings, and what can run here")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    said = "measure what is fastest on this device, for backend 'auto' to go by"
    add = commands.add_parser("tune", help=said, description=TUNE).add_argument
    common = "OUT_FEATURESxIN_FEATURES of layers; 'common' is " + " ".join(COMMON)
    add("--shapes", nargs="+", metavar="SHAPE", default=["common"], help=common)
    dtypes = f"of {', '.join(DTYPES)}; bfloat16 and float32 if not given"
    default = ["bfloat16", "float32"]
    add("--dtypes", nargs="+", metavar="DTYPE", choices=DTYPES, default=default, help=dtypes)
    rows = "batch sizes, each rounded up to a power of two; 1 to 16384 if not given"
    add("--rows", nargs="+", type=int, metavar="M", default=ROWS, help=rows)
    names = ("none", *ACTIVATIONS)
    said = f"of {', '.join(names)}"
    add("--activations", nargs="+", metavar="NAME", choices=names, default=["none"], help=said)
    add("--no-bias", action="store_true", help="layers without a bias")
    add("--minutes", type=float, default=math.inf, help="stop after so long")
    return parser.parse_args(given)


def calls_of(arguments: argparse.Namespace, device: torch.device) -> dict[Call, Noted]:
    """What `tune` is to measure, the most valuable first.

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
    if on_cpu(device) and "tf32" in arguments.dtypes:
        raise ValueError("--dtypes takes tf32 on a GPU only, and there is none")
    if {"float32", "tf32"} <= set(arguments.dtypes):
        raise ValueError("--dtypes takes float32 or tf32, in a call each, but got both")
    calls: dict[Call, Noted] = {}
    for m in arguments.rows:
        for dtype in arguments.dtypes:
            how = {"precision": "tf32" if dtype == "tf32" else "ieee"}
            name = "float32" if dtype == "tf32" else dtype
            for activation in arguments.activations:
                for n, k in shapes:
                    key = table.call(getattr(torch, name), not arguments.no_bias, n, k, m, **how)
                    key = key._replace(activation=None if activation == "none" else activation)
                    calls[Call("linear", device, True, key)] = Noted([key.m], [f"{n}x{k}"])
    return calls


def tune(arguments: argparse.Namespace, measure: Measure | None = None) -> int:
    """The command; `measure` takes the place of the device's clocks."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    before = torch.get_float32_matmul_precision()
    try:
        calls, deadline = calls_of(arguments, device), time.monotonic() + 60 * arguments.minutes
        if "tf32" in arguments.dtypes:
            torch.set_float32_matmul_precision("high")
        print(tune_calls(calls, deadline, measure))
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"python -m fastlinear tune: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        if torch.get_float32_matmul_precision() != before:
            torch.set_float32_matmul_precision(before)
    return 0


def main() -> None:
    arguments = arguments_of()
    if arguments.command == "tune":
        sys.exit(tune(arguments))
    found = info()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        *found.pop("versions").items(),
        *((f"on {name}", path) for name, path in found.pop("devices").items()),
        *((f"table for {name}", files) for name, files in found.pop("tables").items()),
    ]
    rows[4:4] = found.items()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {'not installed' if value is None else value}")


if __name__ == "__main__":
    main()
