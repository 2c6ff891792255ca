"""What the model of times predicts for an H100, beside what was measured there.

`python -m benchmarks.predict` prints three comparisons and writes them to
benchmarks/results/predictions.json: training in bfloat16 against cuBLAS, small batches against the
memory's peak, and float32 at "highest" against nn.Linear, also by products of pieces. A prediction
is the model's (kernels/configs/model.py), for the configurations that are chosen now; it is no
measurement, and says so. What is measured comes from the results of `benchmarks.kernels`; a kernel
that is not in them counts as not measured.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.files import read_json, write_json
from fastlinear.kernels.configs.choose import Choice, ranked
from fastlinear.kernels.configs.choose_pair import choose_backward, ranked_pairs, time_apart
from fastlinear.kernels.configs.config import TARGETS, BackwardConfig, Config, Kernel, Traits

RESULTS = Path(__file__).with_name("results")
MEASURED = RESULTS / "nvidia-h100-80gb-hbm3" / "kernels.json"
TARGET = TARGETS["sm_90"]
SIDE = 4096
FEW_ROWS = (1, 2, 4, 8, 16)
PRODUCTS = ("output", "grad_input", "grad_weight")


def predicted(product: str, m: int, n: int, k: int, dtype: torch.dtype, precision: str) -> Choice:
    """What is chosen for a product of a contiguous layer, and the microseconds it should take."""
    kernel: Kernel = "backward_weight" if product == "grad_weight" else "forward"
    sizes = (m, k, n) if product == "grad_input" else (m, n, k)
    traits = Traits(dtype, precision, True, TARGET, descriptors=product != "grad_weight")
    return ranked(kernel, 1, *sizes, traits, reads_outputs=product == "grad_input")[0]


class Measured:
    """The times of benchmarks.kernels' file, by product, dtype and sizes."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {
            tuple(row[name] for name in ("product", "dtype", "m", "n", "k")): row
            for row in read_json(path).get("rows", [])
            if row.get("part") == "time"
        }

    def cublas(self, product: str, dtype: str, m: int, n: int, k: int) -> float | None:
        row = self.rows.get((product, dtype, m, n, k))
        return None if row is None else statistics.median(row["native_us"])

    def kernel(self, product: str, dtype: str, m: int, n: int, k: int, config: Config) -> Any:
        """Microseconds of this very configuration, or None."""
        row = self.rows.get((product, dtype, m, n, k))
        for text, times in () if row is None else row["kernel_us"].items():
            if _parsed(text) == config:
                return statistics.median(times)
        return None

    def pair(self, dtype: str, m: int, n: int, k: int, pair: BackwardConfig) -> Any:
        """The same of both gradients in one launch."""
        row = self.rows.get(("backward", dtype, m, n, k), {"kernel_us": {}})
        times = row["kernel_us"].get(str(pair))
        return None if times is None else statistics.median(times)


def _parsed(text: str) -> Config | None:
    """The configuration whose repr this is; None for one with fields that are none today."""
    values = {
        name: json.loads(value.lower().replace("'", '"'))
        for name, value in re.findall(r"(\w+)=([^,)]+)", text)
    }
    try:
        return Config(**values)
    except TypeError:
        return None


def _ratio(over: list[float | None], under: list[float | None]) -> float | None:
    """The sum of some times over that of others; None where one is missing."""
    if None in over or None in under:
        return None
    return round(sum(t for t in over if t) / sum(t for t in under if t), 3)


def of_cublas(measured: Measured, dtype: str, precision: str, name: str) -> dict[str, Any]:
    """The speed of forward and backward of a square layer, over cuBLAS's.

    Backward is one launch or two, as is chosen.
    """
    sizes = (SIDE, SIDE, SIDE)
    choices = {one: predicted(one, *sizes, getattr(torch, dtype), precision) for one in PRODUCTS}
    traits = Traits(getattr(torch, dtype), precision, True, TARGET, descriptors=True)
    configurations: dict[str, Any] = {one: choice.config for one, choice in choices.items()}
    times: list[float | None] = [choices["output"].microseconds]
    named = dtype if precision == "ieee" else precision  # as benchmarks.kernels has it
    ours = [measured.kernel(one, named, *sizes, choice.config) for one, choice in choices.items()]
    pair = choose_backward(1, *sizes, traits)
    if pair is None:
        times.append(time_apart(1, *sizes, traits))
    else:
        times.append(ranked_pairs(1, *sizes, traits)[0][1])
        configurations = {"output": choices["output"].config, "backward": pair}
        ours = [ours[0], measured.pair(named, *sizes, pair)]
    cublas = [measured.cublas(one, dtype, *sizes) for one in PRODUCTS]
    return {
        "what": name,
        "predicted": _ratio(cublas, times),
        "measured": _ratio(cublas, ours),
        "configurations": {one: str(config) for one, config in configurations.items()},
    }


def of_memory(measured: Measured, m: int) -> dict[str, Any]:
    """The share of the memory's peak at which the forward pass of a few rows moves its operands."""
    choice = predicted("output", m, SIDE, SIDE, torch.bfloat16, "ieee")
    least = 2 * (2 * m * SIDE + SIDE * SIDE) / (1000 * TARGET.memory_bandwidth)
    kernel = measured.kernel("output", "bfloat16", m, SIDE, SIDE, choice.config)
    return {
        "what": f"bfloat16 forward of {m} rows, share of the memory's peak",
        "predicted": round(least / choice.microseconds, 3),
        "measured": None if kernel is None else round(least / kernel, 3),
        "configurations": {"output": str(choice.config)},
    }


def predictions(measured: Measured) -> list[dict[str, Any]]:
    """Each with its target."""
    square = f"forward + backward, M = N = K = {SIDE}, speed over"
    training = of_cublas(measured, "bfloat16", "ieee", f"bfloat16 {square} cuBLAS")
    exact = of_cublas(measured, "float32", "ieee", f'float32 "highest" {square} nn.Linear')
    pieces = of_cublas(measured, "float32", "bf16x6", f'float32 by "bf16x6" {square} nn.Linear')
    small = [of_memory(measured, m) for m in FEW_ROWS]
    return [
        training | {"target": 0.97},
        *(one | {"target": 0.85} for one in small),
        exact | {"target": 2.0},
        pieces | {"target": 2.0},
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """`rows` as a Markdown table."""
    lines = ["| | target | predicted | measured |", "|---|---|---|---|"]
    for row in rows:
        shown = [
            "not measured" if row[one] is None else row[one] for one in ("predicted", "measured")
        ]
        lines.append(f"| {row['what']} | {row['target']} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", type=Path, default=MEASURED, help="benchmarks.kernels' file")
    parser.add_argument("--json", type=Path, default=RESULTS / "predictions.json")
    arguments = parser.parse_args()
    rows = predictions(Measured(arguments.measured))
    print(table(rows))
    write_json(arguments.json, {"target": "sm_90", "rows": rows})


if __name__ == "__main__":
    main()
