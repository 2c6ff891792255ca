"""Every kernel, legal configuration and dtype against float64, on fresh random inputs.

`python -m benchmarks.numerics --json FILE` draws operands of many shapes and layouts, runs each
launcher in each configuration that is legal for them, and compares every result with float64: the
budget is that of `tests/helpers/oracle.py`, twice PyTorch's own error and one rounding step. Each
call is repeated and has to give the same bits. Outputs start as NaN between guards. It exits with 1
if anything is at fault; FILE is written as it goes. Nothing is timed.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anyone imports triton

from benchmarks.gpu_run.cases import ARITHMETICS, FAMILIES
from benchmarks.gpu_run.checks import check, check_apart, groups_of
from benchmarks.shared.environment import environment
from benchmarks.shared.files import read_json, write_rows
from benchmarks.shared.watch import watch


def describe(row: dict[str, Any]) -> str:
    where = (row.get("arithmetic"), row.get("shape"), row.get("layout"), row.get("config"))
    return ", ".join(str(one) for one in (row["product"], *where) if one) + f": {row['fault']}"


def parsed() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write; what it has of others stays")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--arithmetics", nargs="+", choices=ARITHMETICS, default=ARITHMETICS)
    parser.add_argument("--which", choices=["all", "first", "rest"], default="all")
    parser.add_argument("--repeats", type=int, default=20, help="calls to give the same bits")
    parser.add_argument("--small", action="store_true", help="one small shape, as it is chosen")
    parser.add_argument("--jobs", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.small:
        # Without torch's cache the ends of tensors are those of allocations, which are watched.
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    groups = groups_of(
        arguments.families,
        arguments.arithmetics,
        arguments.which,
        device=arguments.device,
        repeats=arguments.repeats,
        small=arguments.small,
    )
    watch()
    checks = (
        (row for group in groups for row in check(group))
        if arguments.jobs == 1
        else check_apart(groups, arguments.jobs, deadline)
    )
    before = read_json(arguments.json) if arguments.json else {}
    anew = {(group.family, group.arithmetic) for group in groups}
    kept = [
        row
        for row in before.get("rows", [])
        if (row.get("family"), row.get("arithmetic")) not in anew
    ]
    rows: list[dict[str, Any]] = []

    def save(complete: bool) -> None:
        if arguments.json:
            all_of = complete and (not kept or before.get("complete", False))
            found = {"environment": environment(), "complete": all_of, "rows": [*kept, *rows]}
            write_rows(arguments.json, found)

    written, complete = -math.inf, False
    try:
        for row in checks:
            rows.append(row)
            if row.get("fault"):
                print("FAULT", describe(row), flush=True)
            if time.monotonic() > written + 3:
                save(False)
                written = time.monotonic()
            if time.monotonic() > deadline:
                break
        complete = time.monotonic() < deadline
    finally:
        checks.close()
        save(complete)
    faults = sum(bool(row.get("fault")) for row in rows)
    skipped = sum("skipped" in row for row in rows)
    cut = "" if complete else ", stopped for want of time"
    print(f"{len(rows)} checks, {faults} at fault, {skipped} skipped{cut}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
