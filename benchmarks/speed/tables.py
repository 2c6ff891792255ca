"""The sweep's results as files and as a table to read."""

import csv
import math
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.shared.files import write_rows
from benchmarks.shared.names import NATIVE
from benchmarks.shared.shapes import LAYERS


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
