"""Whether both gradients of a layer take one launch, and in which configuration."""

import functools

from .choose import INVARIANT_ROWS, choose_splits, ranked
from .config import BackwardConfig, Traits
from .model import LAUNCH
from .pair_model import pair_clocks, pair_time
from .tiles import legal_pairs


@functools.lru_cache(maxsize=4096)
def ranked_pairs(
    batch: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
    batch_invariant: bool = False,
) -> tuple[tuple[BackwardConfig, float], ...]:
    """Every legal pair and its modelled microseconds, the one with the least first.

    The arguments are as `choose.ranked` has them; aligned says it of all three operands.
    """
    if batch_invariant:
        batch, m = 1, INVARIANT_ROWS
        traits = traits._replace(aligned=False, wide=False)
    choices = []
    for pair in legal_pairs(traits):
        splits = choose_splits(pair.weight, batch, m, n, k, traits.target, traits.precision)
        choices.append((pair, pair_time(pair, splits, batch, m, n, k, traits)))
    return tuple(sorted(choices, key=lambda choice: choice[1]))


def choose_pair(
    batch: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
    batch_invariant: bool = False,
) -> BackwardConfig:
    """The first of `ranked_pairs`."""
    return ranked_pairs(batch, m, n, k, traits, batch_invariant)[0][0]


def time_apart(
    batch: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
) -> float:
    """Modelled microseconds of a launch for each gradient, of a weight that is contiguous.

    The second starts while the first ends.
    """
    of_input = ranked("forward", batch, m, k, n, traits, reads_outputs=True)[0].microseconds
    of_weight = ranked("backward_weight", batch, m, n, k, traits)[0].microseconds
    return of_input + of_weight - LAUNCH / 2


@functools.lru_cache(maxsize=4096)
def choose_backward(
    batch: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
) -> BackwardConfig | None:
    """The pair to compute grad_input and grad_weight with in one launch; None for two launches.

    One launch spares the start of another, and fills the multiprocessors that one product's last
    programs leave idle; in two each product may have its own best configuration, or a kind of
    kernel that has no pair.
    """
    pair, microseconds = ranked_pairs(batch, m, n, k, traits)[0]
    return pair if microseconds < time_apart(batch, m, n, k, traits) else None


def starts_with_input(
    pair: BackwardConfig,
    splits: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
) -> bool:
    """Whether grad_input's programs are the longer ones, which are to start first."""
    of_input, of_weight = pair_clocks(pair, splits, m, n, k, traits)
    return of_input > of_weight
