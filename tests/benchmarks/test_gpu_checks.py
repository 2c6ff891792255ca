"""What `make gpu` runs, without a GPU: checks of numbers, jobs apart, faults, and its rehearsal."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import numerics
from benchmarks.gpu_run import apart, cases, checks, families, launches, tuning
from benchmarks.shared import setting, watch
from benchmarks.speed import kernel_times
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.launching import launch
from fastlinear.tuning import measure as tune_rows

ROOT = Path(__file__).parents[2]

# The numbers.


def rows(family: str, arithmetic: str, device: torch.device) -> list[Any]:
    return list(checks.check(checks.Group(family, arithmetic, device.type, 2, True)))


CASES = [("linear", "float16"), ("linear", "bfloat16"), ("linear", "tf32"), ("linear", "float64")]
CASES += [(family, "float32") for family in ("linear", "batched", "activation", "gated")]


@pytest.mark.parametrize(("family", "arithmetic"), CASES)
def test_numerics_find_no_fault(family: str, arithmetic: str, device: torch.device) -> None:
    found = rows(family, arithmetic, device)
    assert len(found) == {"linear": 8, "batched": 8, "activation": 4, "gated": 4}[family]
    assert [numerics.describe(row) for row in found if row["fault"]] == []


def test_numerics_find_a_launcher_that_is_off_by_an_element(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def shifted(*arguments: Any, **options: Any) -> torch.Tensor:
        output = linear_forward(*arguments, **options)
        return output.flatten().roll(1).view(output.shape)

    linear_forward = forward.linear_forward
    monkeypatch.setattr(forward, "linear_forward", shifted)
    found = {row["product"]: row["fault"] for row in rows("linear", "float32", device)}
    assert "result 0 is off by" in found.pop("linear_forward")
    assert set(found.values()) == {None}


def test_numerics_find_a_launcher_that_does_not_repeat(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def restless(*arguments: Any, **options: Any) -> torch.Tensor:
        output = linear_forward(*arguments, **options)
        return output + 1e-7 * torch.rand_like(output)

    linear_forward = forward.linear_forward
    monkeypatch.setattr(forward, "linear_forward", restless)
    found = {row["product"]: row["fault"] for row in rows("linear", "float32", device)}
    assert found["linear_forward"] == "repeat 1 gives other bits"


def test_numerics_find_a_write_beside_an_output() -> None:
    like = torch.zeros(3)

    def write_beside() -> None:
        with checks.poisoned_outputs(small=False):
            operand = launch.Operand((3,), (1,), like.dtype, like.device, True)
            output = launch.allocate(like, operand)
            assert output.isnan().all()
            output.as_strided((1,), (1,), output.storage_offset() + 3).fill_(0.0)

    with pytest.raises(AssertionError, match="beside"):
        write_beside()


def test_numerics_layouts_are_what_they_are_called() -> None:

    made = {
        layout: layout(torch.randn, (6, 5))
        for layout in (cases.contiguous, cases.transposed, cases.sliced, cases.expanded)
    }
    assert {tuple(one.shape) for one in made.values()} == {(6, 5)}
    assert [one.stride() for one in made.values()] == [(5, 1), (1, 6), (26, 2), (0, 1)]


def test_numerics_write_what_each_process_finds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["numerics", "--json", str(tmp_path / "it.json"), "--small", "--families", "linear"]
    command += ["--arithmetics", "float32", "--repeats", "1", "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", command)
    assert numerics.main() == 0
    found = json.loads((tmp_path / "it.json").read_text())
    assert found["complete"]
    assert len(found["rows"]) == 8
    assert capsys.readouterr().out == "8 checks, 0 at fault, 0 skipped\n"


def hang(job: str, tell: Callable[[Any], None]) -> None:
    tell(job)
    if job == "hangs":
        time.sleep(20)
    if job == "dies":
        os._exit(7)


def test_jobs_apart_end_by_themselves_or_when_their_time_is_over() -> None:

    jobs = ["hangs", "ends", "dies"]
    found = list(apart.apart(hang, jobs, 2, time.monotonic() + 100, seconds=5))
    assert {told for told in found if isinstance(told[1], str)} == {(job, job) for job in jobs}
    ends = {job: told.exit for job, told in found if isinstance(told, apart.Ended)}
    assert ends == {"hangs": None, "ends": 0, "dies": 7}
    assert found[-1] == ("hangs", apart.Ended(None))
    for process in multiprocessing.active_children():
        process.join(5)
    assert not multiprocessing.active_children()


def test_jobs_apart_are_ended_where_the_time_of_all_is_over() -> None:

    begun: list[Any] = []

    def noted(**given: Any) -> Any:
        begun.append(forks.Process(**given))
        return begun[-1]

    forks = apart.FORKS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "FORKS", SimpleNamespace(Pipe=forks.Pipe, Process=noted))
        told = list(apart.apart(hang, ["hangs"] * 5, 2, time.monotonic() + 1))
    assert told in ([], [("hangs", "hangs")], [("hangs", "hangs")] * 2)
    for process in begun:
        process.join(10)
    assert [process.exitcode for process in begun] == [-signal.SIGKILL] * 2


def test_numerics_report_a_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = [(checks.Group("linear", "float32", "cpu", 1, True), checks.Ended(-11))]
    monkeypatch.setattr(checks, "apart", lambda *given: iter(ended))
    (row,) = checks.check_apart([], 1, float("inf"))
    assert row["fault"] == "the process that checks this ended with -11"


def test_numerics_of_two_calls_are_all_and_kept_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"device": "cpu", "repeats": 1, "small": True}
    names = numerics.FAMILIES, numerics.ARITHMETICS
    first, rest, every = (
        set(checks.groups_of(*names, which, **given)) for which in ("first", "rest", "all")
    )
    shared = checks.groups_of(["linear"], ["float64"], "all", device="cpu", repeats=1, small=False)
    assert [(group.turn, group.of) for group in shared] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    small = dataclasses.replace(shared[0], small=True, of=1)
    parts = [dataclasses.replace(small, turn=turn, of=3) for turn in range(3)]
    counts = [len(list(checks.calls(group))) for group in (small, *parts)]
    assert counts == [8, 3, 3, 2]
    assert first | rest == every
    assert not first & rest
    assert {group.arithmetic for group in first} == {"bfloat16", "float16", "float32"}
    path = tmp_path / "it.json"
    old = {"family": "linear", "arithmetic": "float64", "product": "kept"}
    before = {"complete": True, "rows": [old, old | {"arithmetic": "float32"}]}
    path.write_text(json.dumps(before))
    command = ["numerics", "--json", str(path), "--small", "--families", "linear"]
    monkeypatch.setattr(sys, "argv", [*command, "--arithmetics", "float32", "--jobs", "1"])
    monkeypatch.setattr(numerics, "check", lambda group: iter([{"product": "new"}]))
    assert numerics.main() == 0
    found = json.loads(path.read_text())
    assert [row["product"] for row in found["rows"]] == ["kept", "new"]
    assert found["complete"]


# What is left out, and what a rehearsal plants.


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:

    def begin(**environment: str) -> list[str]:
        launched: list[str] = []
        monkeypatch.setattr(launch, "run", launch.run)  # put back afterwards
        for name, value in environment.items():
            monkeypatch.setenv(f"FASTLINEAR_{name}", value)
        watch.watch(launched.append)
        return launched

    return begin


def test_left_out_kernels_are_not_launched_and_no_fault(
    watched: Callable[..., list[str]], device: torch.device
) -> None:
    launched = watched(LEAVE_OUT="linear_forward_kernel;linear_gemv_kernel;linear_backward_kernel")
    found = rows("linear", "float32", device)
    assert "linear_forward_kernel" not in launched
    assert "linear_backward_weight_kernel" in launched
    assert [row["product"] for row in found if row.get("fault")] == []
    skipped = [row["skipped"] for row in found if "skipped" in row]
    assert "linear_forward_kernel is left out" in skipped


def test_planted_faults_are_found_and_named(
    watched: Callable[..., list[str]], device: torch.device
) -> None:
    watched(PLANT="linear_backward_weight_kernel=wrong;linear_forward_kernel=cannot launch")
    found = {row["product"]: row["fault"] for row in rows("linear", "float32", device)}
    assert "CannotLaunch" in found["linear_forward"]
    assert "is off by" in found["linear_backward_weight"]
    assert found["linear_backward_weight, 3 splits"] is None, "which is another kernel"

    with pytest.raises(ValueError, match="not breaks"):
        watch.planted("linear_forward_kernel=breaks")


def test_every_kernel_is_of_a_family(device: torch.device) -> None:

    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        named = lambda kernel, one, pointers: launched.append(  # noqa: E731
            watch.name_of(kernel, one.constants, pointers)
        )
        patch.setattr(launch, "run", named)
        for family in families.FAMILIES.values():
            before = len(launched)
            for product, config in families.calls(family, families.group_of(family, device.type)):
                product.call(config)
            assert len(launched) > before, family.name
    defined = {
        line.split("def ")[1].split("(")[0]
        for path in (ROOT / "kernels").rglob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert {name.split(",")[0] for name in launched} == defined


@pytest.mark.parametrize("time_is_left", [True, False])
def test_family_that_was_held_up_has_a_second_try_alone(
    time_is_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`a` and `b` hang in one kernel, and beside them `c` is not done in time; `d` is."""
    tries: list[tuple[str, int]] = []

    def jobs(work: Any, names: list[str], at_once: int, *limits: float) -> Any:
        for name in names if at_once > 1 or time_is_left else ():
            tries.append((name, at_once))
            yield name, {"launching": {"a": "k", "b": "k"}.get(name, name)}
            if name in "ab" or (name == "c" and at_once > 1):
                yield name, apart.Ended(None)
            else:
                yield name, {"verdict": "right", "said": ""}
                yield name, apart.Ended(0)

    monkeypatch.setattr(families, "apart", jobs)
    row = {"new": True, "verdict": "not tried", "said": "", "launches": []}
    tried = {name: row | {"family": name, "launches": []} for name in "abcd"}
    families.try_all(tried, 4, float("inf"), lambda: None)
    verdicts = [one["verdict"] for one in tried.values()]
    if time_is_left:
        assert verdicts == ["hangs", "hangs", "right", "right"]
        assert tries[4:] == [("a", 1), ("c", 1)], "b's kernel is known to hang"
    else:
        assert verdicts == ["not tried", "not tried", "not tried", "right"]


def test_launches_are_those_that_the_parts_make(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """So that whoever compiles the ones has the others compiled."""

    for module in (kernel_times, launches, tuning):
        monkeypatch.setattr(module, "SETTING", setting.REHEARSED)
    made: set[Any] = set()

    def note(kernel: Any, launched: launch.Launch, pointers: Any) -> None:
        made.add((kernel.fn.__name__, launched.grid, launched.scalars))

    def stopwatch(calls: dict[str, Any], clock: str) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [2.0 if name == "pytorch" else 1.0] for name in calls}

    monkeypatch.setattr(launch, "run", note)
    monkeypatch.setattr(tune_rows, "as_exact", lambda *given: True)
    kernel_times.measure(lambda row: None, kernel_times.TIMED, float("inf"), stopwatch, device)
    by_part, _ = made.copy(), made.clear()
    for _, call in launches.timed(device.type, device.type):
        call()
    assert by_part == made
    made.clear()
    layers = list(tuning.calls())
    for layer in layers:
        list(tune_rows.measure_call(layer, layer.m, device, stopwatch, {}))
    by_part, _ = made.copy(), made.clear()
    for _, call in launches.tuned(device.type, device.type):
        call()
    assert by_part == made
    assert [layer.m for layer in layers] == [4, 1, 4, 1], "the most valuable first"


def test_rehearsal_names_what_is_planted_and_writes_nowhere_else(tmp_path: Path) -> None:
    """A kernel that hangs, one that is wrong and one that does not launch."""

    def listing() -> dict[str, float]:
        return {
            str(path): path.stat().st_mtime
            for folder in ("benchmarks", "fastlinear", "kernels", "tests")
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    faults = {
        "linear_gemv_kernel, activated": ("hangs", "activation by gemv"),
        "linear_gemv_kernel": ("wrong", "output by gemv"),
        "elementwise_backward_kernel, of a gate": ("cannot launch", "gated gradients"),
    }
    plant = ";".join(f"{kernel}={fault}" for kernel, (fault, _) in faults.items())
    before = listing()
    command = [sys.executable, "-m", "benchmarks.rehearsal", "--out", str(tmp_path / "out")]
    command += ["--calls", "1", "--only", "families,times", "--plant", plant, "--minutes", "3"]
    found = subprocess.run(
        command,
        env=os.environ | {"TMPDIR": str(temporary)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    page = (tmp_path / "out" / "summary.txt").read_text()
    assert found.returncode == 1, found.stderr
    assert found.stdout.endswith(page)
    assert page.startswith("A REHEARSAL")
    wrong, new = page.split("FAILURES")[1].split("NEW")
    assert {line.split(":")[0] for line in wrong.splitlines()[1:] if line} == {
        *(family for _, family in faults.values()),
        "grad_input by gemv",  # which is the same kernel
        "families",
        "left out since",
    }
    for kernel, (fault, family) in faults.items():
        assert f"{family}: {fault}" in wrong
        assert kernel in wrong.split("left out since: ")[1].splitlines()[0].split("; ")
        assert family in next(line for line in new.splitlines() if line.startswith(fault))
    times = json.loads((tmp_path / "out" / "kernels.json").read_text())["rows"]
    assert len(times) == 8
    assert not any("gemv" in config for row in times for config in row["kernel_us"])
    assert "linear_gemv_kernel is left out" in (tmp_path / "out" / "log.txt").read_text()
    assert listing() == before
    temporary.rmdir()  # which is empty
