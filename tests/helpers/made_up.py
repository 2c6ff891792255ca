"""Made-up measurements: clocks that a test sets, tables with the rows it needs, and a layer."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlinear
from fastlinear import __main__ as command
from fastlinear import _machine as machine
from fastlinear.choice import table as tables
from fastlinear.choice.table import PYTORCH, Key, Row, Table
from fastlinear.kernels.configs.config import Config
from fastlinear.tuning.stopwatch import Call, Measure

N, K = 24, 40
TILE = Config(32, 32, 32, num_warps=1, num_stages=1)
SMALL = Config(16, 16, 16, num_warps=1, num_stages=1)
NAME = "triton-interpreter.json"
LAYER = ("--shapes", f"{N}x{K}", "--dtypes", "float32")


class Clocks:
    """Says that kernels take `kernel` and PyTorch `pytorch` microseconds, and runs each once."""

    def __init__(self, kernel: float = 1.0, pytorch: float = 2.0) -> None:
        self.kernel, self.pytorch = kernel, pytorch
        self.asked = 0

    def __call__(self, calls: dict[str, Call], clock: str) -> dict[str, list[float]]:
        assert clock in ("device", "wall")
        self.asked += 1
        for call in calls.values():
            call()
        slow = (PYTORCH, *tables.LIBRARIES)
        return {name: [self.pytorch if name in slow else self.kernel] * 3 for name in calls}


def run(clocks: Measure, *given: str) -> int:
    return command.tune(command.arguments_of(["tune", *LAYER, *given]), clocks)


def rows_of(path: Path) -> dict[tuple[str, int], Row]:
    return {(row.product, row.m): row for row in tables.read(path).rows}


def row(product: Any, m: int, candidate: Config | str, **changes: Any) -> Row:
    bias = product != "grad_input"
    wanted = "input weight bias" if product == "training" else ""
    key = Key(product, "float32", "ieee", None, bias, wanted, N, K, m)
    return Row(*key, candidate, 2.0, 3.0, 4.0, 5.0)._replace(**changes)


def table(*rows: Row, **changes: Any) -> Table:
    given = Table(machine.INTERPRETER, "none", date="2026-01-02", rows=rows, **machine.software())
    return given._replace(**changes)


def layer_and_input(m: int, **how: Any) -> tuple[fastlinear.Linear, Tensor]:
    return fastlinear.Linear(K, N, **how), torch.randn(m, K)


def assert_like_pytorch(layer: fastlinear.Linear, input: Tensor, output: Tensor) -> None:
    torch.testing.assert_close(output, F.linear(input, layer.weight, layer.bias))


def converted(model: nn.Module) -> nn.Module:
    fastlinear.convert(model)
    return model
