"""What a batch costs, and whether fastlinear is faster than what you have: the sweep.

`python -m benchmarks.linear` computes layers of real models (shared/shapes.py) at many batch
sizes with nn.Linear, torch.compile, fastlinear, a naive Triton kernel and whatever peers can be
imported. Before an arm is timed at a point, its results there are checked against float64; where
they are wrong it is dropped, and said so. Arms take turns, so that a slow moment of the machine
strikes all; a ratio is the median, over rounds, of nn.Linear's time by the arm's in that round.
Ratios are of device times on a GPU, of wall times on a CPU: above 1 is faster than nn.Linear.

--json and --csv are written after every point, so that Ctrl-C keeps what was measured.
"""

import argparse
import functools
import gc
import math
import random
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.shared.environment import environment
from benchmarks.shared.measure import ceilings
from benchmarks.shared.names import NATIVE, not_a_peer
from benchmarks.shared.setting import SETTING
from benchmarks.shared.shapes import BATCH_SIZES, LAYERS
from benchmarks.shared.watch import watch
from benchmarks.speed.arms import Arm, arms
from benchmarks.speed.contest import Contest, measure, said
from benchmarks.speed.points import MODES, Point, about, points
from benchmarks.speed.tables import table, write
from fastlinear.choice import backend
from fastlinear.choice import table as tables
from fastlinear.choice.table import Key
from fastlinear.ops.elementwise import ACTIVATIONS
from fastlinear.tuning.tune import measure_all, table_of

QUICK_LAYERS = ("mnist-1", "dlrm-2", "vit-b-qkv", "bert-base-up")
QUICK_BATCHES = (1, 8, 64, 512)
# A point of more operations takes a CPU a good part of a second, many times over.
MOST_ON_CPU, MOST_ON_CPU_QUICK = 5e9, 2e9


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few layers, batch sizes and rounds")
    parser.add_argument("--shapes", nargs="+", choices=list(LAYERS), metavar="LAYER")
    parser.add_argument("--batch-sizes", nargs="+", type=_positive, metavar="ROWS")
    parser.add_argument(
        "--dtype",
        default=None,
        choices=["bfloat16", "float16", "float32", "float64"],
        help="float32 on a CPU, bfloat16 on a GPU",
    )
    parser.add_argument(
        "--precision", default="highest", choices=["highest", "high"], help="of float32 products"
    )
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument(
        "--activation",
        nargs="+",
        default=["none", "model"],
        choices=["none", "model", *ACTIVATIONS],
        help="model: the one that the layer has there",
    )
    parser.add_argument("--bias", default="model", choices=["model", "yes", "no"])
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="besides nn.Linear")
    parser.add_argument(
        "--tune", action="store_true", help="before all, tune fastlinear for what is measured"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--rounds", type=_positive, help="of all arms at a point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    chosen = parser.parse_args(given)
    for path in (chosen.json, chosen.csv):
        if path is not None and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent} to write {path.name} into")
    return chosen


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"takes 1 or more, not {text}")
    return number


def main() -> int:
    chosen = arguments()
    watch()
    gpu = torch.cuda.is_available() and chosen.device != "cpu"
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if chosen.device == "cuda" and not gpu:
        print("--device cuda needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    dtype = getattr(torch, chosen.dtype or ("bfloat16" if gpu else "float32"))
    everything = arms(device, chosen.tune)
    unknown = set(chosen.arms or ()) - set(everything)
    if unknown:
        print(f"--arms takes {', '.join(everything)}, not {min(unknown)}", file=sys.stderr)
        return 2
    torch.manual_seed(chosen.seed)
    random.seed(chosen.seed)
    torch.set_float32_matmul_precision(chosen.precision)

    contestants = []
    for arm in everything.values():
        if chosen.arms is None or arm.name in (NATIVE, *chosen.arms):
            if arm.absent is None:
                contestants.append(arm)
            else:
                print(f"without {arm.name}: {arm.absent}")
    results = sweep(chosen, contestants, device, dtype)
    if results["points"]:
        print(table(results))
    for drop in results["dropped"]:
        print(
            f"DROPPED {drop['arm']} at {drop['shape']}, {drop['batch_size']} rows: {drop['reason']}"
        )
    # A peer that is wrong is left out; an arm of fastlinear's that is wrong is a failure.
    ours = any(not_a_peer(drop["arm"]) for drop in results["dropped"])
    return 130 if results["interrupted"] else int(ours)


def tune(wanted: list[Point], device: torch.device, dtype: torch.dtype) -> None:
    """Has fastlinear's table know what is to be measured, as `fastlinear.tune` would."""
    calls: dict[Key, int] = {}
    for point in wanted:
        layer, rows = point["layer"], point["rows"]
        for mode in point["modes"]:
            key = tables.call(
                dtype,
                point["bias"],
                layer.out_features,
                layer.in_features,
                rows,
                wanted="" if mode == "forward" else "input weight bias",
                activation=point["activation"],
                precision=backend.table_precision(dtype, device),
            )
            calls.setdefault(key, rows)
    measure_all(calls, device, math.inf)
    path = table_of(device)
    print(f"tuned: {path}")


def sweep(
    chosen: argparse.Namespace, contestants: list[Arm], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Measures every point that `chosen` asks for; what it returns is what --json holds."""
    wanted = wanted_points(chosen, device, dtype)
    clock = SETTING.clock(device)
    if chosen.tune:
        tune(wanted, device, dtype)
    results: dict[str, Any] = {
        "environment": environment(device),
        "date": date.today().isoformat(),
        "dtype": str(dtype).removeprefix("torch."),
        "precision": chosen.precision,
        "seed": chosen.seed,
        "arms": [arm.name for arm in contestants],
        "interrupted": False,
        "dropped": [],
        "points": [],
    }
    deadline = time.monotonic() + 60 * chosen.minutes
    try:
        with torch.cuda.stream(clock.stream):
            results["ceilings"] = ceilings(clock, dtype)
            rounds = chosen.rounds or (9 if chosen.quick else 15)
            contest = Contest(contestants, clock, dtype, rounds, results["ceilings"])
            measure_points(chosen, contest, wanted, results, deadline)
    except KeyboardInterrupt:
        results["interrupted"] = True
        print("interrupted: what follows was measured before", file=sys.stderr)
    write(results, chosen.json, chosen.csv)
    return results


def wanted_points(
    chosen: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[Point]:
    """The points that `chosen` asks for and that fit the device."""
    quick, gpu = chosen.quick, device.type == "cuda"
    most_operations = math.inf if gpu else MOST_ON_CPU_QUICK if quick else MOST_ON_CPU
    free = torch.cuda.mem_get_info(device)[0] if gpu else 4e9
    return points(
        [LAYERS[name] for name in chosen.shapes or (QUICK_LAYERS if quick else LAYERS)],
        list(chosen.batch_sizes or (QUICK_BATCHES if quick else BATCH_SIZES)),
        chosen.activation,
        chosen.bias,
        chosen.mode,
        most_operations,
        0.3 * free,
        dtype.itemsize,
    )


def measure_points(
    chosen: argparse.Namespace,
    contest: Contest,
    wanted: list[Point],
    results: dict[str, Any],
    deadline: float,
) -> None:
    """Adds to `results`, and writes them as they come, until all is measured or `deadline`."""
    common = {"dtype": results["dtype"], "precision": chosen.precision}
    written = -math.inf

    def drop(point: Point, arm: str, reason: str) -> None:
        results["dropped"].append({"arm": arm, **about(point), **common, "reason": reason})
        tqdm.write(f"DROPPED {arm} at {point['layer'].name}, {point['rows']} rows: {reason}")

    for point in tqdm(wanted, unit="point", leave=False, disable=None):
        if contest.clock.gpu:
            torch.compiler.reset()  # each point has compilations of its own
        try:
            for row in measure(contest, point, functools.partial(drop, point), deadline):
                results["points"].append(row | common)
                if time.monotonic() > min(written + 2, deadline):
                    write(results, chosen.json, chosen.csv)
                    written = time.monotonic()
        except Exception as error:  # out of memory, say: the next point may fit
            drop(point, "every arm", said(error))
            gc.collect()
            if contest.clock.gpu:
                torch.cuda.empty_cache()
        if time.monotonic() > deadline:
            results["stopped_after_minutes"] = chosen.minutes
            break


if __name__ == "__main__":
    sys.exit(main())
