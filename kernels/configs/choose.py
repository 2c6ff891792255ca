"""Which configuration to use: the one with the least modelled time.

Nothing here imports Triton or measures anything: a choice costs microseconds, and no user waits for
autotuning.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

from .config import KINDS, LONG_SUM, Config, Kernel, Kind, Target, Traits
from .model import modelled_time
from .tiles import legal_configs

# The most rows of which each is worth multiply-adds of its own.
_GEMV_ROWS = 4
# For which the configuration of every batch is chosen where it may not depend on the batch.
INVARIANT_ROWS = 128


class Choice(NamedTuple):
    """A configuration, and the microseconds that it should take."""

    config: Config
    microseconds: float


@functools.lru_cache(maxsize=4096)
def ranked(
    kernel: Kernel,
    batch: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
    reads_outputs: bool = False,
    batch_invariant: bool = False,
) -> tuple[Choice, ...]:
    """Every legal configuration of every kind, the one with the least modelled time first.

    It is for `batch` layers of `m` rows, `n` outputs and `k` inputs.

    Args:
        kernel, traits: as `why_illegal`'s.
        reads_outputs: whether the weight's stride is 1 along its outputs, as grad_input's is,
            instead of along its inputs.
        batch_invariant: whether the choice is to be the same for every batch.
    """
    kinds = KINDS
    if batch_invariant:
        # What else of a call may differ from batch to batch, alignment and offsets too.
        batch, m = 1, INVARIANT_ROWS
        traits = traits._replace(aligned=False, descriptors=False, wide=False)
        kinds = ("tiled",)  # no sum is split
    sizes = (batch, m, n, k)
    choices = []
    for config in candidates(kernel, *sizes, traits, reads_outputs, kinds):
        splits = 1
        if kernel == "backward_weight":
            splits = choose_splits(config, *sizes, traits.target, traits.precision)
        time = modelled_time(kernel, config, *sizes, traits, reads_outputs, splits)
        choices.append(Choice(config, time))
    return tuple(sorted(choices, key=lambda choice: choice.microseconds))


def candidates(
    kernel: Kernel,
    batch: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
    reads_outputs: bool = False,
    kinds: tuple[Kind, ...] = KINDS,
) -> list[Config]:
    """Every configuration of `kinds` that `ranked` ranks; the arguments are its own."""
    found: list[Config] = []
    for kind in kinds if kernel == "forward" else ("tiled",):
        if kind == "gemv" and m > _GEMV_ROWS:
            continue
        for config in legal_configs(kernel, traits, kind):
            # Of the two ways to read a weight one is fast; the interpreter has but one.
            slow = config.reads_outputs != reads_outputs and traits.target.family != "interpreter"
            if kind != "gemv" or not slow:
                found += _with_splits(config, batch, m, n, k, traits.target)
    return found


def choose(
    kernel: Kernel,
    batch: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
    reads_outputs: bool = False,
    batch_invariant: bool = False,
) -> Config:
    """The first of `ranked`.

    It needs no measurement, and is a default rather than an optimum: on an H100 the chosen tile
    runs at 0.99 of the best one's speed in bfloat16, 0.98 in float32 and 0.97 in TF32, as geometric
    means, and at 0.92, 0.77 and 0.63 at worst
    (benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json).
    """
    choices = ranked(kernel, batch, m, n, k, traits, reads_outputs, batch_invariant)
    return choices[0].config


def _with_splits(
    config: Config, batch: int, m: int, n: int, k: int, target: Target
) -> Iterator[Config]:
    """`config`, and if it can split its sums, with as many parts as fill the GPU once or twice.

    Each part has at least four steps, so that a part's round trip through memory is worth it.
    """
    yield config
    if config.kind != "split_k":
        return
    tiles = batch * math.ceil(m / config.block_m) * math.ceil(n / config.block_n)
    most = math.ceil(k / config.block_k) // 4
    splits = {min(most, full * target.multiprocessors // max(1, tiles)) for full in (1, 2)}
    for parts in sorted(splits - {config.splits}):
        if parts > 1:
            yield dataclasses.replace(config, splits=parts)


def choose_splits(
    config: Config, batch: int, m: int, n: int, k: int, target: Target, precision: str = "ieee"
) -> int:
    """How many programs share the M reduction of each grad_weight tile.

    One, unless the tiles alone leave multiprocessors idle; then as many as fill them, with at least
    four steps each so that a partial sum's round trip through memory is worth it. Of pieces the
    parts are long sums too.
    """
    tiles = batch * math.ceil(n / config.block_n) * math.ceil(k / config.block_k)
    most = max(1, m // (LONG_SUM if precision == "bf16x6" else 4 * config.block_m))
    return min(max(1, target.multiprocessors // max(1, tiles)), most)
