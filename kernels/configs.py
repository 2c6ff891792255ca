"""Configurations of the kernels.

The tiles they may use, whether one is legal, and which one to use.

Nothing here imports Triton or measures anything: a choice costs microseconds, and no user waits for
autotuning.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["forward", "gated_forward", "backward_weight"]


@dataclass(frozen=True)
class Target:
    """What a configuration has to fit.

    family: the architecture whose tiles are used:
        "sm_80", "sm_90", "sm_100", "gfx942" or "interpreter".
    shared_memory: bytes one program may use.
    multiprocessors: programs that run at once, at one a multiprocessor.
    warp_size: threads in a warp.
    """

    family: str
    shared_memory: int
    multiprocessors: int
    warp_size: int


# One of each family, for compiling where there is no GPU; a GPU at hand describes
# itself (launch.target_of).
TARGETS = {
    "sm_80": Target("sm_80", shared_memory=166_912, multiprocessors=108, warp_size=32),
    "sm_90": Target("sm_90", shared_memory=232_448, multiprocessors=132, warp_size=32),
    "sm_100": Target("sm_100", shared_memory=232_448, multiprocessors=148, warp_size=32),
    "gfx942": Target("gfx942", shared_memory=65_536, multiprocessors=304, warp_size=64),
}
# A few multiprocessors, so that small shapes take the same paths (tile groups, splits) as large
# ones on a GPU.
INTERPRETER = Target("interpreter", shared_memory=2**30, multiprocessors=8, warp_size=1)


@dataclass(frozen=True)
class Config:
    """Block sizes over the layer's dimensions, and how to compile.

    The dimensions are M (rows), N (out_features) and K (in_features).

    The forward kernel computes BLOCK_M x BLOCK_N tiles in steps of BLOCK_K; the grad_weight kernel
    computes BLOCK_N x BLOCK_K tiles in steps of BLOCK_M.

    num_warps, num_stages: Triton's; stages are the steps whose operands are in flight at once.
    group: rows of tiles that are walked together, for reuse in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8

    def compile_options(self, target: Target) -> dict[str, int]:
        """Triton's options for a launch on `target`."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if target.family.startswith("sm_"):
            # Left to itself, ptxas may hold a small kernel to 64 or 80 registers and spill some
            # bytes; 255 is the most that a thread can have, and lets it take what it needs.
            options["maxnreg"] = 255
        return options

    def tile(self, kernel: Kernel) -> tuple[int, int, int]:
        """(rows, columns, depth): the output tile of `kernel`, and the reduction's step."""
        if kernel == "backward_weight":
            return self.block_n, self.block_k, self.block_m
        return self.block_m, self.block_n, self.block_k


def _config(
    kernel: Kernel, rows: int, columns: int, depth: int, num_stages: int, num_warps: int
) -> Config:
    if kernel == "backward_weight":
        return Config(depth, rows, columns, num_warps, num_stages)
    return Config(rows, columns, depth, num_warps, num_stages)


# (rows, columns, depth, stages, warps) of the output tiles, largest first, by family and kind of
# arithmetic. tests/test_compile.py compiles every one that is legal, for its target, and fails
# where it spills.
_TILES: dict[str, dict[str, list[tuple[int, int, int, int, int]]]] = {
    "sm_80": {
        "16-bit": [
            (128, 128, 32, 4, 8),
            (128, 64, 32, 4, 8),
            (64, 64, 64, 3, 4),
            (64, 64, 32, 4, 4),
            (32, 64, 64, 4, 4),
            (16, 64, 128, 3, 4),
            (16, 64, 32, 4, 4),
        ],
        "tf32": [(128, 64, 32, 3, 8), (64, 64, 32, 4, 4), (32, 64, 32, 4, 4), (16, 64, 32, 4, 4)],
        "float32": [
            (128, 64, 16, 3, 8),
            (64, 64, 16, 3, 8),
            (32, 64, 16, 3, 4),
            (16, 64, 16, 3, 4),
        ],
        "float64": [(64, 64, 16, 3, 8), (32, 32, 16, 3, 4), (16, 32, 16, 3, 4)],
    },
    "sm_90": {
        "16-bit": [
            (128, 256, 64, 3, 8),
            (128, 128, 64, 4, 8),
            (64, 128, 64, 4, 4),
            (128, 64, 32, 4, 8),
            (64, 64, 64, 4, 4),
            (32, 64, 128, 4, 4),
            (16, 64, 128, 4, 4),
            (16, 64, 32, 4, 4),
        ],
        "tf32": [
            (128, 128, 32, 4, 8),
            (64, 128, 32, 4, 4),
            (64, 64, 32, 4, 4),
            (32, 64, 32, 4, 4),
            (16, 64, 64, 4, 4),
            (16, 32, 32, 4, 4),
        ],
        "float32": [
            (128, 64, 16, 3, 8),
            (64, 64, 16, 3, 8),
            (32, 64, 16, 3, 4),
            (16, 64, 16, 3, 4),
        ],
        "float64": [(64, 64, 16, 3, 8), (32, 32, 16, 2, 4), (16, 32, 16, 3, 4)],
    },
    "sm_100": {
        "16-bit": [
            (128, 128, 32, 4, 8),
            (128, 64, 32, 4, 8),
            (64, 64, 64, 3, 4),
            (32, 64, 64, 3, 4),
            (16, 64, 64, 4, 4),
            (16, 64, 32, 4, 4),
        ],
        "tf32": [
            (128, 64, 32, 4, 8),
            (64, 64, 32, 4, 4),
            (32, 64, 32, 4, 4),
            (16, 64, 32, 4, 4),
        ],
        "float32": [
            (64, 64, 16, 3, 8),
            (32, 64, 16, 3, 4),
            (16, 64, 16, 3, 4),
        ],
        "float64": [(64, 64, 16, 3, 8), (32, 32, 16, 3, 4), (16, 32, 16, 3, 4)],
    },
    "gfx942": {
        "16-bit": [
            (128, 128, 64, 2, 8),
            (128, 64, 64, 2, 8),
            (64, 64, 64, 2, 4),
            (32, 64, 64, 2, 4),
            (16, 64, 64, 2, 4),
        ],
        "tf32": [(128, 64, 32, 2, 8), (64, 64, 32, 2, 4), (32, 64, 32, 2, 4), (16, 64, 32, 2, 4)],
        "float32": [
            (128, 64, 16, 2, 8),
            (64, 64, 16, 2, 4),
            (32, 64, 16, 2, 4),
            (16, 64, 16, 2, 4),
        ],
        "float64": [(64, 64, 16, 2, 4), (32, 32, 16, 2, 4), (16, 32, 16, 2, 4)],
    },
    "interpreter": {
        kind: [(32, 32, 32, 1, 1)] for kind in ("16-bit", "tf32", "float32", "float64")
    },
}

# Multiply-adds a clock on one multiprocessor, of H100's order;
# only the ratio to bandwidth matters to the choice.
_RATE = {"16-bit": 2048, "tf32": 1024, "float32": 128, "float64": 64}
# Bytes a clock that L2 feeds one multiprocessor, of H100's order.
_BANDWIDTH = 64


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """The kind of arithmetic, which decides the tiles: "16-bit", "tf32", "float32" or "float64"."""
    if dtype in (torch.float16, torch.bfloat16):
        return "16-bit"
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "float32"
    return "float64"


def why_illegal(
    kernel: Kernel,
    config: Config,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    activation: bool = False,
) -> str | None:
    """What is in the way of launching `config` for such operands on `target`, in words.

    None where it can be launched.

    The one predicate: the choice, the tests that compile ahead of time and any tuner go by it.

    Args:
        kernel: whose tile the configuration is.
        config: the configuration.
        dtype, precision: of the operands, and how float32 products are formed.
        aligned: whether every operand can be read 16 bytes at a time (launch.aligned); if not, the
            operands pass through registers, each element with an address of its own.
        target: the device.
        activation: whether the kernel applies one to its accumulators.
    """
    rows, columns, depth = config.tile(kernel)
    for name, size in (
        ("block_m", config.block_m),
        ("block_n", config.block_n),
        ("block_k", config.block_k),
    ):
        if size < 16 or size & (size - 1):
            return f"{name}={size} is not a power of two of at least 16"
    if target.family == "interpreter":
        return None
    # AMD's pipeline keeps the newest stage in registers.
    products = 2 if kernel == "gated_forward" else 1  # of one tile of input and a weight each
    buffers = max(1, config.num_stages - 1) if target.family == "gfx942" else config.num_stages
    operands = buffers * (rows + products * columns) * depth * dtype.itemsize
    if operands > target.shared_memory:
        return (
            f"operands need {operands} bytes of shared memory, "
            f"{target.family} has {target.shared_memory}"
        )
    threads = config.num_warps * target.warp_size
    words = max(4, dtype.itemsize) // 4
    accumulators = products * rows * columns * words // threads
    kind = arithmetic(dtype, precision)
    # As measured by compiling (python -m benchmarks.resources): more than these spill.
    if kernel != "gated_forward":
        most = 64 if activation else 128
    elif kind in ("float32", "float64"):
        most = 32
    else:
        most = 128 if kind == "16-bit" and target.family in ("sm_90", "gfx942") else 64
    if accumulators > most:
        return (
            f"accumulators take {accumulators} registers a thread, "
            f"more than the {most} that leave room for the rest"
        )
    if not aligned:
        addresses = (rows + products * columns) * depth // threads * 2
        # Plain multiply-adds hold their operands in registers,
        # matrix instructions read them from shared memory.
        most = 48 if kind in ("float32", "float64") else 128
        if accumulators + addresses >= most:
            return (
                f"accumulators and addresses take {accumulators} + {addresses} "
                f"registers a thread of {most}"
            )
    return None


@functools.cache
def legal_configs(
    kernel: Kernel,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    activation: bool = False,
) -> tuple[Config, ...]:
    """Every shipped configuration that is legal, largest tile first."""
    tiles = _TILES[target.family][arithmetic(dtype, precision)]
    configs = (_config(kernel, *tile) for tile in tiles)
    return tuple(
        config
        for config in configs
        if why_illegal(kernel, config, dtype, precision, aligned, target, activation) is None
    )


@functools.lru_cache(maxsize=4096)
def choose(
    kernel: Kernel,
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    activation: bool = False,
) -> Config:
    """The configuration with the least modelled time.

    It is for `batch` layers of `m` rows, `n` outputs and `k` inputs.

    Time is waves of programs over the multiprocessors, times a step's arithmetic and operand
    traffic. It needs no measurement, and is a default rather than an optimum: on an H100 the
    chosen tile runs at 0.99 of the best one's speed in bfloat16, 0.97 in float32 and 0.89 in TF32,
    as geometric means, and at 0.92, 0.63 and 0.47 at worst
    (benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json).
    """
    rows, columns = (n, k) if kernel == "backward_weight" else (m, n)
    kind = arithmetic(dtype, precision)

    def modelled_time(config: Config) -> float:
        tile_rows, tile_columns, _ = config.tile(kernel)
        tiles = batch * math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
        multiply_adds = tile_rows * tile_columns / _RATE[kind]
        traffic = (tile_rows + tile_columns) * dtype.itemsize / _BANDWIDTH
        return math.ceil(tiles / target.multiprocessors) * (multiply_adds + traffic)

    legal = legal_configs(kernel, dtype, precision, aligned, target, activation)
    return min(legal, key=modelled_time)


def choose_splits(config: Config, batch: int, m: int, n: int, k: int, target: Target) -> int:
    """How many programs share the M reduction of each grad_weight tile.

    One, unless the tiles alone leave multiprocessors idle; then as many as fill them, with at least
    four steps each so that a partial sum's round trip through memory is worth it.
    """
    tiles = batch * math.ceil(n / config.block_n) * math.ceil(k / config.block_k)
    most = max(1, m // (4 * config.block_m))
    return min(max(1, target.multiprocessors // max(1, tiles)), most)
