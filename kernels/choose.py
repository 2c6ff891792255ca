"""Which configuration to use: the one with the least modelled time.

Nothing here imports Triton or measures anything: a choice costs microseconds, and no user waits for
autotuning.
"""

import functools
import math

import torch

from .configs import Config, Kernel, Target, arithmetic
from .tiles import legal_configs

# Multiply-adds a clock on one multiprocessor, of H100's order;
# only the ratio to bandwidth matters to the choice.
_RATE = {"16-bit": 2048, "tf32": 1024, "float32": 128, "float64": 64}
# Bytes a clock that L2 feeds one multiprocessor, of H100's order.
_BANDWIDTH = 64


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
    descriptors: bool = False,
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

    # The model is of tiles on matrix instructions alone.
    legal = legal_configs(kernel, dtype, precision, aligned, target, activation, descriptors)
    return min(legal, key=modelled_time)


def choose_splits(config: Config, batch: int, m: int, n: int, k: int, target: Target) -> int:
    """How many programs share the M reduction of each grad_weight tile.

    One, unless the tiles alone leave multiprocessors idle; then as many as fill them, with at least
    four steps each so that a partial sum's round trip through memory is worth it.
    """
    tiles = batch * math.ceil(n / config.block_n) * math.ceil(k / config.block_k)
    most = max(1, m // (4 * config.block_m))
    return min(max(1, target.multiprocessors // max(1, tiles)), most)
