"""One product against float64, in every configuration that is legal for it.

Outputs start as NaN between guards, and each call is repeated. `check` has the rows of a group of
cases, `check_apart` those of several, in processes of their own.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_run.apart import Ended, Tell, apart
from benchmarks.gpu_run.cases import ARITHMETICS, FAR_MEMORY, Case, Group, cases
from benchmarks.gpu_run.products import Product, Results, largest_error
from benchmarks.shared.watch import LeftOut, watch
from fastlinear.kernels.configs.config import KINDS, BackwardConfig, Config, Traits
from fastlinear.kernels.configs.tiles import legal_configs, legal_pairs
from fastlinear.kernels.launching import launch

# Those of the first call of benchmarks.gpu; its second checks the rest.
FIRST_FAMILIES = ("linear", "gated", "activation", "batched")
FIRST_ARITHMETICS = ("bfloat16", "float16", "float32")
PROCESSES = {"linear": 4, "gated": 2, "linear strided": 2}  # that share the longest families

EVERY_TILE = "gelu"  # of the activations: it takes the most registers


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


def calls(
    group: Group,
) -> Iterator[tuple[Case, Product, tuple[Config | BackwardConfig | None, ...]]]:
    """What a group launches: products, each in these configurations; None is the chosen one."""
    number = 0
    for case in cases(group):
        for product in case.products:
            if number % group.of == group.turn:
                every = case.every and not (product.applies and EVERY_TILE not in product.name)
                yield case, product, (None, *(configs(product, group) if every else ()))
            number += 1


def check(group: Group) -> Iterator[dict[str, Any]]:
    """One row for each product, shape, layout and configuration, with its errors and budgets."""
    torch.set_float32_matmul_precision("high" if group.arithmetic == "tf32" else "highest")
    if group.family == "far" and torch.cuda.mem_get_info()[0] < FAR_MEMORY:
        little = "too little memory for operands past 2**31 elements"
        yield {"family": "far", "product": "far", "skipped": little}
        return
    for case, product, configurations in calls(group):
        exact, native = product.exact(), product.native()
        budgets = product.budgets(native, exact)
        for config in configurations:
            row: dict[str, Any] = {
                "family": group.family,
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
            except LeftOut as error:
                row["skipped"] = str(error)
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


def check_group(group: Group, tell: Tell) -> None:
    """In a process of its own."""
    watch()
    for row in check(group):
        tell(row)


def check_apart(groups: list[Group], jobs: int, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of all groups until `deadline`, `jobs` groups at a time, each in its own process.

    A kernel that faults takes its process with it, and says so in a row.
    """
    for group, told in apart(check_group, groups, jobs, deadline):
        if not isinstance(told, Ended):
            yield told
        elif told.exit:
            yield {
                "family": group.family,
                "product": group.family,
                "arithmetic": group.arithmetic,
                "fault": f"the process that checks this ended with {told.exit}",
            }


def groups_of(
    families: Sequence[str], arithmetics: Sequence[str], which: str, **given: Any
) -> list[Group]:
    """The groups of those families and arithmetics that are the "first", the "rest", or "all"."""
    first = set(itertools.product(FIRST_FAMILIES, FIRST_ARITHMETICS))
    return [
        Group(family, arithmetic, **given, turn=turn, of=of)
        for family, arithmetic in itertools.product(families, arithmetics)
        for of in [1 if given["small"] else PROCESSES.get(family, 1)]
        for turn in range(of)
        if which == "all" or ((family, arithmetic) in first) == (which == "first")
        # One dtype's offsets are every dtype's; and they take a GPU's memory.
        if family != "far"
        or (given["device"] == "cuda" and arithmetic == "bfloat16" and not given["small"])
    ]
