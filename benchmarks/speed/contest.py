"""One point of the sweep: which arms are right there, and their times when they take turns."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.shared.measure import Clock, peak_bytes
from benchmarks.shared.names import NATIVE
from benchmarks.shared.shapes import least_bytes, operations
from benchmarks.shared.watch import LeftOut
from benchmarks.speed.arms import Arm, Call
from benchmarks.speed.points import Point, about
from benchmarks.speed.problem import Problem, errors, step, why_wrong
from fastlinear import use_backend

MOST_SECONDS = 3.0  # for the rounds of a point's mode, once there are three

Drop = Callable[[str, str], None]  # is told of an arm, and why it is left out


def right_calls(problem: Problem, contestants: list[Arm], drop: Drop) -> dict[str, Call]:
    """The arms that compute the point as nn.Linear does, which is the first of them."""
    calls: dict[str, Call] = {}
    native: dict[str, float] = {}
    for arm in contestants:
        with use_backend(arm.backend):
            try:
                call = arm.make(problem.weight, problem.bias, problem.activation)
                found = errors(problem.results(call), problem.exact)
            except LeftOut as error:  # it is known what is wrong there
                tqdm.write(f"without {arm.name} at {problem.input.shape}: {error}")
                continue
            except Exception as error:  # a peer may raise anything for what it does not take
                drop(arm.name, said(error))
                if arm.name == NATIVE:
                    return {}
                continue
        native = found if arm.name == NATIVE else native
        reason = why_wrong(problem, found, native)
        if reason is None:
            calls[arm.name] = call
        else:
            drop(arm.name, reason)
    return calls


def said(error: Exception) -> str:
    """The first line of what an error says, and its kind."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


@dataclass(frozen=True)
class Contest:
    """What all points have in common.

    contestants: the arms; nn.Linear is the first of them.
    rounds: in which all arms are timed.
    roof: operations and bytes a second that the device reaches.
    """

    contestants: list[Arm]
    clock: Clock
    dtype: torch.dtype
    rounds: int
    roof: dict[str, float]

    @property
    def backends(self) -> dict[str, str]:
        return {arm.name: arm.backend for arm in self.contestants}


Steps = dict[str, Callable[[], object]]  # what is timed, by the arm
Times = dict[str, list[float]]  # seconds, by the arm, one for each round


def measure(
    contest: Contest, point: Point, drop: Drop, deadline: float
) -> Iterator[dict[str, Any]]:
    """The rows of a point: one for each arm and mode that is right, until `deadline`."""
    problem = Problem(point, contest.dtype, contest.clock.device)
    calls = right_calls(problem, contest.contestants, drop)
    for mode in point["modes"]:
        if time.monotonic() > deadline:
            return
        timed, prepared, uncaptured = _prepare(contest, problem, calls, mode, drop)
        if NATIVE not in timed:
            continue
        if contest.clock.gpu and uncaptured:
            layer = point["layer"].name
            tqdm.write(f"no CUDA graphs at {layer}, {point['rows']} rows, {mode}: {uncaptured}")
        device, wall = _take_turns(contest, timed, prepared)
        times = device if contest.clock.gpu else wall
        least = _least(contest, point, mode)
        for name in timed:
            peak = None
            if mode == "forward+backward":
                with use_backend(contest.backends[name]):
                    peak = peak_bytes(timed[name], [problem.weight, *problem.wanted()[2:]])
            yield {
                **about(point),
                "mode": mode,
                "arm": name,
                "device_us": _microseconds(device[name]),
                "captured": contest.clock.gpu and not uncaptured,
                "wall_us": _microseconds(wall[name]),
                **_ratios(times[NATIVE], times[name]),
                **_rates(contest, least, statistics.median(times[name])),
                **least,
                "peak_bytes": peak,
            }


def _prepare(
    contest: Contest, problem: Problem, calls: dict[str, Call], mode: str, drop: Drop
) -> tuple[Steps, Steps, dict[str, str]]:
    """What is timed of each arm on the host, and on the device; and whom no CUDA graph holds, why.

    Where one is not captured, none is: it would be no comparison.
    """
    timed: Steps = {}
    replays: dict[str, tuple[Callable[[], object], str | None]] = {}
    for name, call in calls.items():
        with use_backend(contest.backends[name]):
            try:
                timed[name] = step(problem, call, mode)
                replays[name] = contest.clock.prepare(timed[name])
            except Exception as error:  # not the others' fault
                timed.pop(name, None)
                drop(name, f"{mode}: {said(error)}")
    uncaptured = {name: why for name, (_, why) in replays.items() if why is not None}
    prepared = timed if uncaptured else {name: replay for name, (replay, _) in replays.items()}
    return timed, prepared, uncaptured


def _take_turns(contest: Contest, timed: Steps, prepared: Steps) -> tuple[Times, Times]:
    """Seconds on the device, where there is a GPU, and on the host."""
    clock = contest.clock
    timed[NATIVE]()
    once = max(clock.wall_seconds(timed[NATIVE], 3), 1e-7)
    in_a_row = max(1, min(100, int(2e-3 / once)))
    device: Times = {name: [] for name in timed}
    wall: Times = {name: [] for name in timed}
    turns, started = list(timed), time.monotonic()
    for done in range(contest.rounds):
        if done >= 3 and time.monotonic() - started > MOST_SECONDS:
            break
        random.shuffle(turns)
        for name in turns:
            with use_backend(contest.backends[name]):
                wall[name].append(clock.wall_seconds(timed[name], in_a_row))
                seconds = clock.device_seconds(prepared[name])
            if seconds is not None:
                device[name].append(seconds)
    return device, wall


def _ratios(native: list[float], mine: list[float]) -> dict[str, float]:
    """nn.Linear's time by the arm's: the median over rounds, and the quartiles."""
    ratios = [a / b for a, b in zip(native, mine, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "ratio": round(ratio, 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
    }


def _least(contest: Contest, point: Point, mode: str) -> dict[str, int]:
    """What the layer's products have to compute and to move."""
    layer, rows = point["layer"], point["rows"]
    return {
        "operations": operations(layer, rows, mode),
        "bytes": least_bytes(layer, rows, mode, contest.dtype.itemsize, point["bias"]),
    }


def _rates(contest: Contest, least: dict[str, int], seconds: float) -> dict[str, float]:
    """What `seconds` come to, for that, and the least time that the device's ceilings allow."""
    floor = max(
        least["operations"] / contest.roof["operations_per_second"],
        least["bytes"] / contest.roof["bytes_per_second"],
    )
    return {
        "tflops": float(f"{least['operations'] / seconds / 1e12:.4g}"),
        "gbps": float(f"{least['bytes'] / seconds / 1e9:.4g}"),
        "of_roofline": round(floor / seconds, 4),
    }


def _microseconds(seconds: list[float]) -> float | None:
    return round(1e6 * statistics.median(seconds), 3) if seconds else None
