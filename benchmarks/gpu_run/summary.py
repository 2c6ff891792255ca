"""The page on what `benchmarks.gpu` found in a folder.

`python -m benchmarks.gpu_run.summary FOLDER` prints it. What is wrong comes first, then what is
new: kernels that no GPU had run before. Then ratios by batch size, the worst points, and the
commands that commit it all. It takes what files there are.
"""

import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.shared.files import read_json
from benchmarks.shared.names import NATIVE, not_a_peer
from benchmarks.shared.setting import SETTING

LIMIT = 12_000  # characters of the page
FAILURES, NEW, PARTS, RATIOS = 2_800, 1_600, 1_300, 3_600  # of these sections
TRUSTED = ("right", "not here")  # verdicts on families; the latter have nothing to launch
# What goes into the repository, besides the tuner's table.
RESULTS = ("families.json", "numerics.json", "kernels.json", "linear.json", "run.json")
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


def left_out(folder: Path) -> list[str]:
    """The launches of families that are not known to be right; of one that hangs, the last."""
    names: set[str] = set()
    for row in read_json(folder / "families.json").get("rows", []):
        if row["verdict"] not in TRUSTED:
            cut = row["verdict"] in ("hangs", "not tried")
            names.update(row["launches"][-1:] if cut else row["launches"])
    return sorted(names)


def new(folder: Path) -> list[str]:
    """Kernels that no GPU had run before, by what became of them, a verdict a line."""
    by_verdict: dict[str, list[str]] = {}
    for row in read_json(folder / "families.json").get("rows", []):
        if row["new"]:
            by_verdict.setdefault(row["verdict"], []).append(row["family"])
    return [f"{verdict}: {', '.join(names)}" for verdict, names in sorted(by_verdict.items())]


def failures(folder: Path) -> list[str]:
    """What is wrong, a line each: what parts found first, then parts that did not end well."""
    runs, tried = read_json(folder / "run.json"), read_json(folder / "families.json")
    lines = [
        f"{row['family']}: {row['verdict']}: {row['said']}"[:300]
        for row in tried.get("rows", [])
        if row["verdict"] not in (*TRUSTED, "not tried")
    ]
    if rest := [row["family"] for row in tried.get("rows", []) if row["verdict"] == "not tried"]:
        lines.append(f"not tried: {', '.join(rest)}"[:600])
    if names := left_out(folder):
        lines.append(f"left out since: {'; '.join(names)}")
    for row in read_json(folder / "kernels.json").get("rows", []):
        for config, why in row.get("failed", {}).items():
            lines.append(
                f"times: {row['product']}, {row['dtype']}, M = {row['m']}, {config}: {why}"[:300]
            )
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
        if point["arm"] != NATIVE:
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


def timed(folder: Path) -> list[Point]:
    """The chosen configurations of benchmarks.kernels' file, as points of a sweep."""
    found = []
    for row in read_json(folder / "kernels.json").get("rows", []):
        ours, native = row["kernel_us"].get(row["chosen"]), row["native_us"]
        if ours:
            found.append(
                {
                    "arm": "fastlinear kernel",
                    "shape": f"{row['n']} x {row['k']}",
                    "batch_size": row["m"],
                    "dtype": row["dtype"],
                    "mode": row["product"],
                    "device_us": statistics.median(ours),
                    "ratio": statistics.median(native) / statistics.median(ours),
                    "ratio_low": min(native) / max(ours),
                    "ratio_high": max(native) / min(ours),
                }
            )
    return found


def commands(folder: Path) -> list[str]:
    """What puts the results into the repository, and commits them."""
    table, device = None, None
    names = [name for name in RESULTS if (folder / name).exists()]
    for path in sorted(folder.glob("*.json")):
        found = read_json(path)
        device = device or found.get("environment", {}).get("device")
        if "fastlinear" in found:
            table = path.name
    if device is None:
        return ["nothing is to be committed"]
    target = f"benchmarks/results/{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}"
    lines = [f"mkdir -p {target}", f"cp {' '.join(str(folder / name) for name in names)} {target}"]
    added = [f"{target}/{name}" for name in names]
    if table:
        lines += ["mkdir -p kernels/tuned", f"cp {folder / table} kernels/tuned/{table}"]
        added.append(f"kernels/tuned/{table}")
    return [*lines, f"git add {' '.join(added)}", f"git commit -m 'Add results of {device}'"]


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
    files = [read_json(folder / name) for name in RESULTS]
    environment = next((found["environment"] for found in files if found.get("environment")), {})
    kinds = ("device", "driver", "torch", "triton", "python", "commit")
    known = (f"{kind} {environment[kind]}" for kind in kinds if environment.get(kind))
    failed = failures(folder)
    points = [
        point for point in read_json(folder / "linear.json").get("points", []) if point.get("ratio")
    ]
    points += timed(folder)
    lines = [
        f"{SETTING.title} on {', '.join(known) or 'a machine that is not known yet'}"[:300],
        "",
    ]
    lines += [f"FAILURES: {len(failed) or 'none'}", *cut(failed, FAILURES), ""]
    lines += ["NEW: kernels that no GPU had run before", *cut(new(folder), NEW), ""]
    if points:
        lines += [
            "RATIOS: nn.Linear's device time over the arm's, by batch size; above 1 is faster"
        ]
        lines += [*cut(ratios(points), RATIOS), "", "WORST TEN POINTS", *worst(points), ""]
    else:
        lines += ["RATIOS: nothing has been measured", ""]
    lines += ["TO COMMIT IT", *commands(folder), ""]
    lines += ["PARTS", *cut([*parts(folder), *dropped(folder, ours=False)], PARTS)]
    page = "\n".join(lines) + "\n"
    return page if len(page) < LIMIT else page[: LIMIT - 20] + "\n... cut here\n"


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])), end="")
