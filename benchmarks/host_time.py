"""Microseconds of host time a call: what Python and PyTorch take besides the kernels.

Run it as `python -m benchmarks.host_time`. A tiny layer is called many times, with `F.linear`,
`nn.Linear`, and fastlinear with each backend. For "triton" the launchers that Triton has compiled
are replaced by a function that does nothing, so that it needs no GPU; what is left is everything
between the user's call and that launcher, the look-up of the compiled kernel included. The input
needs no gradient, as a first layer's.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # launchers take CPU tensors only then; nothing is run

import torch.nn.functional as F
import triton
from torch import Tensor, nn
from tqdm import tqdm

import fastlinear
from benchmarks.shared.environment import environment
from fastlinear.choice import known
from fastlinear.choice.backend import use_tables
from fastlinear.choice.table import Key, Row
from fastlinear.kernels.launching import compiled_launch, launch

ROWS, FEATURES = 4, 16
TABLE = "auto, with a table"  # that sends this layer PyTorch's way
MODES = ("no grad", "grad", "forward + backward")
COLUMNS = ("call", "backend", *MODES)


def microseconds(function: Callable[[], object], calls: int) -> float:
    """The time of one call, as the mean of `calls` in a row."""
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return 1e6 * (time.perf_counter() - started) / calls


def cases(device: torch.device) -> list[tuple[str, str, Callable[[Tensor], Tensor]]]:
    """(what is called, backend, a function of the input)."""
    theirs = nn.Linear(FEATURES, FEATURES, device=device)
    ours = fastlinear.Linear(FEATURES, FEATURES, device=device)
    weight, bias = theirs.weight, theirs.bias
    functions: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        ("F.linear", "", lambda input: F.linear(input, weight, bias)),
        ("nn.Linear", "", theirs),
    ]
    for backend in ("auto", TABLE, "torch", "triton"):
        functions += [
            ("fastlinear.linear", backend, lambda input: fastlinear.linear(input, weight, bias)),
            ("fastlinear.Linear", backend, ours),
        ]
    return functions


@contextmanager
def setting(backend: str, device: torch.device) -> Iterator[None]:
    """Within it, the backend, and a table that knows another layer, if that is wanted."""
    if backend == TABLE:
        key = Key("output", "float32", "ieee", None, True, "", 768, 768, 64)
        use_tables({device: (Row(*key, "onednn", 1.0, 2.0, 1.0, 2.0),)})
    try:
        with fastlinear.use_backend("auto" if backend in ("", TABLE) else backend):
            yield
    finally:
        if backend == TABLE:
            use_tables()
            known.seen = False  # for the others to be as in a process that has had none


def measure(rounds: int, calls: int) -> list[dict[str, Any]]:
    """Medians and minima over `rounds`, in which all cases take turns.

    Taking turns puts whatever else the machine does on every case alike.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    input = torch.randn(ROWS, FEATURES, device=device)
    grad_output = torch.randn(ROWS, FEATURES, device=device)
    functions = cases(device)
    times: dict[tuple[int, str], list[float]] = {}
    for count in tqdm(range(rounds + 1), unit="round", leave=False):
        for index, (_, backend, function) in enumerate(functions):
            runs: dict[str, Callable[[], object]] = {
                "no grad": lambda function=function: function(input),
                "grad": lambda function=function: function(input),
                "forward + backward": lambda function=function: function(input).backward(
                    grad_output
                ),
            }
            with setting(backend, device):
                for mode, run in runs.items():
                    with torch.set_grad_enabled(mode != "no grad"):
                        spent = microseconds(run, calls)
                    if count:  # the first round warms up
                        times.setdefault((index, mode), []).append(spent)
    return [
        {
            "call": call,
            "backend": backend,
            **{mode: round(statistics.median(times[index, mode]), 2) for mode in MODES},
            "fastest": {mode: round(min(times[index, mode]), 2) for mode in MODES},
        }
        for index, (call, backend, _) in enumerate(functions)
    ]


@contextmanager
def without_launches() -> Iterator[None]:
    """Within it, Triton hands out compiled kernels that do nothing, and compiles none.

    It is for shapes that nothing in the process has launched before.
    """
    launches: list[launch.Launch] = []

    def by_triton(kernel: Any, launched: launch.Launch, pointers: Any) -> Any:
        launches.append(launched)
        return SimpleNamespace(run=lambda *arguments: None, function=0, packed_metadata=())

    direct, run_by_triton = compiled_launch.DIRECT, compiled_launch._run_by_triton
    compiled_launch.DIRECT, compiled_launch._run_by_triton = True, by_triton
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(SimpleNamespace(get_current_stream=id))
    try:
        yield
    finally:
        compiled_launch.DIRECT, compiled_launch._run_by_triton = direct, run_by_triton
        if not torch.cuda.is_available():
            triton.runtime.driver.set_active(None)
        for launched in launches:
            launched.compiled.clear()


def measure_without_launches(rounds: int, calls: int) -> list[dict[str, Any]]:
    """`measure`, with everything done but the launches, in one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with without_launches():
        return measure(rounds, calls)


def table(rows: list[dict[str, Any]]) -> str:
    """`rows` as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [
        tuple(str(row[column]) if row[column] != "" else "-" for column in COLUMNS) for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {text}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--read", type=Path, help="print such a file instead of measuring")
    parser.add_argument(
        "--rounds", type=_positive, default=21, help="rounds of all cases (default 21)"
    )
    parser.add_argument(
        "--calls", type=_positive, default=2000, help="calls a round (default 2000)"
    )
    arguments = parser.parse_args()

    result = json.loads(arguments.read.read_text()) if arguments.read else None
    if result is None:
        rows = measure_without_launches(arguments.rounds, arguments.calls)
        result = {
            "date": date.today().isoformat(),
            "environment": environment(),
            "shape": f"input {ROWS} x {FEATURES}, {FEATURES} outputs",
            "rows": rows,
        }
    print(f"Microseconds a call, median; {result['shape']}.")
    found = result["environment"]
    print(f"{found['device']}, torch {found['torch']}, {result['date']}.\n")
    print(table(result["rows"]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
