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
import csv
import functools
import gc
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.shared.environment import environment
from benchmarks.shared.files import write_rows
from benchmarks.shared.measure import Clock, ceilings, peak_bytes
from benchmarks.shared.names import NATIVE, not_a_peer
from benchmarks.shared.setting import SETTING
from benchmarks.shared.shapes import BATCH_SIZES, LAYERS, Layer, least_bytes, memory, operations
from benchmarks.shared.watch import LeftOut, watch
from benchmarks.speed.arms import Arm, Call, arms
from benchmarks.speed.problem import Problem, errors, step, why_wrong
from fastlinear import use_backend
from fastlinear.choice import backend
from fastlinear.choice import table as tables
from fastlinear.choice.table import Key
from fastlinear.ops.elementwise import ACTIVATIONS
from fastlinear.tuning.tune import measure_all, table_of

MODES = ("forward", "backward", "forward+backward")
QUICK_LAYERS = ("mnist-1", "dlrm-2", "vit-b-qkv", "bert-base-up")
QUICK_BATCHES = (1, 8, 64, 512)
# A point of more operations takes a CPU a good part of a second, many times over.
MOST_ON_CPU, MOST_ON_CPU_QUICK = 5e9, 2e9
MOST_SECONDS = 3.0  # for the rounds of a point's mode, once there are three

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


def right_calls(
    problem: Problem, contestants: list[Arm], drop: Callable[[str, str], None]
) -> dict[str, Call]:
    """The arms that compute the point as nn.Linear does, which is the first of them."""
    calls: dict[str, Call] = {}
    native: dict[str, float] = {}
    for arm in contestants:
        with use_backend(arm.backend):
            try:
                call = arm.make(problem.weight, problem.bias, problem.activation)
                found = errors(problem.results(call), problem.exact)
            except LeftOut as error:  # it is known what is wrong there
                tqdm.write(f"without {arm.name} at {problem.input.shape}: {error}")
                continue
            except Exception as error:  # a peer may raise anything for what it does not take
                drop(arm.name, _said(error))
                if arm.name == NATIVE:
                    return {}
                continue
        native = found if arm.name == NATIVE else native
        reason = why_wrong(problem, found, native)
        if reason is None:
            calls[arm.name] = call
        else:
            drop(arm.name, reason)
    return calls


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def measure(
    point: Point,
    contestants: list[Arm],
    clock: Clock,
    dtype: torch.dtype,
    rounds: int,
    roof: dict[str, float],
    drop: Callable[[str, str], None],
    deadline: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """The rows of a point: one for each arm and mode that is right, until `deadline`."""
    problem = Problem(point, dtype, clock.device)
    layer: Layer = point["layer"]
    calls = right_calls(problem, contestants, drop)
    backends = {arm.name: arm.backend for arm in contestants}
    for mode in point["modes"]:
        if time.monotonic() > deadline:
            return
        timed: dict[str, Callable[[], object]] = {}
        replays: dict[str, tuple[Callable[[], object], str | None]] = {}
        for name, call in calls.items():
            with use_backend(backends[name]):
                try:
                    timed[name] = step(problem, call, mode)
                    replays[name] = clock.prepare(timed[name])
                except Exception as error:  # not the others' fault
                    timed.pop(name, None)
                    drop(name, f"{mode}: {_said(error)}")
        if NATIVE not in timed:
            continue
        uncaptured = {name: why for name, (_, why) in replays.items() if why is not None}
        if clock.gpu and uncaptured:  # then none is, or it would be no comparison
            tqdm.write(
                f"no CUDA graphs at {layer.name}, {point['rows']} rows, {mode}: {uncaptured}"
            )
        prepared = timed if uncaptured else {name: replay for name, (replay, _) in replays.items()}
        timed[NATIVE]()
        once = max(clock.wall_seconds(timed[NATIVE], 3), 1e-7)
        in_a_row = max(1, min(100, int(2e-3 / once)))
        device: dict[str, list[float]] = {name: [] for name in timed}
        wall: dict[str, list[float]] = {name: [] for name in timed}
        turns, started = list(timed), time.monotonic()
        for done in range(rounds):
            if done >= 3 and time.monotonic() - started > MOST_SECONDS:
                break
            random.shuffle(turns)
            for name in turns:
                with use_backend(backends[name]):
                    wall[name].append(clock.wall_seconds(timed[name], in_a_row))
                    seconds = clock.device_seconds(prepared[name])
                if seconds is not None:
                    device[name].append(seconds)
        least = {
            "operations": operations(layer, point["rows"], mode),
            "bytes": least_bytes(layer, point["rows"], mode, dtype.itemsize, point["bias"]),
        }
        floor = max(
            least["operations"] / roof["operations_per_second"],
            least["bytes"] / roof["bytes_per_second"],
        )
        times = device if clock.gpu else wall
        for name in timed:
            ratios = [a / b for a, b in zip(times[NATIVE], times[name], strict=True)]
            median = statistics.median(times[name])
            low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            peak = None
            if mode == "forward+backward":
                with use_backend(backends[name]):
                    peak = peak_bytes(timed[name], [problem.weight, *problem.wanted()[2:]])
            yield {
                **_about(point),
                "mode": mode,
                "arm": name,
                "device_us": _microseconds(device[name]),
                "captured": clock.gpu and not uncaptured,
                "wall_us": _microseconds(wall[name]),
                "ratio": round(ratio, 4),
                "ratio_low": round(low, 4),
                "ratio_high": round(high, 4),
                "tflops": float(f"{least['operations'] / median / 1e12:.4g}"),
                "gbps": float(f"{least['bytes'] / median / 1e9:.4g}"),
                "of_roofline": round(floor / median, 4),
                "operations": least["operations"],
                "bytes": least["bytes"],
                "peak_bytes": peak,
            }


def _about(point: Point) -> dict[str, Any]:
    return {
        "shape": point["layer"].name,
        "batch_size": point["rows"],
        "activation": point["activation"],
        "bias": point["bias"],
    }


def _microseconds(seconds: list[float]) -> float | None:
    return round(1e6 * statistics.median(seconds), 3) if seconds else None


def write(results: dict[str, Any], json_path: Path | None, csv_path: Path | None) -> None:
    """Both files, in the place of those before."""
    if json_path is not None:
        write_rows(json_path, results, "points")
    if csv_path is not None and results["points"]:
        partial = csv_path.with_name(csv_path.name + ".part")
        with partial.open("w", newline="") as file:
            table = csv.DictWriter(file, list(results["points"][0]))
            table.writeheader()
            table.writerows(results["points"])
        os.replace(partial, csv_path)


def table(results: dict[str, Any]) -> str:
    """Ratios to nn.Linear by layer and batch size, a column an arm, and nn.Linear's own time."""
    names = [name for name in results["arms"] if name != NATIVE]
    by_device = any(row["device_us"] is not None for row in results["points"])
    which = "device" if by_device else "wall"
    lines = [f"{'':47} {NATIVE:>12}" + "".join(f"  {name:>27}" for name in names)]
    lines.append(
        f"{'layer':17} {'rows':>5}  {'mode':16} {'':5} {which + ' us':>12}"
        + "".join(f"  {'ratio (quartiles)  roofline':>27}" for _ in names)
    )
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in results["points"]:
        key = (row["shape"], row["batch_size"], row["mode"], row["activation"] or "")
        groups.setdefault(key, {})[row["arm"]] = row
    order = {name: index for index, name in enumerate(LAYERS)}
    for key in sorted(groups, key=lambda key: (order.get(key[0], 99), key[3], key[2], key[1])):
        rows = groups[key]
        if NATIVE not in rows:  # cut short
            continue
        shape, size, mode, activation = key
        native = rows[NATIVE][f"{which}_us"]
        line = f"{shape:17} {size:5}  {mode:16} {activation[:5]:5} {native:12.1f}"
        for name in names:
            row = rows.get(name)
            line += "  " + (
                f"{row['ratio']:5.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
                f"  {100 * row['of_roofline']:5.1f} %".rjust(27)
                if row
                else f"{'-':>27}"
            )
        lines.append(line)
    for name in names:
        ratios = [row["ratio"] for row in results["points"] if row["arm"] == name]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            lines.append(f"{name}: {mean:.3f} times as fast as {NATIVE}, as a geometric mean")
    return "\n".join(lines)


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
    quick, gpu = chosen.quick, device.type == "cuda"
    most_operations = math.inf if gpu else MOST_ON_CPU_QUICK if quick else MOST_ON_CPU
    free = torch.cuda.mem_get_info(device)[0] if gpu else 4e9
    wanted = points(
        [LAYERS[name] for name in chosen.shapes or (QUICK_LAYERS if quick else LAYERS)],
        list(chosen.batch_sizes or (QUICK_BATCHES if quick else BATCH_SIZES)),
        chosen.activation,
        chosen.bias,
        chosen.mode,
        most_operations,
        0.3 * free,
        dtype.itemsize,
    )
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
    common = {"dtype": results["dtype"], "precision": chosen.precision}
    deadline = time.monotonic() + 60 * chosen.minutes
    written = -math.inf
    rounds = chosen.rounds or (9 if quick else 15)

    def drop(point: Point, arm: str, reason: str) -> None:
        results["dropped"].append({"arm": arm, **_about(point), **common, "reason": reason})
        tqdm.write(f"DROPPED {arm} at {point['layer'].name}, {point['rows']} rows: {reason}")

    try:
        with torch.cuda.stream(clock.stream):
            results["ceilings"] = roof = ceilings(clock, dtype)
            for point in tqdm(wanted, unit="point", leave=False, disable=None):
                if gpu:
                    torch.compiler.reset()  # each point has compilations of its own
                try:
                    for row in measure(
                        point,
                        contestants,
                        clock,
                        dtype,
                        rounds,
                        roof,
                        functools.partial(drop, point),
                        deadline,
                    ):
                        results["points"].append(row | common)
                        if time.monotonic() > min(written + 2, deadline):
                            write(results, chosen.json, chosen.csv)
                            written = time.monotonic()
                except Exception as error:  # out of memory, say: the next point may fit
                    drop(point, "every arm", _said(error))
                    gc.collect()
                    if gpu:
                        torch.cuda.empty_cache()
                if time.monotonic() > deadline:
                    results["stopped_after_minutes"] = chosen.minutes
                    break
    except KeyboardInterrupt:
        results["interrupted"] = True
        print("interrupted: what follows was measured before", file=sys.stderr)
    write(results, chosen.json, chosen.csv)
    return results


if __name__ == "__main__":
    sys.exit(main())
