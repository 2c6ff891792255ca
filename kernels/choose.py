"""Which configuration to use: the one with the least modelled time.

Nothing here imports Triton or measures anything: a choice costs microseconds, and no user waits for
autotuning.
"""

import dataclasses
import functools
import math

import torch

from .configs import KINDS, BackwardConfig, Config, Kernel, Kind, Target, arithmetic
from .pairs import legal_pairs
from .tiles import legal_configs

# Multiply-adds a clock on one multiprocessor, of H100's order;
# only the ratio to bandwidth matters to the choice.
_RATE = {"16-bit": 2048, "tf32": 1024, "float32": 128, "float64": 64}
_PLAIN_RATE = {"16-bit": 128, "tf32": 128, "float32": 128, "float64": 64}
# Bytes a clock that L2, and that memory, feeds one multiprocessor, of H100's order.
_BANDWIDTH = 64
_MEMORY_BANDWIDTH = 14.5
# The share of the shorter one of computing and reading that the longer one does not hide.
_EXPOSED = 0.25
# Clocks from the last split's part to its sum, besides what is read.
_ARRIVAL = 2000
# Of a step's time where descriptors spare threads the addresses. Not measured.
_BY_DESCRIPTORS = 0.8
# The most rows of which each is worth multiply-adds of its own.
_GEMV_ROWS = 4
# For which the configuration of every batch is chosen where it may not depend on the batch.
_INVARIANT_ROWS = 128
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# Waves of programs beyond which it does not matter that two launches start, and run out, twice.
_WAVES_OF_ONE_LAUNCH = 8


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
    reads_outputs: bool = False,
    batch_invariant: bool = False,
) -> Config:
    """The configuration with the least modelled time.

    It is for `batch` layers of `m` rows, `n` outputs and `k` inputs; reads_outputs says that the
    weight's stride is 1 along its outputs, as that of grad_input's is, and batch_invariant that the
    choice is to be the same for every batch. The other arguments are those of `why_illegal`.

    Time is waves of programs over the multiprocessors, times a step's arithmetic and operand
    traffic, or the time to read and write everything once, whichever is longer. It needs no
    measurement, and is a default rather than an optimum: among tiled kernels on an H100 the chosen
    tile runs at 0.99 of the best one's speed in bfloat16, 0.97 in float32 and 0.89 in TF32, as
    geometric means, and at 0.92, 0.63 and 0.47 at worst
    (benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json). The other kinds have not been measured.
    """
    if batch_invariant:
        # What else of a call may differ from batch to batch, alignment too.
        batch, m, aligned, descriptors = 1, _INVARIANT_ROWS, False, False
    rows, columns, terms = (n, k, m) if kernel == "backward_weight" else (m, n, k)
    arithmetics = arithmetic(dtype, precision)
    moved = batch * (rows * terms + columns * terms + rows * columns) * dtype.itemsize
    reading = moved / (_MEMORY_BANDWIDTH * target.multiprocessors)

    def modelled_time(config: Config) -> float:
        tile_rows, tile_columns, _ = config.tile(kernel)
        tiles = batch * math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
        rate = _PLAIN_RATE if config.kind == "gemv" else _RATE
        step = tile_rows * tile_columns / rate[arithmetics]
        step += (tile_rows + tile_columns) * dtype.itemsize / _BANDWIDTH
        waves = tiles * config.splits / target.multiprocessors
        if config.kind != "gemv":  # many of whose programs share a multiprocessor
            waves = math.ceil(waves)
        computing = max(1.0, waves) * step * max(1, terms) / config.splits
        if config.kind == "persistent":
            computing *= _BY_DESCRIPTORS
        if config.splits > 1:
            parts = (config.splits + 1) * tile_rows * tile_columns * max(4, dtype.itemsize)
            computing += _ARRIVAL + parts / _BANDWIDTH
        return max(computing, reading) + _EXPOSED * min(computing, reading)

    given = (dtype, precision, aligned, target, activation, descriptors)
    kinds: tuple[Kind, ...] = ("tiled",) if batch_invariant else KINDS
    return min(candidates(kernel, m, k, *given, reads_outputs, kinds), key=modelled_time)


def candidates(
    kernel: Kernel,
    m: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    activation: bool = False,
    descriptors: bool = False,
    reads_outputs: bool = False,
    kinds: tuple[Kind, ...] = KINDS,
) -> list[Config]:
    """Every configuration of `kinds` that `choose` chooses among; the arguments are its own."""
    given = (kernel, dtype, precision, aligned, target, activation, descriptors)
    found = list(legal_configs(*given))
    if kernel != "forward":
        return found
    if "persistent" in kinds:
        found += legal_configs(*given, "persistent")
    if "gemv" in kinds and m <= _GEMV_ROWS:
        few = legal_configs(*given, "gemv")
        found += [config for config in few if config.reads_outputs == reads_outputs]
    if "split_k" in kinds:
        found += [
            dataclasses.replace(config, splits=splits)
            for config in legal_configs(*given, "split_k")
            for splits in _SPLITS
            if splits * 4 * config.block_k <= max(k, 4 * config.block_k)
        ]
    return found


def choose_splits(config: Config, batch: int, m: int, n: int, k: int, target: Target) -> int:
    """How many programs share the M reduction of each grad_weight tile.

    One, unless the tiles alone leave multiprocessors idle; then as many as fill them, with at least
    four steps each so that a partial sum's round trip through memory is worth it.
    """
    tiles = batch * math.ceil(n / config.block_n) * math.ceil(k / config.block_k)
    most = max(1, m // (4 * config.block_m))
    return min(max(1, target.multiprocessors // max(1, tiles)), most)


def _program_time(
    config: Config, kernel: Kernel, terms: int, dtype: torch.dtype, precision: str
) -> float:
    """Modelled clocks of one program that sums `terms` products of each element of its tile."""
    rows, columns, depth = config.tile(kernel)
    multiply_adds = rows * columns * depth / _RATE[arithmetic(dtype, precision)]
    traffic = (rows + columns) * depth * dtype.itemsize / _BANDWIDTH
    store = rows * columns * dtype.itemsize / _BANDWIDTH
    return math.ceil(terms / depth) * (multiply_adds + traffic) + store


def _times(
    pair: BackwardConfig,
    splits: int,
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
) -> tuple[float, float, float]:
    """Modelled clocks of a grad_input program, of a grad_weight program, and of all together."""
    input, weight = pair.input, pair.weight
    input_time = _program_time(input, "forward", n, dtype, precision)
    weight_time = _program_time(weight, "backward_weight", m // splits, dtype, precision)
    inputs = batch * math.ceil(m / input.block_m) * math.ceil(k / input.block_n)
    weights = batch * math.ceil(n / weight.block_n) * math.ceil(k / weight.block_k) * splits
    return input_time, weight_time, inputs * input_time + weights * weight_time


def starts_with_input(
    pair: BackwardConfig,
    splits: int,
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
) -> bool:
    """Whether grad_input's programs are the longer ones, which are to start first."""
    input_time, weight_time, _ = _times(pair, splits, batch, m, n, k, dtype, precision)
    return input_time > weight_time


@functools.lru_cache(maxsize=4096)
def choose_pair(
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    batch_invariant: bool = False,
) -> BackwardConfig:
    """The pair with the least modelled time, for a launch that computes both products.

    Time is that of all programs over the multiprocessors, and then of a longest one: however they
    are dealt out, none ends later. batch_invariant is as in `choose`.
    """
    if batch_invariant:
        batch, m, aligned = 1, _INVARIANT_ROWS, False
    return min(
        legal_pairs(dtype, precision, aligned, target),
        key=lambda pair: sum(_wave_times(pair, batch, m, n, k, dtype, precision, target)),
    )


def _wave_times(
    pair: BackwardConfig,
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    target: Target,
) -> tuple[float, float]:
    """Modelled clocks of each multiprocessor's share, and of a longest program."""
    splits = choose_splits(pair.weight, batch, m, n, k, target)
    *programs, work = _times(pair, splits, batch, m, n, k, dtype, precision)
    return work / target.multiprocessors, max(programs)


@functools.lru_cache(maxsize=4096)
def choose_backward(
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    descriptors: bool = False,
) -> BackwardConfig | None:
    """The pair to compute grad_input and grad_weight with in one launch; None for two launches.

    One launch spares the start of another, and fills the multiprocessors that one product's last
    programs leave idle. After many waves neither shows, and each product may have its own best
    configuration, or a kind of kernel that has no pair.
    """
    given = (batch, m, n, k, dtype, precision)
    pair = choose_pair(*given, aligned, target)
    share, longest = _wave_times(pair, *given, target)
    if share > _WAVES_OF_ONE_LAUNCH * longest:
        return None
    alone = choose(
        "forward", batch, m, k, n, dtype, precision, aligned, target, descriptors=descriptors
    )
    return None if alone.kind == "persistent" else pair
