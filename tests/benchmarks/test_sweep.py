"""The sweep and its report: wrong arms are dropped, ratios are right, files are whole."""

import csv
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import linear, report
from benchmarks.shared import measure
from benchmarks.shared.names import not_a_peer
from benchmarks.shared.shapes import BATCH_SIZES, LAYERS, least_bytes, operations
from benchmarks.speed import naive
from benchmarks.speed.arms import NATIVE, Arm, Call, arms

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def sweep(contestants: list[Arm], *options: str) -> dict[str, Any]:
    given = ["--device", "cpu", "--shapes", "mnist-2", "--batch-sizes", "33", *options]
    chosen = linear.arguments(given)
    return linear.sweep(chosen, contestants, CPU, torch.float32)


def native() -> Arm:
    return arms(CPU)[NATIVE]


def ratio(results: dict[str, Any], arm: str, mode: str) -> float:
    (found,) = (
        row["ratio"] for row in results["points"] if (row["arm"], row["mode"]) == (arm, mode)
    )
    return found


def off_by_one(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
    assert bias is not None
    return lambda input: F.linear(input, weight, bias.roll(1))


def one_gradient_less(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
    assert bias is not None
    return lambda input: (
        F.linear(input, weight) + bias + 0 * bias.sum() - 0.1 * (bias - bias.detach())
    )


def raises(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
    raise ImportError("no such peer")


WRONG = {
    "bias off by one": (off_by_one, "output is off by"),
    "grad_bias scaled": (one_gradient_less, "grad_bias is off by"),
    "raises": (raises, "ImportError: no such peer"),
    "another shape": (lambda weight, bias, activation: lambda input: input, "RuntimeError"),
    "NaN": (
        lambda weight, bias, activation: lambda input: F.linear(input, weight, bias) * torch.nan,
        "output is off by inf",
    ),
}


@pytest.mark.parametrize(("make", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_arm_is_dropped(make: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = sweep([native(), Arm("planted", make)], "--rounds", "1")
    assert {row["arm"] for row in results["points"]} == {NATIVE}
    (drop,) = results["dropped"]
    assert drop["arm"] == "planted"
    assert drop["reason"].startswith(said)
    assert f"DROPPED planted at mnist-2, 33 rows: {said}" in capsys.readouterr().out


def failing(error: Exception, after: int) -> Any:
    """An arm that raises from some call on."""

    def make(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
        calls = itertools.count()

        def call(input: Tensor) -> Tensor:
            if next(calls) >= after:
                raise error
            return F.linear(input, weight, bias)

        return call

    return make


def test_an_arm_that_fails_when_it_is_prepared_takes_no_other_along() -> None:
    contestants = [native(), Arm("planted", failing(RuntimeError("late"), 2))]
    results = sweep(contestants, "--rounds", "1")
    assert {row["mode"] for row in results["points"]} == set(linear.MODES)
    assert {row["arm"] for row in results["points"] if row["mode"] == "forward"} == {NATIVE}
    assert results["dropped"][0]["reason"] == "forward: RuntimeError: late"


@pytest.mark.parametrize("arm", [NATIVE, "fastlinear auto"])
def test_a_point_that_runs_out_of_memory_ends_no_sweep(arm: str) -> None:
    error = torch.OutOfMemoryError("out of memory")
    contestants = [native(), Arm("fastlinear auto", native().make)]
    index = [one.name for one in contestants].index(arm)
    contestants[index] = Arm(arm, failing(error, 8))
    results = sweep(contestants, "--rounds", "9", "--batch-sizes", "2", "3", "--mode", "forward")
    said = [drop["reason"] for drop in results["dropped"]]
    assert said == ["OutOfMemoryError: out of memory"] * 2
    assert {drop["batch_size"] for drop in results["dropped"]} == {2, 3}
    assert all(not_a_peer(drop["arm"]) for drop in results["dropped"])


def test_without_nn_linear_nothing_is_compared() -> None:
    contestants = [Arm(NATIVE, raises), Arm("fastlinear auto", native().make)]
    results = sweep(contestants, "--rounds", "1")
    assert results["points"] == []
    assert [drop["arm"] for drop in results["dropped"]] == [NATIVE]


def test_time_that_is_up_ends_the_sweep() -> None:
    results = sweep([native()], "--minutes", "0")
    assert results["points"] == []
    assert results["stopped_after_minutes"] == 0


@pytest.mark.parametrize("rows", [1, 70])
def test_the_naive_arm_is_right(rows: int, device: torch.device) -> None:
    operands = [
        torch.randn(shape, device=device).requires_grad_()
        for shape in ((rows, 65), (30, 65), (30,))
    ]
    grad_output = torch.randn(rows, 30, device=device)
    ours, theirs = naive.linear(*operands), F.linear(*operands)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, operands, grad_output),
        torch.autograd.grad(theirs, operands, grad_output),
    )


class UnsteadyTime:
    """A clock that only arms move, on a machine that is up to three times slower at times."""

    def __init__(self) -> None:
        self.now, self.source = 0.0, random.Random(3)

    def arm(self, name: str, cost: float) -> Arm:
        def make(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
            def call(input: Tensor) -> Tensor:
                slowness = 1.0 + 2.0 * (int(self.now / 0.05) % 2)
                self.now += 1e-4 * cost * slowness * self.source.uniform(0.9, 1.1)
                return F.linear(input, weight, bias)

            return call

        return Arm(name, make)


def test_an_arm_of_twice_the_time_shows_as_half(monkeypatch: pytest.MonkeyPatch) -> None:
    unsteady = UnsteadyTime()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: unsteady.now)
    roof = {"operations_per_second": 1.0, "bytes_per_second": 1.0}
    monkeypatch.setattr(linear, "ceilings", lambda clock, dtype: roof)
    contestants = [unsteady.arm(NATIVE, 1.0), unsteady.arm("slow", 2.0), unsteady.arm("same", 1.0)]
    results = sweep(contestants, "--mode", "forward", "forward+backward")
    for mode in ("forward", "forward+backward"):
        assert ratio(results, "slow", mode) == pytest.approx(0.5, rel=0.05)
        assert ratio(results, "same", mode) == pytest.approx(1.0, rel=0.05)


def test_points_have_what_the_table_says() -> None:
    contestants = [arm for arm in arms(CPU).values() if arm.absent is None]
    results = sweep(contestants, "--rounds", "2", "--shapes", "mnist-1")
    assert [arm.name for arm in contestants] == [NATIVE, "fastlinear auto"]
    assert results["dropped"] == []
    keys = {(row["mode"], row["activation"], row["arm"]) for row in results["points"]}
    assert len(keys) == len(results["points"]) == 3 * 2 * 2
    for row in results["points"]:
        assert row["operations"] == operations(LAYERS["mnist-1"], 33, row["mode"])
        seconds = row["wall_us"] / 1e6
        assert row["tflops"] == pytest.approx(row["operations"] / seconds / 1e12, rel=1e-2)
        assert row["device_us"] is None
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert (row["peak_bytes"] is None) == (row["mode"] != "forward+backward")
    assert "fastlinear auto: " in linear.table(results)


def test_every_operand_and_result_moves_once() -> None:
    layer, rows = LAYERS["mnist-2"], 4  # 128 inputs, 10 outputs
    assert least_bytes(layer, rows, "forward", 2, True) == 2 * (512 + 1280 + 10 + 40)
    assert least_bytes(layer, rows, "backward", 4, False) == 4 * (40 + 2 * (512 + 1280))


def test_layers_and_batch_sizes_are_as_named() -> None:
    assert all(name == layer.name and layer.source for name, layer in LAYERS.items())
    assert list(BATCH_SIZES) == sorted(BATCH_SIZES)
    wanted = linear.points(
        list(LAYERS.values()), list(BATCH_SIZES), ["none"], "model", ["forward"], 1e9, 1e9, 4
    )
    assert {point["rows"] for point in wanted} <= set(BATCH_SIZES)
    assert all(
        operations(point["layer"], point["rows"], "forward+backward") <= 1e9 for point in wanted
    )
    assert len({(point["layer"].name, point["rows"]) for point in wanted}) == len(wanted)


COMMAND = [sys.executable, "-m", "benchmarks.linear", "--device", "cpu", "--shapes", "mnist-2"]


def test_the_command_writes_json_and_csv(tmp_path: Path) -> None:
    files = [tmp_path / "sweep.json", tmp_path / "sweep.csv"]
    result = subprocess.run(
        [*COMMAND, "--batch-sizes=2", "--rounds=1", f"--json={files[0]}", f"--csv={files[1]}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert "without fastlinear triton: needs a GPU" in result.stdout
    found = json.loads(files[0].read_text())
    assert len(found["points"]) == len(list(csv.DictReader(files[1].read_text().splitlines()))) == 6
    assert found["environment"]["torch"] == torch.__version__
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    written = tmp_path / "sweep.json"
    process = subprocess.Popen(
        [*COMMAND, "--rounds", "500", "--json", str(written)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        deadline = time.monotonic() + 90
        while not written.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"Ctrl-C was nothing to it: {process.communicate()}")
    assert process.returncode == 130, errors
    assert "interrupted: what follows was measured before" in errors
    assert "fastlinear auto: " in output
    found = json.loads(written.read_text())
    assert found["interrupted"]
    assert found["points"]


BAD = {
    "shape": (["--shapes", "no-such"], "no-such"),
    "batch size": (["--batch-sizes", "0"], "takes 1 or more, not 0"),
    "folder": (["--json", "no/such/folder.json"], "there is no folder no/such"),
    "arm": (["--arms", "no-such"], "not no-such"),
}


@pytest.mark.parametrize(("options", "said"), BAD.values(), ids=BAD)
def test_bad_options_are_named(
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["linear", *options])
    with pytest.raises(SystemExit) as stopped:
        sys.exit(linear.main())
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_readme_is_what_the_results_give() -> None:
    for path, content in report.files().items():
        assert report.is_current(path, content), f"python -m benchmarks.report changes {path}"


def test_the_report_tells_the_sweeps_of_one_file_apart() -> None:
    results = json.loads((report.RESULTS / "cpu" / "linear.json").read_text())
    about = {key: value for key, value in results.items() if key not in ("points", "dropped")}
    narrow = [row | {"dtype": "bfloat16"} for row in results["points"][:2]]
    file = {
        "sweeps": [
            about,
            about | {"dtype": "bfloat16"},
            about | {"dtype": "bfloat16", "arms": [NATIVE, "torch.compile"]},
            {key: value for key, value in about.items() if key != "ceilings"},
        ],
        "points": [*results["points"], *narrow],
    }
    wide, other = report.split(file)
    assert report.section(wide, []) == report.section(results, [])
    assert (other["dtype"], other["points"]) == ("bfloat16", narrow)
    assert other["arms"] == [*results["arms"], "torch.compile"]


def test_the_report_sees_pictures_and_text_of_other_results(tmp_path: Path) -> None:
    files = report.files()
    (picture, *_), readme = [path for path in files if path.suffix == ".png"], ROOT / "README.md"
    results = json.loads((report.RESULTS / "cpu" / "linear.json").read_text())
    other = tmp_path / "other.png"
    other.write_bytes(report.draw_ratios(results, "another file"))
    assert report.is_current(picture, files[picture])
    assert not report.is_current(other, files[picture])
    assert not report.is_current(tmp_path / "missing.png", files[picture])
    assert not report.is_current(readme, files[readme].replace(b"| mnist-1 |", b"| mnist-0 |"))


TABLES = {
    "kernels": "benchmarks.kernels --dtypes bfloat16 --read nvidia-h100-80gb-hbm3/kernels.json",
    "host time": "benchmarks.host_time --read cpu/host-time.json",
}


@pytest.mark.parametrize("command", TABLES.values(), ids=TABLES)
def test_the_readme_s_other_tables_are_what_the_results_give(command: str) -> None:
    *arguments, file = command.split()
    printed = subprocess.run(
        [sys.executable, "-m", *arguments, str(report.RESULTS / file)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert "\n".join(rows) in (ROOT / "README.md").read_text()


def test_the_report_gives_the_same_bytes_twice() -> None:
    assert report.files() == report.files()
