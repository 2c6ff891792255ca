"""The time of a layer's products in the configurations that the model ranks first, beside cuBLAS's.

`python -m benchmarks.kernels --out FOLDER` writes FOLDER/kernels.json as it goes, so that an
interrupted run keeps what it has measured, and prints a summary. Times are device times, in
microseconds (`fastlinear.tuning.stopwatch`). Whether results are right says `benchmarks.numerics`.
"""

import argparse
import json
import math
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.shared.environment import environment
from benchmarks.shared.files import write_rows
from benchmarks.shared.setting import SETTING
from benchmarks.shared.watch import watch
from benchmarks.speed.kernel_times import Row, measure


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
