"""`make gpu` without a GPU: how parts are run, the page, and the checks of the kernels' numbers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastlinear.kernels import forward, launch

ROOT = Path(__file__).parent.parent


def part(gpu: ModuleType, name: str, code: str, share: float = 1.0) -> Any:
    return gpu.Part(name, share, lambda run: [sys.executable, "-c", code, str(run.scratch)])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.gpu

    monkeypatch.setattr(benchmarks.gpu, "GRACE", 0.5)
    monkeypatch.setattr(benchmarks.gpu, "missing", lambda: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield benchmarks.gpu
    for number, handler in before.items():  # main sets its own
        signal.signal(number, handler)


@pytest.fixture
def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    def main(parts: list[Any], *arguments: str) -> int:
        monkeypatch.setattr(gpu, "PARTS", parts)
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), *arguments])
        return gpu.main()

    return main


def results(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "run.json").read_text())


HANG = "import time; print('began', flush=True); time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);" + HANG


def test_gpu_runs_every_part_whatever_becomes_of_those_before(
    gpu: ModuleType, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        part(gpu, "fails", "import sys; print('this is why'); sys.exit(3)"),
        part(gpu, "dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        part(gpu, "hangs", DEAF),
        part(gpu, "ends", "print('all is well')"),
    ]
    began = time.monotonic()
    assert run(parts, "--minutes", "0.1") == 1
    assert time.monotonic() - began < 10
    found = results(tmp_path)
    statuses = [found[one.name]["status"] for one in parts]
    assert statuses == ["failed", "failed", "stopped", "passed"]
    page = (tmp_path / "out" / "summary.txt").read_text()
    assert capsys.readouterr().out.endswith(page)
    assert "fails: failed, exit 3: this is why" in page
    assert "dies: failed, exit -11" in page
    assert "hangs: not finished in its" in page
    assert "began" in (tmp_path / "out" / "log.txt").read_text()


def test_gpu_only_runs_those_parts_and_keeps_what_was_there(
    gpu: ModuleType, run: Callable[..., int], tmp_path: Path
) -> None:
    parts = [
        part(gpu, "one", "print('first')"),
        part(gpu, "two bfloat16", "print('second')"),
        part(gpu, "two float16", "print('third')"),
        dataclasses.replace(part(gpu, "three", ""), needs="no-such-program"),
    ]
    assert run(parts, "--only", "one,three") == 0
    assert list(results(tmp_path)) == ["one", "three"]
    assert results(tmp_path)["three"]["status"] == "skipped"
    assert run(parts, "--only", "two") == 0
    assert list(results(tmp_path)) == ["one", "three", "two bfloat16", "two float16"]
    page = (tmp_path / "out" / "summary.txt").read_text()
    assert [word for word in ("first", "second", "third") if word in page] == [
        "first",
        "second",
        "third",
    ]
    with pytest.raises(SystemExit):
        run(parts, "--only", "four")


def test_gpu_without_one_says_so_and_writes_nothing(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "on a GPU" in result.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_starts_where_the_package_is_not_installed_yet() -> None:
    """As in `make gpu`, which looks for a GPU before it installs anything."""
    program = "import sys; sys.modules['fastlinear'] = None; import benchmarks.gpu"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_gpu_interrupted_ends_the_part_and_writes_the_page(
    number: signal.Signals, tmp_path: Path
) -> None:
    script = f"""
import sys
from benchmarks import gpu
gpu.missing = lambda: None
gpu.PARTS = [
    gpu.Part("ends", 1, lambda run: [sys.executable, "-c", "print('all is well')"]),
    gpu.Part("hangs", 1, lambda run: [sys.executable, "-c", {HANG!r}]),
    gpu.Part("never", 1, lambda run: [sys.executable, "-c", "print('too late')"]),
]
sys.argv = ["gpu", "--out", {str(tmp_path / "out")!r}]
sys.exit(gpu.main())
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        log = tmp_path / "out" / "log.txt"
        deadline = time.monotonic() + 30
        while not (log.exists() and "began" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert printed.endswith((tmp_path / "out" / "summary.txt").read_text())
    found = results(tmp_path)
    assert [found[name]["status"] for name in found] == ["passed", "interrupted"]


def test_gpu_gathers_the_sweeps_and_what_tests_found(
    gpu: ModuleType, run: Callable[..., int], tmp_path: Path
) -> None:
    sweep = "import sys, pathlib; pathlib.Path(sys.argv[1], 'sweep-{0}.json').write_text('{1}')"
    tests = "print('[gw0] FAILED tests/test_a.py::test_b[one of each] ');"
    tests += "print('FAILED tests/test_a.py::test_b[one of each] - AssertionError'); exit(1)"
    parts = [
        part(gpu, "sweep a", sweep.format("a", json.dumps({"points": [point()]}))),
        part(gpu, "sweep b", sweep.format("b", json.dumps({"points": [point()], "dropped": []}))),
        part(gpu, "tests", tests),
    ]
    assert run(parts) == 1
    assert len(json.loads((tmp_path / "out" / "linear.json").read_text())["points"]) == 2
    expected = ["test_a.py::test_b[one of each] - AssertionError"]
    assert results(tmp_path)["tests"]["findings"] == [f"tests/{one}" for one in expected]
    assert len(list((tmp_path / "out").iterdir())) <= 8


# The page.


def point(**changes: Any) -> dict[str, Any]:
    ordinary = {
        "shape": "a",
        "batch_size": 64,
        "dtype": "bfloat16",
        "precision": "highest",
        "mode": "forward",
        "activation": None,
        "bias": True,
        "arm": "fastlinear auto",
        "device_us": 10.0,
        "wall_us": 20.0,
        "ratio": 1.0,
        "ratio_low": 0.9,
        "ratio_high": 1.1,
    }
    return ordinary | changes


def write(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def test_page_has_failures_then_ratios_then_worst_points(gpu: ModuleType, tmp_path: Path) -> None:
    points = [
        point(shape="a", ratio=0.5),
        point(shape="b", ratio=2.0),
        *(point(shape=f"c{index}", batch_size=1, ratio=3.0 + index) for index in range(20)),
        point(arm="torch.compile", ratio=0.1),
        point(arm="nn.Linear"),
        point(dtype="float32", precision="high", mode="backward", activation="gelu"),
    ]
    fault = {"product": "linear_forward", "config": "chosen", "fault": "off by 1"}
    dropped = [{"arm": "fastlinear triton", "dtype": "float16", "reason": "wrong"}] * 2
    dropped += [{"arm": "quack", "dtype": "float32", "reason": "no such layer"}]
    write(
        tmp_path,
        linear={"points": points, "dropped": dropped},
        numerics={"rows": [fault], "complete": True},
    )
    page = gpu.summary(tmp_path)
    places = [page.index(word) for word in ("FAILURES: 2", "PARTS", "RATIOS", "WORST TEN POINTS")]
    assert places == sorted(places)
    assert "numerics: linear_forward, chosen: off by 1" in page
    assert "sweep: fastlinear triton dropped 2 times in float16: wrong" in page[: places[1]]
    assert "sweep: quack dropped 1 times in float32: no such layer" in page[places[1] :]
    row = next(line for line in page.splitlines() if line.startswith("fastlinear auto, bfloat16"))
    assert row.split()[-1] == "1.00", "the geometric mean of 0.5 and 2"
    assert "fastlinear auto, float32 high, backward" in page
    listed = page[places[-1] :].splitlines()[1:]
    assert len(listed) == 10
    assert listed[0].startswith("0.50 (0.90 to 1.10)  fastlinear auto, a, batch 64")
    assert "torch.compile" not in page[places[-1] :], "only what is ours is to be made faster"


def test_page_without_results_says_so(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "linear.json").write_text('{"points": [')  # as a kill may leave it
    page = gpu.summary(tmp_path)
    assert "FAILURES: none" in page
    assert "no sweep has been measured" in page


def test_page_that_cannot_be_made_ends_no_run(
    gpu: ModuleType, run: Callable[..., int], tmp_path: Path
) -> None:
    parts = [
        part(gpu, "writes", f"open({str(tmp_path / 'out' / 'linear.json')!r}, 'w').write('[1]')"),
        part(gpu, "breaks", "print('on')"),
    ]
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", linear={"points": [{"ratio": 1.0}]})
    assert run(parts[1:]) == 1
    assert "no summary could be made: KeyError" in (tmp_path / "out" / "summary.txt").read_text()
    assert run(parts) == 0, "a file that is no such thing counts as none"


def test_page_says_that_not_all_was_checked(gpu: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, numerics={"rows": [{"product": "linear_forward"}] * 7, "complete": False})
    assert "numerics: not all was checked, but 7 cases were" in gpu.summary(tmp_path)


def test_page_keeps_under_its_limit(gpu: ModuleType, tmp_path: Path) -> None:
    fault = {"product": "linear_forward", "fault": "x" * 1000}
    many = [
        point(arm=f"fastlinear {arm} {'y' * 90}", batch_size=2**size, shape="z" * 300)
        for arm in range(60)
        for size in range(16)
    ]
    ended = {"status": "failed", "exit": 1, "last": "w" * 200, "findings": ["v" * 300] * 50}
    runs = {f"part {index}": ended for index in range(12)}
    write(tmp_path, numerics={"rows": [fault] * 500}, linear={"points": many}, run=runs)
    page = gpu.summary(tmp_path)
    assert len(page) < 12_000
    assert "more" in page
    assert "WORST TEN POINTS" in page


# The numbers.


@pytest.fixture
def numerics(gpu: ModuleType) -> ModuleType:
    import benchmarks.numerics

    return benchmarks.numerics


def rows(numerics: ModuleType, family: str, arithmetic: str, device: torch.device) -> list[Any]:
    return list(numerics.check(numerics.Group(family, arithmetic, device.type, 2, True)))


CASES = [("linear", "float16"), ("linear", "bfloat16"), ("linear", "tf32"), ("linear", "float64")]
CASES += [(family, "float32") for family in ("linear", "batched", "activation", "gated")]


@pytest.mark.parametrize(("family", "arithmetic"), CASES)
def test_numerics_find_no_fault(
    family: str, arithmetic: str, numerics: ModuleType, device: torch.device
) -> None:
    found = rows(numerics, family, arithmetic, device)
    assert len(found) == {"linear": 8, "batched": 8, "activation": 4, "gated": 4}[family]
    assert [numerics.describe(row) for row in found if row["fault"]] == []


def test_numerics_find_a_launcher_that_is_off_by_an_element(
    numerics: ModuleType, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def shifted(*arguments: Any, **options: Any) -> torch.Tensor:
        output = linear_forward(*arguments, **options)
        return output.flatten().roll(1).view(output.shape)

    linear_forward = forward.linear_forward
    monkeypatch.setattr(forward, "linear_forward", shifted)
    found = {row["product"]: row["fault"] for row in rows(numerics, "linear", "float32", device)}
    assert "result 0 is off by" in found.pop("linear_forward")
    assert set(found.values()) == {None}


def test_numerics_find_a_launcher_that_does_not_repeat(
    numerics: ModuleType, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def restless(*arguments: Any, **options: Any) -> torch.Tensor:
        output = linear_forward(*arguments, **options)
        return output + 1e-7 * torch.rand_like(output)

    linear_forward = forward.linear_forward
    monkeypatch.setattr(forward, "linear_forward", restless)
    found = {row["product"]: row["fault"] for row in rows(numerics, "linear", "float32", device)}
    assert found["linear_forward"] == "repeat 1 gives other bits"


def test_numerics_find_a_write_beside_an_output(numerics: ModuleType) -> None:
    like = torch.zeros(3)

    def write_beside() -> None:
        with numerics.poisoned_outputs(small=False):
            operand = launch.Operand((3,), (1,), like.dtype, like.device, True)
            output = launch.allocate(like, operand)
            assert output.isnan().all()
            output.as_strided((1,), (1,), output.storage_offset() + 3).fill_(0.0)

    with pytest.raises(AssertionError, match="beside"):
        write_beside()


def test_numerics_layouts_are_what_they_are_called(numerics: ModuleType) -> None:
    import benchmarks.cases as cases

    made = {
        layout: layout(torch.randn, (6, 5))
        for layout in (cases.contiguous, cases.transposed, cases.sliced, cases.expanded)
    }
    assert {tuple(one.shape) for one in made.values()} == {(6, 5)}
    assert [one.stride() for one in made.values()] == [(5, 1), (1, 6), (26, 2), (0, 1)]


def test_numerics_write_what_each_process_finds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.numerics", "--json", str(tmp_path / "it.json")]
    command += ["--small", "--families", "linear", "--arithmetics", "float32", "--repeats", "1"]
    command += ["--jobs", "2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "it.json").read_text())
    assert found["complete"]
    assert len(found["rows"]) == 8
    assert result.stdout == "8 checks, 0 at fault, 0 skipped\n"


def test_numerics_out_of_time_end_their_processes(
    numerics: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []

    class Hanging(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", HANG], **options)
            begun.append(self)

    monkeypatch.setattr(numerics.subprocess, "Popen", Hanging)
    group = numerics.Group("linear", "float32", "cpu", 1, True)
    assert list(numerics.check_apart([group] * 5, 2, time.monotonic() + 0.5)) == []
    assert [one.wait(10) for one in begun] == [-signal.SIGKILL] * 2


def test_numerics_report_a_process_that_dies(
    numerics: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "ROOT", ROOT / "tests")  # where there is no such module
    group = numerics.Group("linear", "float32", "cpu", 1, True)
    (row,) = numerics.check_apart([group], 1, float("inf"))
    assert row["fault"] == "the process that checks this ended with 1"
