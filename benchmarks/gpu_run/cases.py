"""The operands that kernels are checked with: shapes, dtypes, and how they lie in memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_run import products
from benchmarks.gpu_run.products import Product
from fastlinear.kernels.launching.operands import ACTIVATIONS

ARITHMETICS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "bf16x6": (torch.float32, "bf16x6"),
    "tf32": (torch.float32, "tf32"),
    "float64": (torch.float64, "ieee"),
}
# In the order in which they are checked, the longest first.
FAMILIES = ("linear", "gated", "linear strided", "gated strided", "activation", "batched", "far")
WHOLE, OFF, ODD = (512, 512, 512), (272, 400, 336), (77, 130, 61)  # M, N, K
SHAPES = [  # with the reason for each
    WHOLE,  # whole blocks
    OFF,  # aligned, off every block boundary
    ODD,  # nothing divides by anything
    (1, 10, 64),  # one datapoint
    (4096, 48, 32),  # many rows, few tiles: the sums over rows are split
    (1, 1, 1),  # one of each
    (0, 5, 7),  # no rows
    (5, 0, 7),  # no output features
    (5, 7, 0),  # no input features
]
# More tiles, off every block boundary, than a GPU has multiprocessors: for programs that compute
# several of them, one after the other. 16-bit kernels alone do.
MANY = (4100, 4208, 208)
# Several blocks and steps of the device's kernels; aligned, and yet off a block.
SMALL = {"cpu": (40, 48, 48), "cuda": (520, 48, 528)}
FAR = 2**31 + 2**16  # elements
FAR_MEMORY = 32 * 2**30  # bytes that operands and outputs so large take together

Shape = tuple[int, ...]
Make = Callable[[Shape], Tensor]  # an operand
Layout = Callable[[Make, Shape], Tensor]  # one that lies in a certain way


def contiguous(make: Make, shape: Shape) -> Tensor:
    return make(shape)


def transposed(make: Make, shape: Shape) -> Tensor:
    return make(shape[::-1]).permute(*reversed(range(len(shape))))


def sliced(make: Make, shape: Shape) -> Tensor:
    larger = make(tuple(2 * size + 3 for size in shape))
    return larger[tuple(slice(3, None, 2) for _ in shape)]


def expanded(make: Make, shape: Shape) -> Tensor:
    return make((1, *shape[1:])).expand(shape)


def far_rows(make: Make, shape: Shape) -> Tensor:
    """The last of the rows lies past 2**31 elements from the first, with NaN between them."""
    rows, features = math.prod(shape[:-1]), shape[-1]
    stride = 16 * (FAR // (rows - 1) // 16 + 1)
    values = make((rows, features))
    size = (rows - 1) * stride + features
    buffer = torch.full((size,), float("nan"), dtype=values.dtype, device=values.device)
    far = buffer.as_strided((rows, features), (stride, 1)).copy_(values)
    return far.unflatten(0, shape[:-1])


@dataclass(frozen=True)
class Group:
    """Checks that one process makes: a family of products, for one arithmetic, or a part of it.

    small: one shape, and of configurations only the one that is chosen.
    sizes: of whose shapes, where not of `device`'s.
    turn, of: every so many-th product, starting with this one.
    """

    family: str
    arithmetic: str
    device: str
    repeats: int
    small: bool
    sizes: str | None = None
    turn: int = 0
    of: int = 1


class Case(NamedTuple):
    """Operands of one shape, (M, N, K) or (B, M, N, K), and the products to be checked of them.

    every: whether in every configuration that is legal, or only in the one that is chosen.
    """

    shape: Shape
    layout: str
    every: bool
    products: Iterator[Product]


def cases(group: Group) -> Iterator[Case]:
    """What a group checks: one kind of products for contiguous operands, strided ones, or far ones.

    Every configuration is taken where operands are aligned and off all blocks, where they are
    unaligned and where each program has many tiles; elsewhere the chosen one. Kernels that differ
    in how they end alone, as those with activations do, take every one with a single shape.
    """
    kind, _, strided = group.family.partition(" ")
    if kind == "far":
        yield from far_cases(group)
        return
    batch, sizes = (3,) if kind == "batched" else (), group.sizes or group.device
    every = kind in ("linear", "gated") and not group.small
    shapes = [SMALL[sizes]] if group.small else list(SHAPES)
    if kind == "linear" and every and sizes != "cpu" and "float16" in group.arithmetic:
        shapes.append(MANY)
    if not strided:
        for shape in shapes:
            yield Case(
                (*batch, *shape),
                "contiguous",
                not group.small and (shape == OFF or (every and shape in (ODD, MANY))),
                family(group, (*batch, *shape), contiguous, contiguous),
            )
    if strided or (batch and not group.small):
        for layout in (transposed, sliced, expanded):
            # One layer with equal rows and equal weights would have one result.
            weights = contiguous if layout is expanded and not batch else layout
            shape = (*batch, *ODD)
            yield Case(shape, layout.__name__, False, family(group, shape, layout, weights))


def far_cases(group: Group) -> Iterator[Case]:
    for shape in ((96, 48, 32), (2, 48, 48, 32)):
        yield Case(shape, "far_rows", True, family(group, shape, far_rows, contiguous))
    dtype, _ = ARITHMETICS[group.arithmetic]
    m, n, k = FAR // 1024, 1024, 16
    x, w = (products.operand((size, k), dtype, group.device, False) for size in (m, n))
    yield Case((m, n, k), "contiguous", False, products.far_output(x, w))


def family(group: Group, shape: Shape, rows: Layout, weights: Layout) -> Iterator[Product]:
    """The products of a group, with x and g of one layout and the weights of another."""
    dtype, precision = ARITHMETICS[group.arithmetic]
    *batch, m, n, k = shape

    def make(size: Shape) -> Tensor:
        return products.operand(size, dtype, group.device, not group.small)

    def weight_and_bias(outputs: int) -> tuple[Tensor, Tensor]:
        # Results are then about as large as the input's elements: none overflows float16.
        def smaller(size: Shape) -> Tensor:
            return make(size).mul_(max(k, 1) ** -0.5)

        return weights(smaller, (*batch, outputs, k)), weights(make, (*batch, outputs))

    x, g = rows(make, (*batch, m, k)), rows(make, (*batch, m, n))
    w, b = weight_and_bias(n)
    kind = group.family.split()[0]
    if kind in ("linear", "batched", "far"):
        yield from products.linear(x, w, b, g, precision)
    # Every activation with one shape; else one whose derivative is taken from the output, and one
    # whose is not.
    for name in ACTIVATIONS if (m, n, k) == OFF else ("relu", "gelu"):
        if kind == "activation" or (kind == "far" and not batch):
            yield from products.activated(x, w, b, g, precision, name)
        if kind == "gated" or (kind == "far" and not batch):
            yield from products.gated_pair(x, *weight_and_bias(2 * n), g, precision, name)
