"""Draws the README's tables and pictures from the JSON files they come from.

`python -m benchmarks.report` reads every `linear*.json` in the folders of benchmarks/results, which
the sweep wrote, writes pictures beside it, and the part of README.md between its two markers; and
the table of float32's errors from accuracy.json, between two of its own. `--check` writes
nothing, and exits with 1 where that would change a file. The same files give the same bytes, with
the same matplotlib on the same processor; of pictures it therefore compares what they say that
they were drawn from.
"""

import argparse
import hashlib
import io
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import accuracy
from benchmarks.shared.shapes import LAYERS
from benchmarks.speed.arms import NATIVE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SWEEP, ACCURACY = "benchmarks.report", "benchmarks.accuracy"  # which parts of README.md

# Colours of Okabe and Ito, which all eyes tell apart. There are fewer of them than of layers:
# marker and dashes tell the second and third use of a colour from the first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osv^D<xP*", ("-", "--", ":")

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    chosen = parser.parse_args()
    different = [path for path, content in files().items() if not is_current(path, content)]
    if chosen.check:
        for path in different:
            print(f"{path.relative_to(ROOT)} is not what benchmarks/results give")
        if different:
            print("`python -m benchmarks.report` draws them again")
        return int(bool(different))
    for path, content in files().items():
        path.write_bytes(content)
    print(f"{len(different)} files changed")
    return 0


def is_current(path: Path, content: bytes) -> bool:
    """Whether the file at `path` is what was drawn anew as `content`."""
    if not path.exists():
        return False
    if path.suffix != ".png":
        return path.read_bytes() == content
    return _source(path) == _source(io.BytesIO(content))


def _source(picture: Any) -> str | None:
    from PIL import Image

    with Image.open(picture) as image:
        return image.info.get("Source")


def files() -> dict[Path, bytes]:
    """Every file that the report writes, with its content."""
    written: dict[Path, bytes] = {}
    sections = []
    for path in sorted(RESULTS.glob("*/linear*.json")):
        text = path.read_bytes()
        every = json.loads(text)
        # What a picture is drawn from: the results, and this code.
        drawn_from = hashlib.sha256(text + Path(__file__).read_bytes()).hexdigest()
        for results in split(every):
            arithmetic = f"-{results['dtype']}-{results['precision']}" if "sweeps" in every else ""
            pictures = {
                path.with_name(f"{path.stem}{arithmetic}-{name}.png"): draw(results, drawn_from)
                for name, draw in DRAWINGS.items()
            }
            written |= pictures
            sections.append(section(results, list(pictures)))
    readme = ROOT / "README.md"
    errors = accuracy.table(json.loads((RESULTS / "accuracy.json").read_text()))
    text = put(readme.read_text(), SWEEP, "\n".join(sections))
    written[readme] = put(text, ACCURACY, "\n".join([*errors, ""])).encode()
    return written


def put(text: str, part: str, body: str) -> str:
    """`text` with `body` between the part's two markers."""
    first, last = f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->\n"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"README.md has not the two lines {first.strip()} and {last.strip()}")
    return f"{before}{first}\n{body}\n{last}{after}"


def split(every: dict[str, Any]) -> list[dict[str, Any]]:
    """The sweeps that a file holds, those of one arithmetic together; without what has no points.

    `benchmarks.linear` writes one, `benchmarks.gpu` puts several into a file.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in every.get("sweeps", [every]):
        if "ceilings" not in one:  # it was stopped before it measured anything
            continue
        key = (one["dtype"], one["precision"])
        rows = [r for r in every["points"] if (r["dtype"], r["precision"]) == key]
        results = found.setdefault(key, one | {"arms": [], "points": rows})
        results["arms"] += [arm for arm in one["arms"] if arm not in results["arms"]]
    return [one for one in found.values() if one["points"] and _ours(one)]


def caption(results: dict[str, Any]) -> str:
    env = results["environment"]
    precision = f" at {results['precision']!r}" if results["dtype"] == "float32" else ""
    threads = "" if env.get("cuda") and env.get("driver") else f", {env['threads']} threads"
    return (
        f"{env['device']}{threads}, {results['dtype']}{precision}, {results['date']}, "
        f"torch {env['torch']}, triton {env['triton']}, commit {(env['commit'] or '?')[:7]}"
    )


def device_times(results: dict[str, Any]) -> bool:
    return any(row["device_us"] is not None for row in results["points"])


def section(results: dict[str, Any], pictures: list[Path]) -> str:
    """A heading, what was measured on what, ratios by layer and batch size, the pictures."""
    which = "device" if device_times(results) else "wall"
    high = " at 'high'" if results["precision"] == "high" else ""
    lines = [f"### {results['environment']['device']}, {results['dtype']}{high}", ""]
    lines += [
        f"{caption(results)}. Ratios of {which} times; above 1 is faster than `nn.Linear`.",
        "",
    ]
    lines += summary(results)
    for arm in _ours(results):
        lines += ["", *ratio_table(results, arm)]
    lines.append("")
    for path in pictures:
        name = path.stem.rpartition("-")[2]
        title = {
            "ratio": "Ratio to nn.Linear against batch size",
            "roofline": "Operations a second against operations a byte, under the two ceilings",
            "cost": "Time and memory a datapoint against batch size",
        }[name]
        lines += [f"![{title}]({path.relative_to(ROOT)})", ""]
    return "\n".join(lines)


def _ours(results: dict[str, Any]) -> list[str]:
    return [arm for arm in results["arms"] if arm.startswith("fastlinear")]


def _mean(ratios: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def summary(results: dict[str, Any]) -> list[str]:
    """Each arm's geometric mean by mode."""
    modes = list(dict.fromkeys(row["mode"] for row in results["points"]))
    lines = ["| geometric mean of ratios | " + " | ".join(modes) + " | lowest |"]
    lines.append("|---|" + "---:|" * (len(modes) + 1))
    for arm in results["arms"]:
        mine = [row for row in results["points"] if row["arm"] == arm]
        if arm == NATIVE or not mine:
            continue
        cells = []
        for mode in modes:
            ratios = [row["ratio"] for row in mine if row["mode"] == mode]
            cells.append(f"{_mean(ratios):.3f}" if ratios else "-")
        cells.append(f"{min(row['ratio'] for row in mine):.2f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def ratio_table(results: dict[str, Any], arm: str) -> list[str]:
    """Forward + backward without activation, by layer and batch size."""
    rows = [
        row
        for row in results["points"]
        if row["arm"] == arm and row["mode"] == "forward+backward" and row["activation"] is None
    ]
    sizes = sorted({row["batch_size"] for row in rows})
    shapes = [name for name in LAYERS if any(row["shape"] == name for row in rows)]
    lines = [f"| {arm}, forward + backward | " + " | ".join(map(str, sizes)) + " |"]
    lines.append("|---|" + "---:|" * len(sizes))
    ratios = {(row["shape"], row["batch_size"]): row["ratio"] for row in rows}
    for shape in shapes:
        cells = [ratios.get((shape, size)) for size in sizes]
        texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in cells]
        lines.append(f"| {shape} | " + " | ".join(texts) + " |")
    return lines


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "ls": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def _lines(rows: list[Row]) -> list[tuple[str, dict[str, Any], list[Row]]]:
    """(layer, look, its rows by batch size), in the order of the layers."""
    return [
        (name, _look(index), mine)
        for index, name in enumerate(LAYERS)
        if (mine := sorted((r for r in rows if r["shape"] == name), key=lambda r: r["batch_size"]))
    ]


def _batch_axis(panel: Any, rows: list[Row]) -> None:
    ticks = sorted({row["batch_size"] for row in rows})
    panel.set(xscale="log", xlabel="batch size")
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks], rotation=60, fontsize=7)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _png(figure: Any, results: dict[str, Any], drawn_from: str) -> bytes:
    figure.supxlabel(caption(results), fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png", metadata={"Software": None, "Source": drawn_from})
    return buffer.getvalue()


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_ratios(results: dict[str, Any], drawn_from: str) -> bytes:
    """nn.Linear's time by fastlinear's against batch size, forward and forward + backward."""
    arm = _ours(results)[-1]
    modes = ("forward", "forward+backward")
    figure, panels = _figure(len(modes))
    for panel, mode in zip(panels, modes, strict=True):
        rows = [
            row
            for row in results["points"]
            if (row["arm"], row["mode"], row["activation"]) == (arm, mode, None)
        ]
        panel.axhline(1.0, color="black", linewidth=1)
        for name, look, mine in _lines(rows):
            sizes = [row["batch_size"] for row in mine]
            panel.plot(sizes, [row["ratio"] for row in mine], label=name, **look)
        _batch_axis(panel, rows)
        panel.set(title=f"{arm}: {mode}", ylabel="times as fast as nn.Linear")
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, 0.8), max(high, 1.2))
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize=7)
    return _png(figure, results, drawn_from)


def draw_roofline(results: dict[str, Any], drawn_from: str) -> bytes:
    """Operations a second against operations a byte, under the ceilings of the same run."""
    roof = results["ceilings"]
    figure, (panel,) = _figure(1)
    rows = [row for row in results["points"] if row["mode"] == "forward"]
    arms = [NATIVE, *_ours(results)]
    for index, arm in enumerate(arms):
        mine = [row for row in rows if row["arm"] == arm]
        look = _look(index) | {"ls": "", "alpha": 0.7}
        panel.plot(
            [row["operations"] / row["bytes"] for row in mine],
            [row["tflops"] for row in mine],
            label=arm,
            **look,
        )
    intensities = [row["operations"] / row["bytes"] for row in rows]
    knee = roof["operations_per_second"] / roof["bytes_per_second"]
    ends = [min([*intensities, knee]) / 1.5, knee, max([*intensities, knee]) * 1.5]
    peak = roof["operations_per_second"] / 1e12
    panel.plot(ends, [ends[0] * roof["bytes_per_second"] / 1e12, peak, peak], "k-", linewidth=1)
    panel.annotate(
        f"a large copy: {roof['bytes_per_second'] / 1e9:.0f} GB/s",
        (ends[0], ends[0] * roof["bytes_per_second"] / 1e12),
        xytext=(8, -4),
        textcoords="offset points",
        fontsize=8,
    )
    panel.annotate(
        f"a large product: {peak:.3g} TFLOP/s",
        (ends[2], peak),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    panel.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
    panel.set_title("Forward, every layer and batch size")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="lower right")
    return _png(figure, results, drawn_from)


def draw_costs(results: dict[str, Any], drawn_from: str) -> bytes:
    """What a datapoint costs of a training step: time and memory against batch size."""
    arm = _ours(results)[0]
    which = "device_us" if device_times(results) else "wall_us"
    rows = [
        row
        for row in results["points"]
        if (row["arm"], row["mode"], row["activation"]) == (arm, "forward+backward", None)
    ]
    figure, (times, memory) = _figure(2)
    for name, look, mine in _lines(rows):
        sizes = [row["batch_size"] for row in mine]
        times.plot(sizes, [row[which] / row["batch_size"] for row in mine], label=name, **look)
        bytes_each = [row["peak_bytes"] / 1024 / row["batch_size"] for row in mine]
        memory.plot(sizes, bytes_each, label=name, **look)
    times.set_title(f"{arm}: time a datapoint (µs)")
    memory.set_title("memory a datapoint (KiB)")
    for panel in (times, memory):
        panel.set_yscale("log")
        _batch_axis(panel, rows)
        panel.yaxis.set_major_formatter("{x:g}")
    handles = times.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize=7)
    return _png(figure, results, drawn_from)


DRAWINGS = {"ratio": draw_ratios, "roofline": draw_roofline, "cost": draw_costs}

if __name__ == "__main__":
    sys.exit(main())
