"""The time of every product in every legal configuration, beside cuBLAS's, on the GPU at hand.

`python -m benchmarks.kernels --out FOLDER` writes FOLDER/kernels.json as it goes, so that an
interrupted run keeps what it has measured, and prints a summary. Times are device times (CUDA
events, median), in microseconds. Whether results are right says `benchmarks.numerics`.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.files import write_json
from fastlinear.kernels import launch
from fastlinear.kernels.backward import linear_backward, linear_backward_input, plan_backward
from fastlinear.kernels.backward_weight import linear_backward_weight, plan_backward_weight
from fastlinear.kernels.choose import candidates
from fastlinear.kernels.configs import BackwardConfig, Config, Traits
from fastlinear.kernels.forward import linear_forward, plan_forward
from fastlinear.kernels.pairs import legal_pairs
from fastlinear.stopwatch import Flush

ARITHMETICS = [
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "bf16x6"),
    (torch.float32, "tf32"),
    (torch.float64, "ieee"),
]
LAYERS = [(3072, 768), (4096, 4096), (14336, 4096), (1024, 8192)]  # (N, K)
ROUNDS = 3
ROWS = [1, 16, 64, 256, 1024, 4096, 16384]


def products(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> dict[str, Callable[[], Any]]:
    """What PyTorch runs for each product of the layer; grad_weight comes with grad_bias.

    "backward" is both of them.
    """
    return {
        "output": lambda: F.linear(x, w, b),
        "grad_input": lambda: g @ w,
        "grad_weight": lambda: (g.mT @ x, g.sum(0)),
        "backward": lambda: (g @ w, g.mT @ x, g.sum(0)),
    }


def kernel_call(
    product: str, x: Tensor, w: Tensor, b: Tensor, g: Tensor, precision: str, config: Any
) -> Callable[[], Any]:
    def backward() -> Any:
        if config is not None:
            return linear_backward(g, x, w, True, precision=precision, config=config)
        of_weight = linear_backward_weight(g, x, True, precision=precision)
        return linear_backward_input(g, w, precision=precision), *of_weight

    return {
        "backward": backward,
        "output": lambda: linear_forward(x, w, b, precision=precision, config=config),
        "grad_input": lambda: linear_backward_input(g, w, precision=precision, config=config),
        "grad_weight": lambda: linear_backward_weight(
            g, x, True, precision=precision, config=config
        ),
    }[product]


Chosen = Config | BackwardConfig | None  # None: a launch for each product of "backward"


def configs(
    product: str, x: Tensor, w: Tensor, b: Tensor, g: Tensor, precision: str
) -> tuple[Chosen, list[Chosen]]:
    """The configuration that is chosen, and all that it is chosen among."""
    if product == "backward":
        return pairs(x, w, g, precision)
    if product == "grad_weight":
        plan = plan_backward_weight(launch.describe(g, x), True, False, precision, None, None)
        operands, sizes = (g, x), (*g.shape, x.shape[1])
    else:
        operands = (x, w) if product == "output" else (g, w.mT)
        bias = b if product == "output" else None
        plan = plan_forward(launch.describe(*operands, bias), precision, None, False, None)
        sizes = (operands[0].shape[0], *operands[1].shape)
    described = [launch.Operand(*fields) for fields in launch.describe(*operands)[:2]]
    found = candidates(
        "backward_weight" if product == "grad_weight" else "forward",
        1,
        *sizes,
        Traits(
            x.dtype,
            precision,
            aligned=launch.aligned(*described),
            target=launch.target_of(x.device),
            descriptors=launch.describable(launch.rows_of(described[0]), described[1]),
        ),
        reads_outputs=product == "grad_input",
    )
    return plan.config, found


def pairs(x: Tensor, w: Tensor, g: Tensor, precision: str) -> tuple[Chosen, list[Chosen]]:
    """The same for both gradients, which may take one launch."""
    operands = launch.describe(g, w, x)
    chosen = plan_backward(operands, None, True, False, precision, None, None).config
    aligned = launch.aligned(*(launch.Operand(*fields) for fields in operands))
    legal = legal_pairs(Traits(x.dtype, precision, aligned, launch.target_of(x.device)))
    return chosen, [None, *legal]


def set_tf32(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


class Timer:
    """Median device time of a call in microseconds, with the L2 cache flushed before each."""

    def __init__(self) -> None:
        # By an H100's data sheet that takes a third of a millisecond, in which the host launches
        # what is timed.
        self.flush = Flush(torch.device("cuda"), 2**30)

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        times = self.times(call, 3)
        if max(times) < 5:
            times = self.times(call, 15)
        return 1000 * statistics.median(times)

    def times(self, call: Callable[[], Any], repeats: int) -> list[float]:
        pairs = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def measure(
    record: Callable[[dict[str, Any]], None],
    dtypes: list[str],
    deadline: float,
    timer: Callable[[Callable[[], Any]], float],
    device: str = "cuda",
) -> None:
    for dtype, precision in ARITHMETICS:
        name = str(dtype)[6:] if precision == "ieee" else precision
        if name not in dtypes:
            continue
        set_tf32(precision)
        for (n, k), m in itertools.product(LAYERS, ROWS):
            x, w, b, g = (
                torch.randn(shape, device=device).to(dtype)
                for shape in ((m, k), (n, k), (n,), (m, n))
            )
            for product, native in products(x, w, b, g).items():
                if time.monotonic() > deadline:
                    print("out of time: the rest is not measured")
                    return
                chosen, legal = configs(product, x, w, b, g, precision)
                row: dict[str, Any] = {
                    "part": "time",
                    "product": product,
                    "dtype": name,
                    "m": m,
                    "n": n,
                    "k": k,
                    "chosen": str(chosen),
                }
                calls = {
                    str(config): kernel_call(product, x, w, b, g, precision, config)
                    for config in legal
                }
                row["native_us"], row["kernel_us"] = [], {name: [] for name in calls}
                for _ in range(ROUNDS):  # in turn, so that a slow moment of the machine is outvoted
                    row["native_us"].append(timer(native))
                    for config, call in calls.items():
                        row["kernel_us"][config].append(timer(call))
                record(row)
            print(f"timed: {name}, M = {m}, N = {n}, K = {k}", flush=True)


def table(results: dict[str, Any]) -> str:
    """PyTorch's time over the chosen tile's, as Markdown: above 1, the kernel is faster."""
    timed = [row for row in results["rows"] if row["part"] == "time"]
    ratios: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in timed:
        key = (row["dtype"], row["product"], row["n"], row["k"])
        chosen_us = statistics.median(row["kernel_us"][row["chosen"]])
        ratio = statistics.median(row["native_us"]) / chosen_us
        ratios.setdefault(key, {})[row["m"]] = f"{ratio:.2f}"
    environment = results["environment"]
    lines = [
        f"{environment['device']}, driver {environment['driver']}, torch {environment['torch']}, "
        f"Triton {environment['triton']}, {results['date'][:10]}.",
        "",
        "| dtype | product | N x K | " + " | ".join(f"M = {m}" for m in ROWS) + " |",
        "|---|---|---|" + "---|" * len(ROWS),
    ]
    for (dtype, product, n, k), by_rows in ratios.items():
        cells = " | ".join(by_rows.get(m, "") for m in ROWS)
        lines.append(f"| {dtype} | {product} | {n} x {k} | {cells} |")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """How close the choice comes to the best tile."""
    timed = [row for row in results["rows"] if row["part"] == "time"]
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
    if not torch.cuda.is_available():
        sys.exit("no GPU found: benchmarks.kernels measures kernels on one")
    torch.manual_seed(0)
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": environment(),
        "date": datetime.now(timezone.utc).isoformat(),
        "rows": [],
    }
    written = time.monotonic()

    def record(row: dict[str, Any]) -> None:
        nonlocal written
        results["rows"].append(row)
        if time.monotonic() - written > 5:
            save()
            written = time.monotonic()

    def save() -> None:
        write_json(arguments.out / "kernels.json", results)

    print(json.dumps(results["environment"]), f"triton {triton.__version__}", flush=True)
    try:
        measure(record, arguments.dtypes, deadline, Timer())
    finally:
        save()
    print(table(results), summary(results), sep="\n\n")


if __name__ == "__main__":
    main()
