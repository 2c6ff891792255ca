"""scikit-learn's handwritten digits, and a small network that learns them."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shared.measure import peak_bytes

# How far two trainings may part, as a share of the loss before the first step, and in digits told
# differently at the end. Rounding alone, nn.Linear in float32 against float64, parts them by up to
# 1e-4 and one digit (20 epochs, 6 seeds, 3 of them at batch size 1; a Xeon): it decides a ReLU
# whose input is about zero, and the steps after that differ. A bias without its gradient parts
# them by 3e-3 in 5 epochs.
LOSS_TOLERANCE = 1e-3
DIGITS_TOLERANCE = 2

Row = dict[str, Any]  # what was measured of one training, as it goes into the JSON


@dataclass
class Digits:
    """Images (rows, 64) in [0, 1] and labels (rows,): those to learn from and those to test on."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_digits(rows: int | None, seed: int, device: torch.device) -> Digits:
    """The first `rows` of the shuffled digits (None: all), a fifth of them kept for the test."""
    from sklearn.datasets import load_digits

    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:rows]
    images = (pixels[order] / 16).to(device, torch.float32)
    labels = labels[order].to(device, torch.int64)
    tested = len(order) // 5
    return Digits(images[tested:], labels[tested:], images[:tested], labels[:tested])


def epoch_orders(digits: Digits, epochs: int, seed: int) -> list[Tensor]:
    """The order in which each epoch takes the digits to learn from."""
    shuffler = torch.Generator().manual_seed(seed)
    size, device = len(digits.labels), digits.labels.device
    return [torch.randperm(size, generator=shuffler).to(device) for _ in range(epochs)]


def learning_rate(batch_size: int) -> float:
    """Grows with the root of the batch, as its gradient's noise falls; at 1 the full set swings."""
    return min(0.05 * math.sqrt(batch_size), 0.5)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def network(layer: type[nn.Linear]) -> nn.Sequential:
    """Linear(64, 128) -> ReLU -> Linear(128, 10); fastlinear.Linear applies the ReLU itself."""
    if layer is nn.Linear:
        return nn.Sequential(layer(64, 128), nn.ReLU(), layer(128, 10))
    return nn.Sequential(layer(64, 128, activation="relu"), layer(128, 10))  # type: ignore[call-arg]


class Training:
    """The network, built of one of the layers, on its way through the digits."""

    def __init__(self, layer: type[nn.Linear], digits: Digits, batch_size: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.digits = digits
        self.batch_size = batch_size
        self.network: nn.Module = network(layer).to(digits.images.device)
        self.optimizer = self.make_optimizer()
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.epoch_seconds: list[float] = []

    def make_optimizer(self) -> torch.optim.SGD:
        return torch.optim.SGD(self.network.parameters(), lr=learning_rate(self.batch_size))

    def step(self, rows: Tensor) -> None:
        self.optimizer.zero_grad()
        output = self.network(self.digits.images[rows])
        F.cross_entropy(output, self.digits.labels[rows]).backward()
        self.optimizer.step()

    def epoch(self, order: Tensor) -> None:
        """One pass over the digits in this order, timed."""
        start = now(order.device)
        for rows in order.split(self.batch_size):
            self.step(rows)
        self.epoch_seconds.append(now(order.device) - start)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Notes the loss over all the digits to learn from and the accuracy on those to test on."""
        output = self.network(self.digits.images)
        self.losses.append(F.cross_entropy(output, self.digits.labels).item())
        guesses = self.network(self.digits.test_images).argmax(1)
        self.accuracies.append((guesses == self.digits.test_labels).double().mean().item())

    def warm_up(self) -> None:
        """A few steps of each size that an epoch has: kernels get compiled, allocators filled."""
        rows = torch.arange(len(self.digits.labels), device=self.digits.labels.device)
        batches = rows.split(self.batch_size)
        for batch in (batches[0], batches[-1]):
            for _ in range(3):
                self.step(batch)

    def step_memory(self) -> int:
        """Bytes that a step needs beside the parameters and the set of digits.

        `peak_bytes` says what that is; on a CPU the batch is part of it.
        """
        rows = torch.arange(self.batch_size, device=self.digits.labels.device)
        self.optimizer.zero_grad()
        return peak_bytes(lambda: self.step(rows), list(self.network.parameters()))


def loss_gap(row: Row, native: Row) -> float:
    """Largest difference of losses after the same epoch, as a share of the first; NaN if any is."""
    losses, expected = (torch.tensor(of["losses"], dtype=torch.float64) for of in (row, native))
    return ((losses - expected).abs().max() / expected[0]).item()
