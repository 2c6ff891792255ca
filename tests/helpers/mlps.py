"""Gated MLPs as models write them, and what they come to."""

from torch import Tensor, nn


class MLP(nn.Module):
    """As Llama has it."""

    def __init__(self, act_fn: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(5, 7, bias=False)
        self.up_proj = nn.Linear(5, 7, bias=False)
        self.down_proj = nn.Linear(7, 5, bias=False)
        self.act_fn = nn.SiLU() if act_fn is None else act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def width(self) -> int:
        return self.gate_proj.out_features


def with_features(gate: int, up: int = 7) -> MLP:
    mlp = MLP()
    mlp.gate_proj, mlp.up_proj = nn.Linear(5, gate), nn.Linear(5, up)
    return mlp
