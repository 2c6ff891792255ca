"""The time of a layer's products in the configurations that the model ranks first, beside cuBLAS's.

What is launched, for whoever compiles it beforehand too, and how it is timed. `benchmarks.kernels`
is the command.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.shared.setting import SETTING
from benchmarks.shared.watch import LeftOut
from fastlinear.choice import table as tables
from fastlinear.choice.table import PYTORCH, Key
from fastlinear.kernels.backward.linear import plan_backward
from fastlinear.kernels.launching import launch
from fastlinear.tuning.measure import Products
from fastlinear.tuning.stopwatch import Call, Measure

ARITHMETICS = [
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "bf16x6"),
    (torch.float32, "tf32"),
    (torch.float64, "ieee"),
]
# The products that are timed, and what results call them; grad_weight comes with grad_bias.
PRODUCTS = {
    "output": "output",
    "grad_input": "grad_input",
    "grad_weight": "grad_weight",
    "gradients": "backward",
}
CANDIDATES = 4  # the chosen one, and those that the model has next
TIMED = ("bfloat16",)  # in `make gpu`

Row = dict[str, Any]


def points(dtypes: Sequence[str]) -> Iterator[Key]:
    """The calls whose products are timed, for dtypes and precisions by name."""
    for dtype, precision in ARITHMETICS:
        name = str(dtype)[6:] if precision == "ieee" else precision
        if name in dtypes:
            for m, (n, k) in itertools.product(SETTING.timed_rows, SETTING.timed):
                yield tables.call(dtype, True, n, k, m, precision=precision)


def calls(products: Products, product: str, candidates: int = CANDIDATES) -> dict[str, Call]:
    """What is launched for a product: the chosen configuration, and those that the model has next.

    With each other's names: a launch for each of both gradients is None.
    """
    layer = products.call
    ranked = products.configs(product)
    chosen = ranked[0]
    if product == "gradients":
        g, w, x = products.grad, products.weight, products.input
        operands = launch.describe(g, w, x)
        bias = layer.bias
        plan = plan_backward(operands, None, bias, False, layer.precision, None, None)
        chosen = plan.config
    configs = [chosen, *(config for config in ranked if config != chosen)][:candidates]
    return {str(config): products.by_kernel(product, config) for config in configs}


def launchable(calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that can be called, and why the others cannot."""
    found: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = call
        except LeftOut as error:  # it is known what is wrong there
            print(f"without {name}: {error}", flush=True)
        except Exception as error:  # Triton has many of its own
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    return found, failed


def measure(
    record: Callable[[Row], None],
    dtypes: Sequence[str],
    deadline: float,
    stopwatch: Measure,
    device: torch.device,
) -> None:
    for layer in points(dtypes):
        torch.set_float32_matmul_precision("high" if layer.precision == "tf32" else "highest")
        name_of_dtype = layer.dtype if layer.precision == "ieee" else layer.precision
        products = Products(layer, device)
        for product, name in PRODUCTS.items():
            if time.monotonic() > deadline:
                print("out of time: the rest is not measured")
                return
            ours = calls(products, product)
            usable, failed = launchable(ours)
            times = stopwatch({PYTORCH: products.by_pytorch(product)} | usable, "device")
            times = {key: [round(one, 3) for one in found] for key, found in times.items()}
            row: Row = {"part": "time", "product": name, "dtype": name_of_dtype}
            row |= {"m": layer.m, "n": layer.n, "k": layer.k, "chosen": next(iter(ours))}
            row |= {"native_us": times.pop(PYTORCH), "kernel_us": times}
            record(row | ({"failed": failed} if failed else {}))
        print(f"timed: {name_of_dtype}, M = {layer.m}, N = {layer.n}, K = {layer.k}", flush=True)
