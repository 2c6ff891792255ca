"""Whether both gradients of a layer take one launch, and in which configuration."""

import functools

import torch

from .choose import INVARIANT_ROWS, choose_splits, ranked
from .configs import BackwardConfig, Target
from .model import LAUNCH
from .pair_model import pair_clocks, pair_time
from .pairs import legal_pairs


@functools.lru_cache(maxsize=4096)
def ranked_pairs(
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    batch_invariant: bool = False,
) -> tuple[tuple[BackwardConfig, float], ...]:
    """Every legal pair and its modelled microseconds, the one with the least first.

    The arguments are as `choose.ranked` has them; aligned says it of all three operands.
    """
    if batch_invariant:
        batch, m, aligned = 1, INVARIANT_ROWS, False
    sizes, how = (batch, m, n, k), (dtype, precision, aligned, target)
    choices = []
    for pair in legal_pairs(*how):
        splits = choose_splits(pair.weight, *sizes, target)
        choices.append((pair, pair_time(pair, splits, *sizes, *how)))
    return tuple(sorted(choices, key=lambda choice: choice[1]))


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
    """The first of `ranked_pairs`."""
    return ranked_pairs(batch, m, n, k, dtype, precision, aligned, target, batch_invariant)[0][0]


def time_apart(
    batch: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    descriptors: bool = False,
) -> float:
    """Modelled microseconds of a launch for each gradient, of a weight that is contiguous.

    The second starts while the first ends.
    """
    how = (dtype, precision, aligned, target)
    given = (batch, m, k, n, *how, False, descriptors, True)
    of_input = ranked("forward", *given)[0].microseconds
    of_weight = ranked("backward_weight", batch, m, n, k, *how)[0].microseconds
    return of_input + of_weight - LAUNCH / 2


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
    programs leave idle; in two each product may have its own best configuration, or a kind of
    kernel that has no pair.
    """
    given = (batch, m, n, k, dtype, precision, aligned, target)
    pair, microseconds = ranked_pairs(*given)[0]
    return pair if microseconds < time_apart(*given, descriptors) else None


def starts_with_input(
    pair: BackwardConfig,
    splits: int,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    target: Target,
) -> bool:
    """Whether grad_input's programs are the longer ones, which are to start first."""
    of_input, of_weight = pair_clocks(pair, splits, m, n, k, dtype, precision, target)
    return of_input > of_weight
