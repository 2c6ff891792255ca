"""The sweep in small, for pytest-benchmark: `make bench-pytest`.

Compare commits with ARGS="--benchmark-autosave" on one and ARGS="--benchmark-compare" on the other.
Times are wall times of a call, until the device is done. Groups are points; the arms of a group are
to be compared with each other.
"""

import itertools
from typing import Any

import pytest
import torch

from benchmarks.shared.measure import Clock
from benchmarks.shared.shapes import LAYERS
from benchmarks.speed.arms import Arm, arms
from benchmarks.speed.points import MODES
from benchmarks.speed.problem import Problem, errors, step, why_wrong
from fastlinear import use_backend

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ARMS = [arm for arm in arms(DEVICE).values() if arm.absent is None]
POINTS = list(itertools.product(("mnist-1", "bert-base-up"), (1, 64), MODES))


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
@pytest.mark.parametrize(("shape", "rows", "mode"), POINTS)
def test_linear(benchmark: Any, shape: str, rows: int, mode: str, arm: Arm) -> None:
    layer = LAYERS[shape]
    benchmark.group = f"{shape}, {rows} rows, {mode}"
    torch.manual_seed(0)
    point = {"layer": layer, "rows": rows, "activation": layer.activation, "bias": layer.bias}
    problem = Problem(point, DTYPE, DEVICE)
    operands = problem.weight, problem.bias, problem.activation
    native = errors(problem.results(ARMS[0].make(*operands)), problem.exact)
    clock = Clock(DEVICE)
    with use_backend(arm.backend):
        call = arm.make(*operands)
        assert why_wrong(problem, errors(problem.results(call), problem.exact), native) is None
        run = step(problem, call, mode)

        def timed() -> None:
            run()
            clock.synchronize()

        benchmark(timed)
