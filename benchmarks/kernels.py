"""The time of a layer's products in the configurations that the model ranks first, beside cuBLAS's.

`python -m benchmarks.kernels --out FOLDER` writes FOLDER/kernels.json as it goes, so that an
interrupted run keeps what it has measured, and prints a summary. Times are device times, in
microseconds (`fastlinear.tuning.stopwatch`). Whether results are right says `benchmarks.numerics`.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.environment import environment
from benchmarks.files import write_rows
from benchmarks.setting import SETTING
from benchmarks.watch import LeftOut, watch
from fastlinear.choice import table as tables
from fastlinear.choice.table import PYTORCH, Key
from fastlinear.kernels.backward.linear import plan_backward
from fastlinear.kernels.launching import launch
from fastlinear.tuning.measure import Products
from fastlinear.tuning.stopwatch import Call, Measure

ARITHMETICS = [
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "bf16x6"),
    (torch.float32, "tf32"),
    (torch.float64, "ieee"),
]
# The products that are timed, and what results call them; grad_weight comes with grad_bias.
PRODUCTS = {
    "output": "output",
    "grad_input": "grad_input",
    "grad_weight": "grad_weight",
    "gradients": "backward",
}
CANDIDATES = 4  # the chosen one, and those that the model has next
TIMED = ("bfloat16",)  # in `make gpu`

Row = dict[str, Any]


def points(dtypes: Sequence[str]) -> Iterator[Key]:
    """The calls whose products are timed, for dtypes and precisions by name."""
    for dtype, precision in ARITHMETICS:
        name = str(dtype)[6:] if precision == "ieee" else precision
        if name in dtypes:
            for m, (n, k) in itertools.product(SETTING.timed_rows, SETTING.timed):
                yield tables.call(dtype, True, n, k, m, precision=precision)


def calls(products: Products, product: str, candidates: int = CANDIDATES) -> dict[str, Call]:
    """What is launched for a product: the chosen configuration, and those that the model has next.

    With each other's names: a launch for each of both gradients is None.
    """
    layer = products.call
    ranked = products.configs(product)
    chosen = ranked[0]
    if product == "gradients":
        g, w, x = products.grad, products.weight, products.input
        operands = launch.describe(g, w, x)
        bias = layer.bias
        plan = plan_backward(operands, None, bias, False, layer.precision, None, None)
        chosen = plan.config
    configs = [chosen, *(config for config in ranked if config != chosen)][:candidates]
    return {str(config): products.by_kernel(product, config) for config in configs}


def launchable(calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that can be called, and why the others cannot."""
    found: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = call
        except LeftOut as error:  # it is known what is wrong there
            print(f"without {name}: {error}", flush=True)
        except Exception as error:  # Triton has many of its own
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    return found, failed


def measure(
    record: Callable[[Row], None],
    dtypes: Sequence[str],
    deadline: float,
    stopwatch: Measure,
    device: torch.device,
) -> None:
    for layer in points(dtypes):
        torch.set_float32_matmul_precision("high" if layer.precision == "tf32" else "highest")
        name_of_dtype = layer.dtype if layer.precision == "ieee" else layer.precision
        products = Products(layer, device)
        for product, name in PRODUCTS.items():
            if time.monotonic() > deadline:
                print("out of time: the rest is not measured")
                return
            ours = calls(products, product)
            usable, failed = launchable(ours)
            times = stopwatch({PYTORCH: products.by_pytorch(product)} | usable, "device")
            times = {key: [round(one, 3) for one in found] for key, found in times.items()}
            row: Row = {"part": "time", "product": name, "dtype": name_of_dtype}
            row |= {"m": layer.m, "n": layer.n, "k": layer.k, "chosen": next(iter(ours))}
            row |= {"native_us": times.pop(PYTORCH), "kernel_us": times}
            record(row | ({"failed": failed} if failed else {}))
        print(f"timed: {name_of_dtype}, M = {layer.m}, N = {layer.n}, K = {layer.k}", flush=True)


def ratio(row: Row) -> float | None:
    """PyTorch's time over the chosen configuration's."""
    times = row["kernel_us"].get(row["chosen"])
    return statistics.median(row["native_us"]) / statistics.median(times) if times else None


def table(results: dict[str, Any]) -> str:
    """PyTorch's time over the chosen tile's, as Markdown: above 1, the kernel is faster."""
    timed = [row for row in results["rows"] if row["part"] == "time" and ratio(row)]
    rows = sorted({row["m"] for row in timed})
    ratios: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in timed:
        key = (row["dtype"], row["product"], row["n"], row["k"])
        ratios.setdefault(key, {})[row["m"]] = f"{ratio(row):.2f}"
    environment = results["environment"]
    lines = [
        f"{environment['device']}, driver {environment['driver']}, torch {environment['torch']}, "
        f"Triton {environment['triton']}, {results['date'][:10]}.",
        "",
        "| dtype | product | N x K | " + " | ".join(f"M = {m}" for m in rows) + " |",
        "|---|---|---|" + "---|" * len(rows),
    ]
    for (dtype, product, n, k), by_rows in ratios.items():
        cells = " | ".join(by_rows.get(m, "") for m in rows)
        lines.append(f"| {dtype} | {product} | {n} x {k} | {cells} |")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """How close the choice comes to the best tile."""
    timed = [row for row in results["rows"] if row["part"] == "time" and ratio(row)]
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in timed):
        of_best = [
            min(map(statistics.median, row["kernel_us"].values()))
            / statistics.median(row["kernel_us"][row["chosen"]])
            for row in timed
            if row["dtype"] == dtype
        ]
        mean = statistics.geometric_mean(of_best)
        lines.append(f"{dtype}: the chosen tile runs at {mean:.2f} of the best one's speed")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for kernels.json")
    parser.add_argument("--read", type=Path, help="measure nothing: print the table of this file")
    parser.add_argument(
        "--minutes", type=float, default=8, help="stop measuring after this many minutes"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "tf32"])
    arguments = parser.parse_args()
    if arguments.read:
        results = json.loads(arguments.read.read_text())
        results["rows"] = [row for row in results["rows"] if row.get("dtype") in arguments.dtypes]
        print(table(results), summary(results), sep="\n\n")
        return
    if arguments.out is None:
        parser.error("give --out FOLDER to measure, or --read FILE to see what was measured")
    if lacking := SETTING.missing():
        sys.exit(lacking)
    watch()
    torch.manual_seed(0)
    device = torch.device(SETTING.device)
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": environment(),
        "date": datetime.now(timezone.utc).isoformat(),
        "rows": [],
    }
    written = -math.inf

    def record(row: Row) -> None:
        nonlocal written
        results["rows"].append(row)
        if time.monotonic() - written > 5:
            save()
            written = time.monotonic()

    def save() -> None:
        write_rows(arguments.out / "kernels.json", results)

    print(json.dumps(results["environment"]), f"triton {triton.__version__}", flush=True)
    try:
        measure(record, arguments.dtypes, deadline, SETTING.clock(device).stopwatch, device)
    finally:
        save()
    print(table(results), summary(results), sep="\n\n")


if __name__ == "__main__":
    main()
