"""A bug that is planted in a copy of the package, and what the tests make of it."""

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
FORKS = multiprocessing.get_context("forkserver")
OUTPUT = "output.txt"
ONE_TEST = 120  # seconds, within which any that does not hang is over


@dataclass(frozen=True)
class Mutant:
    """One planted bug: `old`, which stands in `file` exactly once, becomes `new`.

    tests: those that should notice, as pytest takes them; the likeliest first, as the first failure
        ends their run.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def times(self) -> int:
        """How often `old` stands in `file`."""
        return (ROOT / self.file).read_text().count(self.old)


def planted() -> list[Mutant]:
    """Those that lie beside the tests, in the mutants.py of each room."""
    found = sorted((ROOT / "tests").rglob("mutants.py"))
    return [mutant for path in found for mutant in runpy.run_path(str(path))["MUTANTS"]]


class Outcome(NamedTuple):
    """What became of a mutant; `how` says it in words.

    end: "failed" where a test did, "hangs" where one came to no end, "passed" where none did,
        "broken" where they could not be run.
    """

    mutant: Mutant
    end: Literal["failed", "hangs", "passed", "broken"]
    how: str


def outcomes(mutants: list[Mutant], jobs: int | None, limit: float) -> Iterator[Outcome]:
    """Of each, in their order; `jobs` at a time, for about `limit` seconds each at most."""
    # What the processes inherit: kernels that are interpreted where there is no GPU, as in
    # conftest.py, and libraries that one process imports for all.
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    FORKS.set_forkserver_preload(["numpy", "pytest", "torch", "triton"])
    with ThreadPoolExecutor(max_workers=jobs or os.cpu_count()) as pool:
        yield from pool.map(lambda mutant: outcome(mutant, limit), mutants)


def outcome(mutant: Mutant, limit: float) -> Outcome:
    started = time.monotonic()
    times = mutant.times()
    if times != 1:
        said = f"cannot be planted: its line stands {times} times in {mutant.file}"
        return Outcome(mutant, "broken", said)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("fastlinear", "kernels", "tests", "benchmarks", "examples"):
            shutil.copytree(ROOT / name, Path(folder, name))
        shutil.copy(ROOT / "pyproject.toml", folder)
        Path(folder, "fastlinear", "kernels").symlink_to(Path(folder, "kernels"))
        changed = Path(folder, mutant.file)
        changed.write_text(changed.read_text().replace(mutant.old, mutant.new))
        process = FORKS.Process(target=run_tests, args=(folder, mutant.tests, limit))
        process.start()
        process.join(limit + ONE_TEST)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            return Outcome(mutant, "hangs", f"noticed: a test takes {ONE_TEST} s or more")
        output = Path(folder, OUTPUT).read_text()
    seconds = f"{time.monotonic() - started:.0f} s"
    if process.exitcode == 0:
        return Outcome(mutant, "passed", f"SURVIVED {' '.join(mutant.tests)} ({seconds})")
    if process.exitcode == 1:
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        by = failed[0].split(" - ")[0].split("::")[-1] if failed else "?"
        return Outcome(mutant, "failed", f"noticed in {seconds} by {by}")
    return Outcome(mutant, "broken", f"pytest exited with {process.exitcode}: {output[-500:]}")


class Deadline:
    """A plugin of pytest that ends the run after `limit` seconds, between two tests."""

    def __init__(self, limit: float) -> None:
        self.until = time.monotonic() + limit

    def pytest_runtest_logfinish(self) -> None:
        import pytest

        if time.monotonic() > self.until:
            pytest.exit("no test has failed so far", returncode=0)


def run_tests(folder: str, tests: tuple[str, ...], limit: float) -> None:
    """Runs `tests` with the package in `folder`, in a process that imports neither from elsewhere.

    Exits with pytest's status, or 0 if after `limit` seconds no test has failed.
    """
    import pytest

    os.setsid()  # so that what the tests start can be ended with them
    with Path(folder, OUTPUT).open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.chdir(folder)
    ours = (ROOT / "tests", ROOT / "tests" / "helpers")
    sys.path[:] = [folder, *(entry for entry in sys.path if Path(entry).resolve() not in ours)]
    os.environ["PYTHONPATH"] = folder
    command = ["-q", "-x", "-p", "no:cacheprovider", *tests]
    status = pytest.main(command, plugins=[Deadline(limit)])
    sys.exit(status)
