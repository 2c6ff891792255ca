"""`make gpu` without a GPU: its rehearsal, how parts run, the page, and the checks of numbers."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastlinear.kernels import forward, launch

ROOT = Path(__file__).parent.parent


def part(gpu: ModuleType, name: str, code: str, calls: tuple[int, ...] = (1,)) -> Any:
    return gpu.Part(name, 1, calls, lambda run: [sys.executable, "-c", code, str(run.scratch)])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.gpu

    monkeypatch.setattr(benchmarks.gpu, "GRACE", 0.5)
    setting = dataclasses.replace(benchmarks.gpu.SETTING, missing=lambda: None)
    monkeypatch.setattr(benchmarks.gpu, "SETTING", setting)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield benchmarks.gpu
    for number, handler in before.items():  # main sets its own
        signal.signal(number, handler)


@pytest.fixture
def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    def main(parts: list[Any], *arguments: str) -> int:
        monkeypatch.setattr(gpu, "PARTS", parts)
        arguments = arguments or ("--call", "1")
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), *arguments])
        return gpu.main()

    return main


def results(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "run.json").read_text())


HANG = "import time; print('began', flush=True); time.sleep(60)"
UNCHECKED = """
import dataclasses, sys
from benchmarks import gpu
gpu.SETTING = dataclasses.replace(gpu.SETTING, missing=lambda: None)
"""
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
    assert run(parts, "--call", "1", "--minutes", "0.1") == 1
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


def test_gpu_call_runs_its_own_parts_and_those_of_both(
    gpu: ModuleType, run: Callable[..., int], tmp_path: Path
) -> None:
    parts = [
        part(gpu, "both", "", (1, 2)),
        part(gpu, "one", "", (1,)),
        part(gpu, "two", "", (2,)),
        part(gpu, "asked for", "", ()),
    ]
    assert run(parts, "--call", "2") == 0
    assert list(results(tmp_path)) == ["both", "two"]
    assert run(parts, "--call", "1", "--only", "one,asked") == 0
    assert list(results(tmp_path)) == ["both", "two", "one", "asked for"]
    with pytest.raises(SystemExit):
        run(parts, "--minutes", "1")


def test_make_gpu_asks_for_a_call() -> None:
    found = subprocess.run(["make", "gpu", "OUT=x"], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 2
    assert "make gpu OUT=x CALL=1" in found.stdout


def test_gpu_parts_fit_six_minutes_and_no_sanitizer_runs_unasked(gpu: ModuleType) -> None:
    for call in (1, 2):
        own = [one for one in gpu.PARTS if call in one.calls]
        assert sum(one.seconds for one in own) <= 360
        assert not any(one.needs for one in own)
        assert [one.name for one in own][:2] == ["cache unpack", "families"]


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
        [sys.executable, "-m", "benchmarks.gpu", "--call=1", f"--out={tmp_path / 'out'}"],
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
{UNCHECKED}
gpu.PARTS = [
    gpu.Part("ends", 1, (1,), lambda run: [sys.executable, "-c", "print('all is well')"]),
    gpu.Part("hangs", 1, (1,), lambda run: [sys.executable, "-c", {HANG!r}]),
    gpu.Part("never", 1, (1,), lambda run: [sys.executable, "-c", "print('too late')"]),
]
sys.argv = ["gpu", "--call=1", "--out", {str(tmp_path / "out")!r}]
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


# Writes results again and again, as a part does, with a few kilobytes in each.
WRITES = """
import sys, pathlib
from benchmarks.files import write_json, write_rows
out, scratch = map(pathlib.Path, sys.argv[1:])
rows = [{"family": str(i), "new": True, "verdict": "right", "launches": []} for i in range(99)]
point = {"arm": "fastlinear auto", "batch_size": 1, "dtype": "float32", "mode": "forward",
         "ratio": 1.0, "shape": "a", "device_us": 1.0, "wall_us": 1.0}
while True:
    write_rows(out / "families.json", {"environment": {"device": "a GPU"}, "rows": rows})
    write_json(scratch / "sweep-a.json", {"points": [point] * 99, "dropped": []})
"""


def test_gpu_killed_at_any_moment_leaves_a_report(tmp_path: Path) -> None:
    """The whole session is, as where the time of a machine is over."""
    script = f"""
{UNCHECKED}
def part(name):
    return gpu.Part(name, 1, (1,), lambda run: [
        sys.executable, "-c", {WRITES!r}, str(run.out), str(run.scratch)
    ])
gpu.GRACE = 0.1
gpu.PARTS = [part("one"), part("two"), part("three")]
sys.argv = ["gpu", "--call=1", "--minutes=0.06", "--out", sys.argv[1]]
gpu.main()
"""
    for turn in range(3):
        out = tmp_path / str(turn)
        command = [sys.executable, "-c", script, str(out)]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=ROOT, env=environment, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while not (out / "summary.txt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0, 3))
        kill_session(process.pid)
        process.communicate()
        page = (out / "summary.txt").read_text()
        assert page.startswith("fastlinear on ")
        assert "PARTS" in page
        for path in out.glob("*.json"):
            json.loads(path.read_text())
        assert len(list(out.iterdir())) <= 8


def kill_session(leader: int) -> None:
    """Its processes, which may be in groups of their own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            session = stat.read_text().rpartition(")")[2].split()[3]
        except OSError:  # it has ended
            continue
        if int(session) == leader:
            os.kill(int(stat.parent.name), signal.SIGKILL)


def test_gpu_gathers_the_sweeps_the_table_and_what_tests_found(
    gpu: ModuleType, run: Callable[..., int], tmp_path: Path
) -> None:
    sweep = "import sys, pathlib; pathlib.Path(sys.argv[1], 'sweep-{0}.json').write_text('{1}')"
    tests = "print('[gw0] FAILED tests/test_a.py::test_b[one of each] ');"
    tests += "print('FAILED tests/test_a.py::test_b[one of each] - AssertionError'); exit(1)"
    table = {"fastlinear": "0.1.0", "rows": []}
    tuner = "import sys, pathlib; folder = pathlib.Path(sys.argv[1]);"
    tuner += "(folder / 'a-gpu.json.lock').touch();"
    tuner += f"(folder / 'a-gpu.json').write_text('{json.dumps(table)}')"
    parts = [
        part(gpu, "tuning", tuner),
        part(gpu, "sweep a", sweep.format("a", json.dumps({"points": [point()]}))),
        part(gpu, "sweep b", sweep.format("b", json.dumps({"points": [point()], "dropped": []}))),
        part(gpu, "tests", tests),
    ]
    assert run(parts) == 1
    assert len(json.loads((tmp_path / "out" / "linear.json").read_text())["points"]) == 2
    expected = ["test_a.py::test_b[one of each] - AssertionError"]
    assert results(tmp_path)["tests"]["findings"] == [f"tests/{one}" for one in expected]
    assert json.loads((tmp_path / "out" / "a-gpu.json").read_text()) == table
    assert gpu.table(tmp_path / "out") == tmp_path / "out" / "a-gpu.json"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"a-gpu.json", "linear.json", "log.txt", "run.json", "summary.txt"}


def test_sweep_has_no_arm_that_cannot_differ(gpu: ModuleType, tmp_path: Path) -> None:
    """Without a table backend "auto" is nn.Linear."""
    (sweep,) = [one for one in gpu.PARTS if one.name == "sweep bfloat16"]
    (compiled,) = [one for one in gpu.PARTS if one.name == "sweep compiled"]
    run = gpu.Run(tmp_path, tmp_path, 60.0)
    assert "fastlinear auto" not in sweep.command(run)
    (tmp_path / "a-gpu.json").write_text('{"fastlinear": "0.1.0"}')
    assert "fastlinear auto" in sweep.command(run)
    assert "torch.compile" not in sweep.command(run)
    assert "torch.compile" in compiled.command(run)


def test_gpu_parts_are_told_what_to_leave_out(
    gpu: ModuleType, run: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    rows = [
        {"family": "a", "new": True, "verdict": "right", "said": "", "launches": ["good"]},
        {"family": "b", "new": True, "verdict": "wrong", "said": "", "launches": ["x", "y"]},
        {"family": "c", "new": True, "verdict": "hangs", "said": "", "launches": ["good", "z"]},
    ]
    write(tmp_path / "out", families={"rows": rows})
    names = "FASTLINEAR_LEAVE_OUT", "TRITON_CACHE_DIR"
    code = f"import os; print(*(os.environ[name] for name in {names}))"
    assert run([part(gpu, "after", code)]) == 1
    said = results(tmp_path)["after"]["last"]
    assert said == "x;y;z /tmp/fastlinear-triton-cache"


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


def test_page_has_what_is_wrong_then_new_then_ratios_worst_points_and_commands(
    gpu: ModuleType, tmp_path: Path
) -> None:
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
    tried = [
        {"family": family, "new": new, "verdict": verdict, "said": "so", "launches": ["k"]}
        for family, new, verdict in (
            ("gemv", True, "hangs"), ("pair", True, "right"), ("tiles", False, "right"),
        )
    ]  # fmt: skip
    time = {"product": "backward", "dtype": "tf32", "m": 64, "n": 3, "k": 4, "chosen": "None"}
    time |= {"native_us": [6.0, 8.0, 7.0], "kernel_us": {"None": [2.0]}, "failed": {"c": "no"}}
    write(
        tmp_path,
        linear={"points": points, "dropped": dropped},
        numerics={"rows": [fault], "complete": True},
        kernels={"rows": [time]},
        families={"environment": {"device": "NVIDIA H200"}, "rows": tried},
    )
    (tmp_path / "nvidia-h200.json").write_text('{"fastlinear": "0.1.0"}')
    page = gpu.summary(tmp_path)
    words = "FAILURES: 5", "NEW", "RATIOS", "WORST TEN POINTS", "TO COMMIT IT", "PARTS"
    places = [page.index(word) for word in words]
    assert places == sorted(places)
    assert "gemv: hangs: so" in page[: places[1]]
    assert "left out since: k" in page[: places[1]]
    assert "times: backward, tf32, M = 64, c: no" in page[: places[1]]
    assert "hangs: gemv\nright: pair\n" in page[places[1] : places[2]]
    row = next(line for line in page.splitlines() if line.startswith("fastlinear kernel, tf32"))
    assert row.split()[-3:] == ["backward", "-", "3.50"]
    assert "cp " + str(tmp_path / "nvidia-h200.json") + " kernels/tuned/nvidia-h200.json" in page
    added = page[page.index("git add ") :].splitlines()[0].split()[2:]
    folder = "benchmarks/results/nvidia-h200"
    assert added == [
        *(f"{folder}/{name}.json" for name in ("families", "numerics", "kernels", "linear")),
        "kernels/tuned/nvidia-h200.json",
    ]
    assert "numerics: linear_forward, chosen: off by 1" in page
    assert "sweep: fastlinear triton dropped 2 times in float16: wrong" in page[: places[1]]
    assert "sweep: quack dropped 1 times in float32: no such layer" in page[places[-1] :]
    row = next(line for line in page.splitlines() if line.startswith("fastlinear auto, bfloat16"))
    assert row.split()[-1] == "1.00", "the geometric mean of 0.5 and 2"
    assert "fastlinear auto, float32 high, backward" in page
    listed = page[places[3] : places[4]].strip().splitlines()[1:]
    assert len(listed) == 10
    assert listed[0].startswith("0.50 (0.90 to 1.10)  fastlinear auto, a, batch 64")
    assert "torch.compile" not in page[places[3] :], "only what is ours is to be made faster"


def test_page_without_results_says_so(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "linear.json").write_text('{"points": [')  # as a kill may leave it
    page = gpu.summary(tmp_path)
    assert "FAILURES: none" in page
    assert "nothing has been measured" in page
    assert "nothing is to be committed" in page


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
    wrong = {"family": "u" * 90, "new": True, "verdict": "wrong", "said": "", "launches": []}
    files = {"families": {"rows": [wrong] * 90}, "numerics": {"rows": [fault] * 500}}
    write(tmp_path, **files, linear={"points": many}, run=runs)
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


def test_numerics_write_what_each_process_finds(
    numerics: ModuleType,
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
    from benchmarks.apart import Ended, apart

    jobs = ["hangs", "ends", "dies"]
    found = list(apart(hang, jobs, 2, time.monotonic() + 100, seconds=5))
    assert {told for told in found if isinstance(told[1], str)} == {(job, job) for job in jobs}
    ends = {job: told.exit for job, told in found if isinstance(told, Ended)}
    assert ends == {"hangs": None, "ends": 0, "dies": 7}
    assert found[-1] == ("hangs", Ended(None))
    for process in multiprocessing.active_children():
        process.join(5)
    assert not multiprocessing.active_children()


def test_jobs_apart_are_ended_where_the_time_of_all_is_over() -> None:
    from benchmarks import apart

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


def test_numerics_report_a_process_that_dies(
    numerics: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = [(numerics.Group("linear", "float32", "cpu", 1, True), numerics.Ended(-11))]
    monkeypatch.setattr(numerics, "apart", lambda *given: iter(ended))
    (row,) = numerics.check_apart([], 1, float("inf"))
    assert row["fault"] == "the process that checks this ended with -11"


def test_numerics_of_two_calls_are_all_and_kept_in_one_file(
    numerics: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"device": "cpu", "repeats": 1, "small": True}
    names = numerics.FAMILIES, numerics.ARITHMETICS
    first, rest, every = (
        set(numerics.groups_of(*names, which, **given)) for which in ("first", "rest", "all")
    )
    shared = numerics.groups_of(
        ["linear"], ["float64"], "all", device="cpu", repeats=1, small=False
    )
    assert [(group.turn, group.of) for group in shared] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    small = dataclasses.replace(shared[0], small=True, of=1)
    parts = [dataclasses.replace(small, turn=turn, of=3) for turn in range(3)]
    counts = [len(list(numerics.calls(group))) for group in (small, *parts)]
    assert counts == [8, 3, 3, 2]
    assert first | rest == every
    assert not first & rest
    assert {group.arithmetic for group in first} == {"bfloat16", "float16", "float32"}
    path = tmp_path / "it.json"
    old = {"family": "linear", "arithmetic": "float64", "product": "kept"}
    write(tmp_path, it={"complete": True, "rows": [old, old | {"arithmetic": "float32"}]})
    command = ["numerics", "--json", str(path), "--small", "--families", "linear"]
    monkeypatch.setattr(sys, "argv", [*command, "--arithmetics", "float32", "--jobs", "1"])
    monkeypatch.setattr(numerics, "check", lambda group: iter([{"product": "new"}]))
    assert numerics.main() == 0
    found = json.loads(path.read_text())
    assert [row["product"] for row in found["rows"]] == ["kept", "new"]
    assert found["complete"]


# What is left out, and what a rehearsal plants.


@pytest.fixture
def watched(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    from benchmarks import watch

    def begin(**environment: str) -> list[str]:
        launched: list[str] = []
        monkeypatch.setattr(launch, "run", launch.run)  # put back afterwards
        for name, value in environment.items():
            monkeypatch.setenv(f"FASTLINEAR_{name}", value)
        watch.watch(launched.append)
        return launched

    return begin


def test_left_out_kernels_are_not_launched_and_no_fault(
    numerics: ModuleType, watched: Callable[..., list[str]], device: torch.device
) -> None:
    launched = watched(LEAVE_OUT="linear_forward_kernel;linear_gemv_kernel;linear_backward_kernel")
    found = rows(numerics, "linear", "float32", device)
    assert "linear_forward_kernel" not in launched
    assert "linear_backward_weight_kernel" in launched
    assert [row["product"] for row in found if row.get("fault")] == []
    skipped = [row["skipped"] for row in found if "skipped" in row]
    assert "linear_forward_kernel is left out" in skipped


def test_planted_faults_are_found_and_named(
    numerics: ModuleType, watched: Callable[..., list[str]], device: torch.device
) -> None:
    watched(PLANT="linear_backward_weight_kernel=wrong;linear_forward_kernel=cannot launch")
    found = {row["product"]: row["fault"] for row in rows(numerics, "linear", "float32", device)}
    assert "CannotLaunch" in found["linear_forward"]
    assert "is off by" in found["linear_backward_weight"]
    assert found["linear_backward_weight, 3 splits"] is None, "which is another kernel"
    from benchmarks import watch

    with pytest.raises(ValueError, match="not breaks"):
        watch.planted("linear_forward_kernel=breaks")


def test_every_kernel_is_of_a_family(gpu: ModuleType, device: torch.device) -> None:
    from benchmarks import families, watch

    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        named = lambda kernel, one, pointers: launched.append(  # noqa: E731
            watch.name_of(kernel, one.constants)
        )
        patch.setattr(launch, "run", named)
        for family in families.FAMILIES.values():
            before = len(launched)
            for product, config in families.calls(family, families.group_of(family, device.type)):
                product.call(config)
            assert len(launched) > before, family.name
    expected = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    defined = {
        line.split("def ")[1].split("(")[0]
        for name in expected
        for line in (ROOT / "kernels" / f"{name}.py").read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert {name.split(",")[0] for name in launched} == defined


def test_launches_are_those_that_the_parts_make(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """So that whoever compiles the ones has the others compiled."""
    from benchmarks import kernels, launches, setting, tuning
    from fastlinear import tune_rows

    for module in (kernels, launches, tuning):
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
    kernels.measure(lambda row: None, kernels.TIMED, float("inf"), stopwatch, device)
    by_part, _ = made.copy(), made.clear()
    for _, call in launches.timed(device.type, device.type):
        call()
    assert by_part == made
    made.clear()
    layers = list(tuning.layers())
    for layer in layers:
        list(tune_rows.measure_layer(layer, device, stopwatch, {}))
    by_part, _ = made.copy(), made.clear()
    for _, call in launches.tuned(device.type, device.type):
        call()
    assert by_part == made
    assert [layer.m for layer in layers] == [4, 4, 1, 1], "the most valuable first"


def test_rehearsal_names_what_is_planted_and_writes_nowhere_else(tmp_path: Path) -> None:
    """A kernel that hangs, one that is wrong and one that does not launch."""

    def listing() -> dict[str, float]:
        return {
            str(path): path.stat().st_mtime
            for folder in ("benchmarks", "fastlinear", "kernels", "tests")
            for path in (ROOT / folder).rglob("*")
            if "__pycache__" not in path.parts
        }

    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    faults = {
        "linear_gemv_kernel, activated": ("hangs", "activation by gemv"),
        "linear_gemv_kernel": ("wrong", "output by gemv"),
        "gate_backward_kernel": ("cannot launch", "gated gradients"),
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
