"""How exact float32 products are that tensor cores form from pieces; emulated, no GPU is needed.

`python -m benchmarks.accuracy --json benchmarks/results/accuracy.json` multiplies random matrices
by `nn.Linear` and, as our kernels would on a GPU, by plain float32, bf16x6 and TF32, and compares
each with float64. `README.md` shows the table.

Emulated bit by bit: pieces, rounded to nearest; their products, which are exact; and tensor cores'
sums. One instruction adds the products of DEPTH terms and the accumulator: each is cut off at
EXTRA_BITS bits below the last one that float32 would keep of the largest, and so is their sum at
24 bits. That is what is published of the hardware (Fasi et al., "Numerical behavior of NVIDIA
tensor cores", 2021; Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores",
arXiv:2512.07004); this project has not measured it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.shared.files import write_json
from fastlinear.kernels.configs.config import LONG_SUM

Matrix = NDArray[np.float32]
Sums = NDArray[np.float64]
Mode = Callable[[Matrix, Matrix], Matrix]

ROUNDING = 2.0**-24  # the largest error of one operation in float32, of its result
STEP = 16  # terms whose sum joins the total at once, in our kernels' float32 tiles
SIDE = 32  # rows, and outputs


class Cores(NamedTuple):
    """Tensor cores: see the head of this file. TF32 is as deep as half of bfloat16's `depth`."""

    depth: int
    extra_bits: int


HOPPER, AMPERE = Cores(16, 2), Cores(8, 1)


def rounded(values: Matrix, dropped: int) -> Matrix:
    """To nearest, ties away from zero, without the last `dropped` bits of 24."""
    bits = values.view(np.uint32) + np.uint32(1 << dropped - 1)
    return (bits & np.uint32(2**32 - (1 << dropped))).view(np.float32)


def pieces(values: Matrix) -> list[Matrix]:
    """Three pieces of 8 bits, largest first, whose sum `values` is."""
    found = []
    for _ in range(3):
        found.append(rounded(values, 16))
        values = values - found[-1]
    return found


def instruction(acc: Sums, a: Matrix, b: Matrix, cores: Cores) -> Sums:
    """`acc + a @ b.T` by one instruction: (M, N), (M, depth), (N, depth)."""
    terms = a[:, None, :].astype(np.float64) * b[None, :, :]
    largest = np.maximum(np.abs(terms).max(2), np.abs(acc))
    unit = np.ldexp(1.0, np.frexp(largest)[1] - 24 - cores.extra_bits)
    total = (np.trunc(terms / unit[:, :, None]).sum(2) + np.trunc(acc / unit)) * unit
    fraction, exponent = np.frexp(total)
    return np.ldexp(np.trunc(fraction * 2.0**24), exponent - 24)


def product(acc: Sums, a: Matrix, b: Matrix, cores: Cores) -> Sums:
    for start in range(0, a.shape[1], cores.depth):
        depth = slice(start, start + cores.depth)
        acc = instruction(acc, a[:, depth], b[:, depth], cores)
    return acc


def native(a: Matrix, b: Matrix) -> Matrix:
    """`nn.Linear`'s, on this machine's CPU."""
    return torch.nn.functional.linear(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def plain(a: Matrix, b: Matrix) -> Matrix:
    """Multiply-adds in float32, STEP of them before their sum joins the total."""
    total = np.zeros((a.shape[0], b.shape[0]), np.float32)
    for start in range(0, a.shape[1], STEP):
        partial = np.zeros_like(total)
        for k in range(start, min(start + STEP, a.shape[1])):
            # The product is exact in float64, and so nearly is the sum, which is rounded once more.
            exact = np.outer(a[:, k].astype(np.float64), b[:, k]) + partial
            partial = exact.astype(np.float32)
        total = total + partial
    return total


def bf16x6(a: Matrix, b: Matrix, cores: Cores = HOPPER) -> Matrix:
    """Sums the products of pieces, the smallest first, a step at a time.

    What adding a step's sum to the total rounds off is added with the next (Kahan's summation).
    """
    of_a, of_b = pieces(a), pieces(b)
    total = np.zeros((a.shape[0], b.shape[0]), np.float32)
    lost = np.zeros_like(total)
    for start in range(0, a.shape[1], STEP):
        step = slice(start, start + STEP)
        partial = np.zeros(total.shape)
        for i, j in ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)):
            partial = product(partial, of_a[i][:, step], of_b[j][:, step], cores)
        added = partial.astype(np.float32) - lost
        raised = total + added
        lost = (raised - total) - added
        total = raised
    return total


def tf32(a: Matrix, b: Matrix) -> Matrix:
    acc = np.zeros((a.shape[0], b.shape[0]))
    cores = HOPPER._replace(depth=HOPPER.depth // 2)
    return product(acc, rounded(a, 13), rounded(b, 13), cores).astype(np.float32)


MODES: dict[str, Mode] = {
    "nn.Linear": native,
    "ieee": plain,
    "bf16x6": bf16x6,
    "bf16x6, Ampere": lambda a, b: bf16x6(a, b, AMPERE),
    "tf32": tf32,
}
TITLES = {
    "nn.Linear": "`nn.Linear`, CPU",
    "ieee": "`ieee`",
    "bf16x6": "`bf16x6`",
    "bf16x6, Ampere": "`bf16x6` on Ampere",
    "tf32": "`tf32`",
}

Make = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]


def spread(random: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Entries from 1e-8 to 1e8, of which the largest decide a sum."""
    return random.standard_normal(shape) * 10.0 ** random.uniform(-8, 8, shape)


DATA: dict[str, Make] = {
    "uniform in 0..1": lambda random, shape: random.random(shape),
    "normal": lambda random, shape: random.standard_normal(shape),
    "spread over 1e-8..1e8": spread,
}
CANCELLING, DOMINATED = "sums that cancel to 1e-6", "one product of 1e6"
SETS = (*DATA, CANCELLING, DOMINATED)
# Plain float32 rounds the large term once, and tensor cores cut each of its step's terms off.
LAST = "one product of 1e6, the last"


def operands(data: str, size: int, seed: int) -> tuple[Matrix, Matrix]:
    """Two matrices (SIDE, size)."""
    random = np.random.default_rng(seed)
    a, b = (DATA.get(data, DATA["normal"])(random, (SIDE, size)) for _ in range(2))
    if data == CANCELLING:
        half = size // 2
        a[:, half : 2 * half] = -a[:, :half] * (1 + 1e-6 * random.standard_normal((SIDE, half)))
        b[:, half : 2 * half] = b[:, :half]
    if data in (DOMINATED, LAST):
        # The later it comes, the less plain float32 errs: its place is each row's own.
        a[np.arange(SIDE), random.integers(size, size=SIDE) if data == DOMINATED else -1] *= 1e6
    return a.astype(np.float32), b.astype(np.float32)


class Error(NamedTuple):
    """Of a matrix's elements, each over the sum of its terms' sizes, in ROUNDINGs."""

    largest: float
    typical: float  # root of the mean square


def error(result: Matrix, a: Matrix, b: Matrix) -> Error:
    """Of `result` against `a @ b.T` in float64."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    each = (result - wide_a @ wide_b.T) / (np.abs(wide_a) @ np.abs(wide_b).T) / ROUNDING
    return Error(float(np.abs(each).max()), float(np.sqrt(np.mean(each**2))))


def errors(
    data: str, size: int, seeds: Sequence[int], modes: Sequence[str] = tuple(MODES)
) -> dict[str, Error]:
    """The means over `seeds` of each mode's errors."""
    found: dict[str, list[Error]] = {mode: [] for mode in modes}
    for seed in seeds:
        a, b = operands(data, size, seed)
        for mode in modes:
            found[mode].append(error(MODES[mode](a, b), a, b))
    return {mode: Error(*np.mean(each, axis=0).tolist()) for mode, each in found.items()}


def bound(mode: str, size: int) -> float:
    """What no element's error passes, to first order, in ROUNDINGs: "ieee", or "bf16x6" on Hopper.

    "ieee": each term of a step is rounded once, and each step but the first. "bf16x6": what is
    left out of a term is at most 2 * 2**-8 * 2**-17 of it; the last instruction of a step cuts 16
    terms off at half a ROUNDING each, and their sum at two; the five before it, whose terms are
    2**-8 of those, do so to 2**-8 of it; and Kahan's summation errs by two at most, whatever the
    number of steps.
    """
    if mode == "ieee":
        return min(size, STEP) + -(-size // STEP) - 1
    instruction_bound = HOPPER.depth * 2.0 ** (1 - HOPPER.extra_bits) + 2
    return 1 + instruction_bound * (1 + 5 * 2.0**-7) + 2


STUDY = [
    *[(size, "spread over 1e-8..1e8") for size in (1, 4)],
    *[(size, data) for size in (16, 64, LONG_SUM, 8192) for data in (*SETS, LAST)],
]


def study() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for size, data in STUDY:
        seeds = range(40 if size <= 64 else 12 if size <= LONG_SUM else 2)
        found = {mode: each._asdict() for mode, each in errors(data, size, seeds).items()}
        rows.append({"size": size, "data": data, "seeds": len(seeds), "errors": found})
        print(size, data, *(f"{each['largest']:.3g}" for each in found.values()), flush=True)
    return rows


def table(results: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table: each mode's largest error, and its typical one in brackets."""
    lines = ["| K | data | " + " | ".join(TITLES.values()) + " |"]
    lines.append("|---:|---|" + "---:|" * len(TITLES))
    for row in results["rows"]:
        found = (row["errors"][mode] for mode in TITLES)
        cells = (f"{each['largest']:.2g} ({each['typical']:.2g})" for each in found)
        lines.append(f"| {row['size']} | {row['data']} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file to write")
    chosen = parser.parse_args()
    results = {"side": SIDE, "torch": torch.__version__, "rows": study()}
    print(*table(results), sep="\n")
    if chosen.json:
        write_json(chosen.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
