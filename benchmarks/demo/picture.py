"""The demo's picture: loss by epoch, time and memory by batch size."""

from pathlib import Path
from typing import Any

from benchmarks.demo.side_by_side import FAST, NATIVE, epoch_seconds, of_layer


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss by epoch, time per datapoint and memory per step by batch size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    rows = [row for row in results["rows"] if row["epoch_seconds"]]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, times, memory = figure.subplots(1, 3)

    # Viridis is told apart by all eyes, and in grey.
    fast = of_layer(rows, FAST)
    for index, row in enumerate(fast):
        shade = colormaps["viridis"](0.3 + 0.65 * index / len(fast))
        curves.plot(row["losses"], color=shade, linewidth=4, label="" if index else FAST)
        end = (len(row["losses"]) - 1, row["losses"][-1])
        offset = {"xytext": (5, -3), "textcoords": "offset points"}
        curves.annotate(str(row["batch_size"]), end, **offset, fontsize=8)
    for index, row in enumerate(of_layer(rows, NATIVE)):
        curves.plot(row["losses"], "k:", linewidth=1, label="" if index else NATIVE)
    curves.set(title="Loss, by batch size", xlabel="epoch")
    curves.margins(x=0.22)
    curves.legend(fontsize=8, loc="lower left")

    # Blue and vermilion of Okabe and Ito, and a marker and a line of its own for each.
    looks = {"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "x", "ls": "--"}
    for layer, look in zip((FAST, NATIVE), looks, strict=True):
        mine = of_layer(rows, layer)
        batch_sizes = [row["batch_size"] for row in mine]
        microseconds = [1e6 * epoch_seconds(row) / results["datapoints"] for row in mine]
        kibibytes = [row["step_memory_bytes"] / 1024 for row in mine]
        times.plot(batch_sizes, microseconds, label=layer, **look)
        memory.plot(batch_sizes, kibibytes, label=layer, **look)
    times.set(title="Time per datapoint (µs)")
    memory.set(title="Memory per step (KiB)")
    ticks = sorted({row["batch_size"] for row in rows})
    for panel in (times, memory):
        panel.set(xscale="log", xlabel="batch size")
        panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.legend(fontsize=8)

    for panel in (curves, times, memory):
        panel.set(yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
        panel.grid(alpha=0.3)
    figure.supxlabel(caption(results), fontsize=8)
    figure.savefig(path, dpi=200)


def caption(results: dict[str, Any]) -> str:
    machine = results["environment"]
    kernels = ", kernels in Triton's interpreter" if results["interpreted"] else ""
    return (
        f"{machine['device']}{kernels}, backend {results['backend']}, {results['dtype']}, "
        f"torch {machine['torch']}, {results['date'][:10]}"
    )
