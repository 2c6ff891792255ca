"""What every shipped configuration takes on every target: evidence that needs no GPU.

`python -m benchmarks.resources` compiles each for GPUs that are not there, and prints registers of
a thread, spilled bytes, shared memory of a program, matrix instructions of one pass of the loop,
and, as predicted from those, the programs that share a multiprocessor, their warps in percent of
the most, and the waves of programs that 4096 rows, outputs and inputs make on the whole GPU.

With `--check` it also compares with benchmarks/results/resources.json, and names what got worse;
`--json benchmarks/results/resources.json` writes that table anew. With it comes
kernels/resources.json: of that table what the choice of a configuration goes by, the programs that
share a multiprocessor.

`--launches` compiles what is launched for the layers of shared/shapes.py instead, as the planners
choose it, and prints of each kernel's machine code (NVIDIA's): of a warp and step of its main loop
the tensor-core instructions, the others, and how many products and copies of operands a wait leaves
under way; and of what comes after the loop the instructions, the loads behind barriers, and the
stores by width. `--check` and `--json` then mean benchmarks/results/launches.json.

A table says of which sources it is. `--check --sample 6` compiles a sixth of the cases, drawn
anew each time, where it is of those at hand: a compiler would say the same of the others again. By
another Triton than the table's it is always the same sixth.
Else it compiles all.
"""

import argparse
import collections
import functools
import hashlib
import json
import multiprocessing
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.without_gpu import compiled, occupancy
from benchmarks.without_gpu.ahead_of_time import cases, chosen
from benchmarks.without_gpu.case import GPU_TARGETS, Case
from fastlinear.kernels.configs.config import BackwardConfig, Config, Kernel, arithmetic
from fastlinear.kernels.configs.model import resident_key
from fastlinear.kernels.configs.pair_model import pair_key

Row = dict[str, Any]
Table = dict[str, Row]  # by the case's name

COMMITTED = Path(__file__).with_name("results") / "resources.json"
LAUNCHES = COMMITTED.with_name("launches.json")
SHIPPED = Path(__file__).parent.parent / "kernels" / "resources.json"
# What decides what is compiled, and reads what came of it.
READERS = (
    "shared/shapes",
    "without_gpu/ahead_of_time",
    "without_gpu/case",
    "without_gpu/compiled",
    "without_gpu/machine_code",
    "without_gpu/occupancy",
)
# Which kernel's configurations a product's are.
KERNELS: dict[str, Kernel] = {
    "output": "forward",
    "grad_input": "forward",
    "columns": "forward",
    "grad_weight": "backward_weight",
    "grad_weight_split": "backward_weight",
    "gated_output": "gated_forward",
}
COLUMNS = ("registers", "spilled", "shared", "matrix", "resident", "occupancy", "waves")
OF_CODE = ("matrix", "other", "in_flight", "copies", "tile", "late_loads", "stores")
REGISTER_SLACK = 8  # the step that GPUs give registers out in
# The columns that are compared: whether more of it is worse, and how much worse is let pass.
# `resident` decides `occupancy` and `waves`.
COMPARED = {
    "spilled": (True, 0),
    "shared": (True, 0),
    "matrix": (False, 0),
    "registers": (True, REGISTER_SLACK),
    "resident": (False, 0),
    "other": (True, 0),
    "in_flight": (False, 0),
    "copies": (False, 0),
    "tile": (True, 0),
    "late_loads": (True, 0),
}
WORDS = {
    "registers": "registers a thread",
    "spilled": "spilled bytes a thread",
    "shared": "bytes of shared memory",
    "matrix": "matrix instructions in the loop",
    "resident": "programs a multiprocessor",
    "other": "other instructions a step",
    "in_flight": "products under way after a wait",
    "copies": "copies under way after a wait",
    "tile": "instructions after the main loop",
    "late_loads": "loads behind a barrier",
}


def sources() -> str:
    """A hash of all that decides what is compiled, and what is read from it, but for Triton."""
    readers = (Path(__file__).parent / f"{name}.py" for name in READERS)
    folder = SHIPPED.parent
    files = [*sorted(folder.rglob("*.py")), folder / "configs" / "tiles.json", *readers]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def columns_of(row: Row) -> Row:
    """What the table has of a row: of its machine code too, where that was read."""
    code = row.get("code", {})
    return {name: row[name] for name in COLUMNS} | {name: code[name] for name in OF_CODE if code}


def write_table(table: Table, path: Path) -> None:
    """One case a line, in the order of their names."""
    rows = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(columns_of(row))}"
        for name, row in sorted(table.items())
        if not row.get("error")
    )
    head = {"triton": triton.__version__, "sources": sources(), "waves of": occupancy.SIDE}
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "cases": {{\n{rows}\n }}\n}}\n')


def residents(table: Table, known: list[Case]) -> dict[str, dict[str, int]]:
    """Programs a multiprocessor by target and `resident_key` or `pair_key`.

    The least of the cases that have that key, but for those that are rare: of 64-bit offsets, of
    odd numbers of outputs, and of a grad_weight that is added to what is there.
    """
    found: dict[str, dict[str, int]] = {}
    for case in known:
        row = table.get(case.name)
        rare = case.wide or case.odd or case.accumulates
        if row is None or row.get("error") or rare:
            continue
        kind = arithmetic(getattr(torch, case.dtype), case.precision)
        if case.product == "backward" and isinstance(case.config, BackwardConfig):
            key = pair_key(kind, case.config, case.aligned)
        elif case.product in KERNELS and isinstance(case.config, Config):
            key = resident_key(KERNELS[case.product], kind, case.config, case.aligned)
        else:
            continue
        of_target = found.setdefault(case.target, {})
        of_target[key] = min(row["resident"], of_target.get(key, row["resident"]))
    return {target: dict(sorted(of_target.items())) for target, of_target in found.items()}


def minor(version: str) -> str:
    """3.7 of 3.7.1."""
    return ".".join(version.split(".")[:2])


def why_incomparable(version: str, committed_version: str) -> str | None:
    """Another compiler makes other code: no better or worse of ours. None where both are one."""
    if minor(version) == minor(committed_version):
        return None
    return (
        f"not compared: the table is of Triton {minor(committed_version)}, "
        f"this is Triton {minor(version)}"
    )


def worsened(table: Table, committed: Table) -> list[str]:
    """What is worse in `table` than in `committed`, in words, each with the case's name.

    Cases that are missing from either are named too.
    """
    worse = [f"{name}: missing, but in the committed table" for name in committed.keys() - table]
    for name, row in table.items():
        if row.get("error"):
            continue  # a fault already
        if name not in committed:
            worse.append(f"{name}: new, not in the committed table")
            continue
        read = row | row.get("code", {})
        for column, (more_is_worse, slack) in COMPARED.items():
            before, after = committed[name].get(column), read.get(column)
            if before is None or after is None:
                continue  # of other instructions than these
            if (after - before if more_is_worse else before - after) > slack:
                worse.append(f"{name}: {after} {WORDS[column]}, was {before}")
    return sorted(worse)


def _run(steps: bool, case: Case) -> tuple[Case, Row]:
    return case, compiled.read(case, steps)


def wanted_cases(targets: list[str], launches: bool) -> list[Case]:
    if not launches:
        return cases(targets)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = pool.map(chosen, [[target] for target in targets], chunksize=1)
    return [case for of_target in found for case in of_target]


def measure(wanted: list[Case], launches: bool) -> tuple[Table, list[str]]:
    """Compiles, prints a line a case, and returns the table and what is at fault, in words."""
    table: Table = {}
    faults: list[str] = []
    print(
        f"{'target  product            dtype     prec.  tiles (M x N x K)':81} "
        "registers spilled  shared matrix resident occupancy  waves"
        + (" |  " + " ".join(OF_CODE) if launches else "")
    )
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for case, row in pool.imap(functools.partial(_run, launches), wanted, chunksize=4):
            table[case.name] = row
            wrong = compiled.faults(case, row)
            faults += [f"{case.name}: {fault}" for fault in wrong]
            line = f"{case.label:81} "
            if not row["error"]:
                waves = "-" if row["waves"] is None else format(row["waves"], ".2f")
                line += (
                    f"{row['registers']:9} {row['spilled']:7} {row['shared']:7} {row['matrix']:6} "
                    f"{row['resident']:8} {row['occupancy']:8}% {waves:>6}"
                )
                line += " |" + "".join(f" {one!s:>8}" for one in row["code"].values())
            print(line + "".join(f"  FAULT: {fault}" for fault in wrong), flush=True)
    return table, faults


def print_totals(table: Table) -> None:
    by_target: dict[str, list[Row]] = collections.defaultdict(list)
    for name, row in table.items():
        if not row["error"]:
            by_target[name.split()[0]].append(row)
    for target, rows in by_target.items():
        print(
            f"{target:7} {len(rows)} compiled, {sum(row['spilled'] > 0 for row in rows)} spill; "
            f"at most {max(row['registers'] for row in rows)} registers "
            f"and {max(row['shared'] for row in rows)} bytes of shared memory; "
            f"occupancy {min(row['occupancy'] for row in rows)}% or more"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--targets", nargs="+", default=list(GPU_TARGETS), choices=list(GPU_TARGETS)
    )
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument(
        "--launches", action="store_true", help="what is launched for layers of models"
    )
    for option, what in (("--json", "also write the table to"), ("--check", "compare with")):
        whose = f"{what} this file, that of the repository unless another is named"
        parser.add_argument(option, nargs="?", const="", help=whose)
    parser.add_argument(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="with --check: compile one case in N, where the table is of these sources",
    )
    arguments = parser.parse_args()
    if arguments.sample < 1:
        parser.error(f"--sample takes a number from 1 on, but got {arguments.sample}")
    return arguments


def main() -> None:
    arguments = parse()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled; unset it")

    ours = LAUNCHES if arguments.launches else COMMITTED
    checked, written = (
        None if one is None else Path(one or ours) for one in (arguments.check, arguments.json)
    )
    committed = json.loads(checked.read_text()) if checked else None
    every = wanted_cases(arguments.targets, arguments.launches)
    wanted = [case for case in every if arguments.only in case.name]
    names = {case.name for case in wanted}
    known = committed is not None and committed.get("sources") == sources()
    if committed and known and arguments.sample > 1:
        # Of another Triton, whose every case may not have been compiled yet, always the same.
        other = why_incomparable(triton.__version__, committed["triton"])
        wanted = random.Random(other).sample(wanted, -(-len(wanted) // arguments.sample))
        print(f"the table is of these sources: {len(wanted)} of {len(names)} are compiled again")
    table, faults = measure(wanted, arguments.launches)
    print_totals(table)
    if written:
        write_table(table, written)
        if written.resolve() == COMMITTED:
            SHIPPED.write_text(json.dumps(residents(table, wanted), indent=1) + "\n")

    failures = [f"FAULT: {fault}" for fault in faults]
    if committed:
        incomparable = why_incomparable(triton.__version__, committed["triton"])
        left_out = names - {case.name for case in wanted}
        asked_for = {
            name: row
            for name, row in committed["cases"].items()
            if name.split()[0] in arguments.targets and arguments.only in name
            if name not in left_out
        }
        worse = [] if incomparable else worsened(table, asked_for)
        failures += [f"WORSE: {one}" for one in worse]
        print(incomparable or f"{len(asked_for)} compared, {len(worse)} worse ({checked})")
    print(*failures, f"{len(table)} compiled, {len(faults)} at fault", sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
