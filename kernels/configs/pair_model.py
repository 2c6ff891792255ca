"""The time that a launch of both gradients should take: model.py's, for two kinds of programs."""

import functools
import math

from .config import BackwardConfig, Traits
from .model import (
    last_sums_time,
    launch_time,
    program_clocks,
    resident_key,
    resident_programs,
    residents,
)


def pair_key(arithmetic: str, pair: BackwardConfig, aligned: bool) -> str:
    """The name of a pair in resources.json."""
    rows, columns, depth = pair.weight.tile("backward_weight")
    input = resident_key("forward", arithmetic, pair.input, aligned)
    return f"{input} with {rows}x{columns}x{depth}"


@functools.cache
def pair_residents(pair: BackwardConfig, traits: Traits) -> int:
    """`resident_programs` of a launch of both gradients: as many as of either, if not compiled."""
    key = pair_key(traits.arithmetic, pair, traits.aligned)
    found = residents().get(traits.target.family, {}).get(key)
    if found is not None:
        return max(1, found)
    return min(
        resident_programs("forward", pair.input, traits),
        resident_programs("backward_weight", pair.weight, traits),
    )


def pair_clocks(
    pair: BackwardConfig,
    splits: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
    resident: int = 1,
) -> tuple[float, float]:
    """Clocks of a program of grad_input and of one of grad_weight."""
    of_input = program_clocks("forward", pair.input, m, k, n, traits, True, resident)
    terms = math.ceil(m / splits)
    of_weight = program_clocks("backward_weight", pair.weight, n, k, terms, traits, False, resident)
    return of_input, of_weight


def pair_time(
    pair: BackwardConfig,
    splits: int,
    batch: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
) -> float:
    """Microseconds of one launch that computes grad_input and grad_weight by `pair`.

    As in `modelled_time`; the longer programs start first.
    """
    weight, target = pair.weight, traits.target
    inputs = batch * math.ceil(m / pair.input.block_m) * math.ceil(k / pair.input.block_n)
    weights = batch * math.ceil(n / weight.block_n) * math.ceil(k / weight.block_k) * splits
    resident = pair_residents(pair, traits)
    # No more than there are.
    resident = max(1, min(resident, math.ceil((inputs + weights) / target.multiprocessors)))
    lengths = pair_clocks(pair, splits, m, n, k, traits, resident)
    (long, longs), (short, shorts) = sorted(zip(lengths, (inputs, weights), strict=True))[::-1]
    places = target.multiprocessors * resident
    waves, rest = divmod(longs, places)
    clocks = waves * long
    if rest:
        # What the last of the longer ones leave free goes to the shorter ones.
        clocks += long
        shorts = max(0, shorts - (places - rest) * int(long / short))
    clocks += math.ceil(shorts / places) * short
    stored = min(weight.block_n, n) * min(weight.block_k, k)
    moved = batch * (m * n + 2 * m * k + 2 * n * k) * traits.dtype.itemsize
    if splits > 1:
        moved += 8 * splits * batch * n * k
    return launch_time(clocks, moved, target) + last_sums_time(splits, stored, target)
