"""The page on what `benchmarks.gpu` found in a folder: `python -m benchmarks.gpu_summary FOLDER`.

Failures come first, then ratios by batch size, then the worst points. It takes what files there
are, and says which are not.
"""

import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.files import read_json
from benchmarks.names import not_a_peer

LIMIT = 12_000  # characters of the page
FAILURES, PARTS, RATIOS = 3_200, 1_300, 5_300  # of these sections
Point = dict[str, Any]


def cut(lines: list[str], limit: int) -> list[str]:
    """As many of `lines` as `limit` characters hold, and how many more there are."""
    kept: list[str] = []
    for line in lines:
        limit -= len(line) + 1
        if limit < 40:
            return [*kept, f"... and {len(lines) - len(kept)} more"]
        kept.append(line)
    return kept


def failures(folder: Path) -> list[str]:
    """What is wrong, a line each: what parts found first, then parts that did not end well."""
    lines = []
    runs = read_json(folder / "run.json")
    checked = read_json(folder / "numerics.json")
    if checked and not checked.get("complete"):
        lines.append(f"numerics: not all was checked, but {len(checked['rows'])} cases were")
    for row in checked.get("rows", []):
        if row.get("fault"):
            where = (row.get(key) for key in ("arithmetic", "shape", "layout", "config"))
            case = ", ".join(str(one) for one in (row["product"], *where) if one)
            lines.append(f"numerics: {case}: {row['fault']}"[:300])
    for name, run in runs.items():
        lines += [f"{name}: {finding}" for finding in run["findings"]]
    lines += dropped(folder, ours=True)
    for name, run in runs.items():
        if run["status"] == "stopped":
            lines.append(f"{name}: not finished in its {run['of']:.0f} s: {run['last']}")
        elif run["status"] not in ("passed", "skipped"):
            lines.append(f"{name}: {run['status']}, exit {run['exit']}: {run['last']}")
    return lines


def dropped(folder: Path, ours: bool) -> list[str]:
    """The arms that a sweep left out, a line for each and each dtype, with one of the reasons.

    fastlinear's, and whatever all arms failed at, are failures; a peer that is wrong is left out.
    """
    rows = [
        row
        for row in read_json(folder / "linear.json").get("dropped", [])
        if not_a_peer(str(row.get("arm"))) == ours
    ]
    counts = Counter((row.get("arm"), row.get("dtype")) for row in rows)
    reasons = {(row.get("arm"), row.get("dtype")): row.get("reason") for row in rows}
    return [
        f"sweep: {arm} dropped {count} times in {dtype}: {reasons[arm, dtype]}"[:400]
        for (arm, dtype), count in counts.most_common()
    ]


def parts(folder: Path) -> list[str]:
    runs = read_json(folder / "run.json")
    return [
        f"{name:19} {run['status']:11} {run.get('seconds', 0):5.0f} s  {run['last']}"[:120]
        for name, run in runs.items()
    ]


def geometric_mean(points: list[Point]) -> str:
    return f"{statistics.geometric_mean(point['ratio'] for point in points):.2f}"


def describe(point: Point) -> str:
    """dtype and mode of a point, as the rows of the table are called."""
    high = " high" if point["dtype"] == "float32" and point.get("precision") == "high" else ""
    return f"{point['dtype']}{high}, {point['mode']}"


def ratios(points: list[Point]) -> list[str]:
    """nn.Linear's time over each arm's by batch size, as geometric means over shapes."""
    batches = sorted({point["batch_size"] for point in points})
    rows: dict[str, dict[int, list[Point]]] = {}
    for point in points:
        if point["arm"] != "nn.Linear":
            row = rows.setdefault(f"{point['arm']}, {describe(point)}", {})
            row.setdefault(point["batch_size"], []).append(point)
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{batch:>6}" for batch in batches)]
    for name in sorted(rows, key=lambda name: (not name.startswith("fastlinear"), name)):
        cells = (
            geometric_mean(rows[name][batch]) if batch in rows[name] else "-" for batch in batches
        )
        lines.append(f"{name:{width}}" + "".join(f"{cell:>6}" for cell in cells))
    return lines


def worst(points: list[Point]) -> list[str]:
    ours = [point for point in points if point["arm"].startswith("fastlinear")]
    return [
        f"{one['ratio']:.2f} ({one.get('ratio_low') or 0:.2f} to {one.get('ratio_high') or 0:.2f})"
        f"  {one['arm']}, {one['shape']}, batch {one['batch_size']}, {describe(one)}"
        f"{' ' + one['activation'] if one.get('activation') else ''}"
        f"{'' if one.get('bias', True) else ', no bias'}, "
        f"{one.get('device_us') or one['wall_us']:.1f} us"[:150]
        for one in sorted(ours, key=lambda one: one["ratio"])[:10]
    ]


def summary(folder: Path) -> str:
    """The page, under LIMIT characters."""
    environment = read_json(folder / "environment.json")
    kinds = ("device", "driver", "torch", "triton", "python", "commit", "date")
    known = (f"{kind} {environment[kind]}" for kind in kinds if environment.get(kind))
    failed = failures(folder)
    points = [
        point for point in read_json(folder / "linear.json").get("points", []) if point.get("ratio")
    ]
    lines = [f"fastlinear on {', '.join(known) or 'a machine that is not known yet'}"[:300], ""]
    lines += [f"FAILURES: {len(failed) or 'none'}", *cut(failed, FAILURES), ""]
    lines += ["PARTS", *cut([*parts(folder), *dropped(folder, ours=False)], PARTS), ""]
    if points:
        lines += [
            "RATIOS: nn.Linear's device time over the arm's, by batch size; above 1 is faster"
        ]
        lines += [*cut(ratios(points), RATIOS), "", "WORST TEN POINTS", *worst(points)]
    else:
        lines += ["RATIOS: no sweep has been measured"]
    page = "\n".join(lines) + "\n"
    return page if len(page) < LIMIT else page[: LIMIT - 20] + "\n... cut here\n"


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])), end="")
