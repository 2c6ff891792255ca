"""`make gpu` without a GPU: how parts are run, and what is left when one is not."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gpu_runs import ROOT, part, point, write


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
from benchmarks.shared.files import write_json, write_rows
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
    """Without a kernel of this dtype in the table backend "auto" is nn.Linear."""
    (sweep,) = [one for one in gpu.PARTS if one.name == "sweep bfloat16"]
    (compiled,) = [one for one in gpu.PARTS if one.name == "sweep compiled"]
    run = gpu.Run(tmp_path, tmp_path, 60.0)
    assert "fastlinear auto" not in sweep.command(run)
    rows = [{"dtype": "float32", "candidate": "kernels"}]
    for dtype, candidate, differs in (
        ("bfloat16", "pytorch", False), ("bfloat16", "kernels", True),
    ):  # fmt: skip
        rows.append({"dtype": dtype, "candidate": candidate})
        (tmp_path / "a-gpu.json").write_text(json.dumps({"fastlinear": "0.1.0", "rows": rows}))
        assert ("fastlinear auto" in sweep.command(run)) == differs
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
