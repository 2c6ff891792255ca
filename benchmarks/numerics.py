"""Every kernel, legal configuration and dtype against float64, on fresh random inputs.

`python -m benchmarks.numerics --json FILE` draws operands of many shapes and layouts, runs each
launcher in each configuration that is legal for them, and compares every result with float64: the
budget is that of `tests/oracle.py`, twice PyTorch's own error and one rounding step. Each call is
repeated and has to give the same bits. Outputs start as NaN between guards. It exits with 1 if
anything is at fault; FILE is written as it goes. Nothing is timed.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anyone imports triton

from torch import Tensor

from benchmarks.cases import ARITHMETICS, FAMILIES, FAR_MEMORY, Group, cases
from benchmarks.environment import environment
from benchmarks.files import write_json
from benchmarks.products import Product, Results, largest_error
from fastlinear.kernels import launch
from fastlinear.kernels.configs import KINDS, BackwardConfig, Config, Traits
from fastlinear.kernels.pairs import legal_pairs
from fastlinear.kernels.tiles import legal_configs

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def poisoned_outputs(small: bool) -> Iterator[None]:
    """Outputs and workspaces start as NaN, between guards that no kernel may write to.

    Small cases are left plain: there compute-sanitizer watches the ends of allocations.
    """
    guard, untouched = 1024, -77.0
    buffers: list[Tensor] = []

    def allocate(like: Tensor, output: launch.Operand) -> Tensor:
        size = math.prod(output.shape)
        buffer = torch.full((size + 2 * guard,), untouched, dtype=output.dtype, device=like.device)
        buffer[guard : guard + size] = float("nan")
        buffers.append(buffer)
        return buffer[guard : guard + size].view(output.shape)

    original = launch.allocate
    launch.allocate = original if small else allocate
    try:
        yield
    finally:
        launch.allocate = original
    for buffer in buffers:
        if not ((buffer[:guard] == untouched).all() and (buffer[-guard:] == untouched).all()):
            raise AssertionError("a kernel wrote beside its output")


def configs(product: Product, group: Group) -> tuple[Config | BackwardConfig, ...]:
    """Every configuration that is legal for the product's operands."""
    if product.kernel is None:
        return ()
    dtype, precision = ARITHMETICS[group.arithmetic]
    target = launch.target_of(torch.device(group.device))
    traits = Traits(dtype, precision, product.aligned, target, product.applies, product.describable)
    if product.kernel == "backward":
        return legal_pairs(traits)
    if product.kernel != "forward":
        return legal_configs(product.kernel, traits)
    shipped = (config for kind in KINDS for config in legal_configs("forward", traits, kind))
    split = (
        dataclasses.replace(config, splits=3)
        for config in legal_configs("forward", traits, "split_k")
    )
    return (*shipped, *split)


def check(group: Group) -> Iterator[dict[str, Any]]:
    """One row for each product, shape, layout and configuration, with its errors and budgets."""
    torch.set_float32_matmul_precision("high" if group.arithmetic == "tf32" else "highest")
    if group.family == "far" and torch.cuda.mem_get_info()[0] < FAR_MEMORY:
        yield {"product": "far", "skipped": "too little memory for operands past 2**31 elements"}
        return
    for case in cases(group):
        for product in case.products:
            exact, native = product.exact(), product.native()
            budgets = product.budgets(native, exact)
            for config in (None, *(configs(product, group) if case.every else ())):
                row: dict[str, Any] = {
                    "product": product.name,
                    "arithmetic": group.arithmetic,
                    "shape": case.shape,
                    "layout": case.layout,
                    "config": str(config or "chosen"),
                    "native_errors": list(map(largest_error, native, exact)),
                    "budgets": budgets,
                }
                try:
                    row |= compare(product, config, exact, native, budgets, group)
                except Exception as error:  # a configuration that does not launch is a finding
                    row["fault"] = f"{type(error).__name__}: {error}"[:400]
                yield row


def compare(
    product: Product,
    config: Config | BackwardConfig | None,
    exact: Results,
    native: Results,
    budgets: list[float],
    group: Group,
) -> dict[str, Any]:
    """Errors of one call, whether it repeats bit for bit, and what is at fault, or None."""
    with poisoned_outputs(group.small):
        results = product.call(config)
    found = [(tuple(one.shape), one.dtype) for one in results]
    if found != [(tuple(one.shape), one.dtype) for one in native]:
        return {"fault": f"results are {found}"}
    errors = list(map(largest_error, results, exact))
    for index, (error, budget) in enumerate(zip(errors, budgets, strict=True)):
        if not error <= budget:  # NaN is not
            fault = f"result {index} is off by {error:.3g}, the budget is {budget:.3g}"
            return {"errors": errors, "fault": fault}
    for repeat in range(1, group.repeats):
        with poisoned_outputs(group.small):
            again = product.call(config)
        if not all(map(torch.equal, results, again)):
            return {"errors": errors, "fault": f"repeat {repeat} gives other bits"}
    return {"errors": errors, "fault": None}


def check_apart(groups: list[Group], jobs: int, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of all groups until `deadline`, `jobs` groups at a time, each in its own process.

    A kernel that faults takes its process with it, and says so in a row.
    """
    waiting: queue.SimpleQueue[Group] = queue.SimpleQueue()
    for group in groups:
        waiting.put(group)
    rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    running: set[subprocess.Popen[str]] = set()

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                check_one(waiting.get_nowait())
        rows.put(None)

    def check_one(group: Group) -> None:
        command = [sys.executable, "-m", "benchmarks.numerics", "--rows", "--device", group.device]
        command += ["--families", group.family, "--arithmetics", group.arithmetic]
        command += ["--repeats", str(group.repeats), *(["--small"] if group.small else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            running.add(process)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    rows.put(json.loads(line))
        running.discard(process)
        if process.returncode:
            fault = f"the process that checks this ended with {process.returncode}"
            rows.put({"product": group.family, "arithmetic": group.arithmetic, "fault": fault})

    try:
        for _ in range(jobs):
            threading.Thread(target=work, daemon=True).start()
        for _ in range(jobs):
            while (
                row := rows.get(timeout=max(0, min(deadline - time.monotonic(), 1e6)))
            ) is not None:
                yield row
    except queue.Empty:
        return  # out of time
    finally:
        while not waiting.empty():
            waiting.get()
        for process in list(running):
            process.kill()


def describe(row: dict[str, Any]) -> str:
    where = (row.get("arithmetic"), row.get("shape"), row.get("layout"), row.get("config"))
    return ", ".join(str(one) for one in (row["product"], *where) if one) + f": {row['fault']}"


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--arithmetics", nargs="+", choices=ARITHMETICS, default=ARITHMETICS)
    parser.add_argument("--repeats", type=int, default=20, help="calls to give the same bits")
    parser.add_argument("--small", action="store_true", help="one small shape, as it is chosen")
    parser.add_argument("--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--rows", action="store_true", help="print each check as a line of JSON")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.small:
        # Without torch's cache the ends of tensors are those of allocations, which are watched.
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    groups = [
        Group(family, arithmetic, arguments.device, arguments.repeats, arguments.small)
        for family in arguments.families
        for arithmetic in arguments.arithmetics
        # One dtype's offsets are every dtype's; and they take a GPU's memory.
        if family != "far" or (gpu and arithmetic == "bfloat16" and not arguments.small)
    ]
    checks = (
        (row for group in groups for row in check(group))
        if arguments.rows or arguments.jobs == 1
        else check_apart(groups, arguments.jobs, deadline)
    )
    results: dict[str, Any] = {"environment": environment(), "complete": False, "rows": []}
    written = -math.inf
    try:
        for row in checks:
            results["rows"].append(row)
            if arguments.rows:
                print(json.dumps(row), flush=True)
            elif row.get("fault"):
                print("FAULT", describe(row), flush=True)
            if arguments.json and time.monotonic() > written + 3:
                write_json(arguments.json, results)
                written = time.monotonic()
            if time.monotonic() > deadline:
                break
        results["complete"] = time.monotonic() < deadline
    finally:
        checks.close()
        if arguments.json:
            write_json(arguments.json, results)
    faults = sum(bool(row.get("fault")) for row in results["rows"])
    skipped = sum("skipped" in row for row in results["rows"])
    if not arguments.rows:
        cut = "" if results["complete"] else ", stopped for want of time"
        print(f"{len(results['rows'])} checks, {faults} at fault, {skipped} skipped{cut}")
    return 0 if arguments.rows else int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
