"""An ensemble of the demo's networks, trained one after another and, by BatchedLinear, at once."""

import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo.digits import Digits, Row, epoch_orders, learning_rate, network, now

# Networks in the ensemble, and its batches.
MEMBERS, ENSEMBLE_BATCH = 16, 64
# How far their outputs may part, trained at once or not, as a share of the largest.
ENSEMBLE_TOLERANCE = 1e-2


def train_ensemble(layer: Any, batched: Any, digits: Digits, epochs: int, seed: int) -> Row:
    """Trains MEMBERS networks from their own seeds, one after another and all at once, in turn.

    Each batch goes to every member. At once, it is expanded, not copied, and the loss is the sum of
    the members', so that each gets its own gradient.
    """
    members = []
    for member in range(MEMBERS):
        torch.manual_seed(seed + member)
        members.append(network(layer).to(digits.images.device))
    ensemble = nn.Sequential(*map(batched.from_linears, zip(*members, strict=True)))
    labels = digits.labels.repeat(MEMBERS, 1)
    rate = learning_rate(ENSEMBLE_BATCH)
    optimizers = [torch.optim.SGD(member.parameters(), lr=rate) for member in members]
    together = torch.optim.SGD(ensemble.parameters(), lr=rate)

    def step_each(rows: Tensor) -> None:
        for member, optimizer in zip(members, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(member(digits.images[rows]), digits.labels[rows]).backward()
            optimizer.step()

    def step_all(rows: Tensor) -> None:
        together.zero_grad()
        output = ensemble(digits.images[rows].expand(MEMBERS, -1, -1))
        loss = F.cross_entropy(output.flatten(0, 1), labels[:, rows].flatten())
        (MEMBERS * loss).backward()
        together.step()

    seconds: dict[Any, list[float]] = {step_each: [], step_all: []}
    for order in epoch_orders(digits, epochs, seed):
        for rows in order.split(ENSEMBLE_BATCH):
            for step, spent in seconds.items():
                start = now(rows.device)
                step(rows)
                spent.append(now(rows.device) - start)
    with torch.no_grad():
        apart = torch.stack([member(digits.images) for member in members])
        gap = (ensemble(digits.images.expand(MEMBERS, -1, -1)) - apart).abs().max()
    return {
        "members": MEMBERS,
        "batch_size": ENSEMBLE_BATCH,
        "step_seconds_one_after_another": statistics.median(seconds[step_each]),
        "step_seconds_at_once": statistics.median(seconds[step_all]),
        "largest_gap_of_outputs": gap.item() / apart.abs().max().item(),
    }


def conclude_ensemble(row: Row, interpreted: bool) -> None:
    """Prints what training at once saves; ends the process where its outputs are others."""
    if not row["largest_gap_of_outputs"] <= ENSEMBLE_TOLERANCE:
        gap = row["largest_gap_of_outputs"]
        sys.exit(f"the ensemble trained at once disagrees by {gap:.1e} of its outputs")
    if interpreted:
        return
    apart, together = row["step_seconds_one_after_another"], row["step_seconds_at_once"]
    print(
        f"A step of {row['members']} networks on {row['batch_size']} takes {1e3 * apart:.2f} ms "
        f"one after another and {1e3 * together:.2f} ms at once, {apart / together:.1f} times less."
    )
