"""Convert a BERT-sized encoder, tune it, and time it before and after, on a GPU or a CPU.

`python examples/tune.py [--rows 64] [--seconds 30] [--train]`. In eval mode PyTorch's own
`nn.TransformerEncoderLayer` takes a fast path that calls no layer; this encoder calls its layers.
"""

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear


class EncoderLayer(nn.Module):
    """As in BERT-base: 768 features, 12 heads, 3072 in between, gelu."""

    def __init__(self, features: int = 768, heads: int = 12, between: int = 3072) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(features, features) for _ in range(4)
        )
        self.up, self.down = nn.Linear(features, between), nn.Linear(between, features)
        self.act = nn.GELU()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)

    def forward(self, input: Tensor) -> Tensor:
        query, key, value = (
            layer(input).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        input = self.norm1(input + self.out(attended))
        return self.norm2(input + self.down(self.act(self.up(input))))


def in_turn(models: dict[str, nn.Module], batch: Tensor, rounds: int = 15) -> dict[str, float]:
    """Milliseconds of a step, the median of rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 2):  # two to warm up
        for name, model in models.items():
            started = time.perf_counter()
            output = model(batch)
            if output.requires_grad:
                output.square().mean().backward()
            if batch.is_cuda:
                torch.cuda.synchronize()
            if number > 1:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64, help="words of the batch")
    parser.add_argument("--seconds", type=float, default=30, help="that tuning may take")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    arguments = parser.parse_args()
    torch.set_grad_enabled(arguments.train)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = EncoderLayer().train(arguments.train).to(device)
    ours, batch = copy.deepcopy(theirs), torch.randn(1, arguments.rows, 768, device=device)

    print(fastlinear.convert(ours, fold_activations=True), end="\n\n")
    print(fastlinear.tune(ours, batch, seconds=arguments.seconds), end="\n\n")
    print(fastlinear.explain(ours.up, batch), end="\n\n")

    torch.testing.assert_close(ours(batch), theirs(batch), rtol=1e-4, atol=1e-4)
    found = in_turn({"nn.Linear": theirs, "fastlinear, tuned": ours}, batch)
    for name, milliseconds in found.items():
        print(f"{name:20} {milliseconds:8.3f} ms for {arguments.rows} rows")


if __name__ == "__main__":
    main()
