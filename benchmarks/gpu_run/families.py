"""Each family of kernels once, on a small case, against float64: which of them are to be trusted.

`python -m benchmarks.gpu_run.families --json FILE` runs every family in a process and a time of its
own, those first that no GPU has run yet, and writes FILE after each: what became of it, and what it
launched. `benchmarks.gpu_run.summary.left_out` has what others are to do without. A family that
FILE knows already is not tried again. It exits with 1 if one is not right.
"""

import argparse
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_run.apart import Ended, Tell, apart
from benchmarks.shared.environment import environment
from benchmarks.shared.files import read_json, write_rows
from benchmarks.shared.setting import SETTING
from benchmarks.shared.watch import LeftOut, watch


class Family(NamedTuple):
    """One way to compute a product.

    group, arithmetic, product: which of `benchmarks.gpu_run.cases`.
    kind: of its configurations, the first of which is taken; None for the chosen one.
    new: whether no GPU has run it yet; README.md has what has run where.
    """

    name: str
    group: str
    product: str
    kind: str | None = None
    arithmetic: str = "bfloat16"
    new: bool = True


_KINDS = ("gemv", "split_k", "persistent", "tiled")
_OUTPUT, _GRAD_INPUT, _GRAD_WEIGHT = (
    "linear_forward",
    "linear_backward_input",
    "linear_backward_weight",
)
_ACTIVATED = "linear_activation_forward, gelu"
FAMILIES = {
    family.name: family
    for family in (
        *(Family(f"output by {kind}", "linear", _OUTPUT, kind) for kind in _KINDS[:-1]),
        *(Family(f"grad_input by {kind}", "linear", _GRAD_INPUT, kind) for kind in _KINDS[:-1]),
        Family("grad_weight in splits", "linear", f"{_GRAD_WEIGHT}, 3 splits"),
        Family("both gradients in one launch", "linear", "linear_backward", "pair"),
        Family("both gradients in splits", "linear", "linear_backward, 3 splits", "pair"),
        Family("grad_weight into main_grad", "linear", f"{_GRAD_WEIGHT} into main_grad"),
        *(Family(f"activation by {kind}", "activation", _ACTIVATED, kind) for kind in _KINDS),
        Family("activation's gradient", "activation", "activation_backward, gelu"),
        Family("gated forward", "gated", "gated_linear_forward, gelu"),
        Family("gated gradients", "gated", "gated_linear_backward, gelu"),
        Family("output of pieces", "linear", _OUTPUT, "tiled", "bf16x6"),
        Family("grad_weight of pieces", "linear", _GRAD_WEIGHT, "tiled", "bf16x6"),
        Family("both gradients of pieces", "linear", "linear_backward", "pair", "bf16x6"),
        Family("output by tiles", "linear", _OUTPUT, "tiled", new=False),
        Family("grad_input by tiles", "linear", _GRAD_INPUT, "tiled", new=False),
        Family("grad_weight", "linear", _GRAD_WEIGHT, "tiled", new=False),
    )
}


def calls(family: Family, group: Any) -> Iterator[tuple[Any, Any]]:
    """What a family launches: a `Product` and the configuration to call it in; or nothing.

    group: `group_of(family, ...)`.
    """
    from benchmarks.gpu_run import checks

    for _, product, _ in checks.calls(group):
        if product.name == family.product:
            found = checks.configs(product, group) if family.kind else [None]
            if family.kind not in (None, "pair"):  # split, where that can be
                found = [config for config in found if config.kind == family.kind]
                found.sort(key=lambda config: -config.splits)
            yield from ((product, config) for config in found[:1])


def group_of(family: Family, device: str) -> Any:
    from benchmarks.gpu_run.cases import Group

    return Group(family.group, family.arithmetic, device, repeats=2, small=True)


def trial(name: str, tell: Tell) -> None:
    """Tells what it launches, before each launch, and then what came of it."""
    from benchmarks.gpu_run import checks
    from fastlinear.kernels.launching.launch import CannotLaunch

    watch(report=lambda launched: tell({"launching": launched}))
    group = group_of(FAMILIES[name], SETTING.device)
    verdict, said = "not here", "this device has no such configuration"
    for product, config in calls(FAMILIES[name], group):
        exact, native = product.exact(), product.native()
        budgets = product.budgets(native, exact)
        poisoned = dataclasses.replace(group, small=False)
        try:
            found = checks.compare(product, config, exact, native, budgets, poisoned)
            verdict, said = ("wrong" if found["fault"] else "right"), found["fault"] or ""
        except LeftOut as error:
            verdict, said = "left out", str(error)
        except CannotLaunch as error:
            verdict, said = "cannot launch", str(error)
        except Exception as error:  # an address that is none, say
            verdict, said = "fails", f"{type(error).__name__}: {error}"
    tell({"verdict": verdict, "said": " ".join(said.split())[:400]})


Row = dict[str, Any]


def new_row(name: str) -> Row:
    return {
        "family": name,
        "new": FAMILIES[name].new,
        "verdict": "not tried",
        "said": "",
        "launches": [],
    }


def try_some(
    rows: dict[str, Row], names: list[str], jobs: int, deadline: float, save: Callable[[], None]
) -> list[str]:
    """Fills in the rows of `names`; returns those that were not done in time."""
    slow = []
    for name, told in apart(trial, names, jobs, deadline, SETTING.trial):
        row = rows[name]
        if isinstance(told, Ended):
            if told.exit is None:
                slow.append(name)
                row["said"] = f"not done after {SETTING.trial:.0f} s"
            elif told.exit:
                row |= {"verdict": "dies", "said": f"its process ended with {told.exit}"}
            save()
        elif "launching" in told:
            row["launches"] = list(dict.fromkeys([*row["launches"], told["launching"]]))
        else:
            row |= told
    return slow


def try_all(rows: dict[str, Row], jobs: int, deadline: float, save: Callable[[], None]) -> None:
    """Fills in what was not tried yet.

    A kernel that hangs may hold up the others: where several are not done in time, each has a
    second try alone, unless what it launched last is known to hang.
    """
    untried = [name for name, row in rows.items() if row["verdict"] == "not tried"]
    slow = try_some(rows, untried, jobs, deadline, save)
    hung: set[str] = set()
    for name in slow:
        last = (rows[name]["launches"] or [name])[-1]
        if len(slow) == 1 or last in hung or try_some(rows, [name], 1, deadline, save):
            rows[name]["verdict"] = "hangs"
            hung.add(last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file to write, and to go on from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--jobs", type=int, default=max(4, min(12, (os.cpu_count() or 1) - 2)))
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    found: dict[str, Any] = {"environment": environment(), "rows": []}
    before = read_json(arguments.json)
    known = {row["family"]: row for row in before.get("rows", [])}
    if before.get("environment") != found["environment"]:
        known = {}
    rows = {name: known.get(name, new_row(name)) for name in FAMILIES}

    def save() -> None:
        write_rows(arguments.json, found | {"rows": list(rows.values())})

    save()
    try_all(rows, arguments.jobs, deadline, save)
    save()
    verdicts = [row["verdict"] for row in rows.values()]
    counts = ((verdict, len(list(same))) for verdict, same in itertools.groupby(sorted(verdicts)))
    print(", ".join(f"{count} {verdict}" for verdict, count in counts))
    return int(any(verdict not in ("right", "not here") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
