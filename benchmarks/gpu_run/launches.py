"""All that the two calls of `make gpu` launch of our kernels, part by part, and nothing else.

Each launch is a name and a closure, from the lists that the parts themselves go by: no product of
PyTorch's is called, no truth made in float64, no clock asked. So whoever wants all of it compiled
beforehand calls the closures where no GPU is needed: `device` is where operands lie and `sizes`
whose shapes they have, both "cuda" in the parts. Operands come from torch.randn, which may as well
give memory that nobody has written; `launch.target_of` says for which GPU the choices are.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_run import checks, families, tuning
from benchmarks.gpu_run.cases import ARITHMETICS, Group
from benchmarks.gpu_run.cases import FAMILIES as CHECKED
from benchmarks.shared.setting import SETTING
from benchmarks.shared.shapes import LAYERS
from benchmarks.speed import kernel_times
from fastlinear.choice import table
from fastlinear.choice.table import PRODUCTS
from fastlinear.tuning.measure import Products

Launches = Iterator[tuple[str, Callable[[], Any]]]


def tried(device: str, sizes: str) -> Launches:
    """One of each family of kernels."""
    for family in families.FAMILIES.values():
        group = Group(family.group, family.arithmetic, device, 1, True, sizes)
        for product, config in families.calls(family, group):
            yield family.name, functools.partial(product.call, config)


def timed(device: str, sizes: str) -> Launches:
    """The chosen configuration of each product, and the next."""
    for layer in kernel_times.points(kernel_times.TIMED):
        products = Products(layer, torch.device(device))
        for product in kernel_times.PRODUCTS:
            for config, call in kernel_times.calls(products, product).items():
                yield f"{product}, {table.in_words(layer)}, {config}", call


def checked(which: str, device: str, sizes: str) -> Launches:
    """What is compared with float64: "first" in the first call, the "rest" in the second."""
    given = {"device": device, "repeats": 1, "small": False, "sizes": sizes}
    for group in checks.groups_of(CHECKED, ARITHMETICS, which, **given):
        for case, product, configurations in checks.calls(group):
            for config in configurations:
                name = f"{product.name}, {group.arithmetic}, {case.shape}, {config}"
                yield name, functools.partial(product.call, config)


def tuned(device: str, sizes: str) -> Launches:
    """What the tuner measures of each product; "training" launches no others."""
    for layer in tuning.calls():
        products = Products(layer, torch.device(device))
        for product in PRODUCTS[:-1]:
            for config in products.configs(product):
                name = f"{product}, {table.in_words(layer)}, {config}"
                yield name, products.by_kernel(product, config)


def swept(device: str, sizes: str) -> Launches:
    """What the sweep's layers launch of forward and backward without a table."""
    for name in SETTING.layers or LAYERS:
        one = LAYERS[name]
        for dtype in tuning.DTYPES:
            for m in SETTING.swept_rows:
                layer = table.call(dtype, one.bias, one.out_features, one.in_features, m)
                products = Products(layer, torch.device(device))
                for product in ("output", "gradients"):
                    yield f"{product}, {table.in_words(layer)}", products.by_kernel(product, None)


CALLS = {
    1: (tried, timed, functools.partial(checked, "first")),
    2: (tuned, swept, functools.partial(checked, "rest")),
}


def launches(call: int, device: str = "cuda", sizes: str = "cuda") -> Launches:
    """Those of one call of `make gpu`, in the order of its parts."""
    for part in CALLS[call]:
        yield from part(device, sizes)
