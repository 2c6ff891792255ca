"""Everything that is to be known of the kernels on a GPU, in one command and ten minutes.

`python -m benchmarks.gpu --out FOLDER` runs the parts below one after another, each in a process
and a time of its own, and prints a page on what came out. Whatever becomes of a part, the next one
runs; killed at any time, FOLDER holds what there is by then:

    summary.txt         the page, written anew after each part
    run.json            how each part ended
    log.txt             what the parts printed
    environment.json, numerics.json, linear.json, kernels.json   what they measured

`--only` runs some parts, into a FOLDER that may hold others already. It exits with 0 if all is
well, 1 if anything failed, 2 if there is no GPU, and 130 if it was interrupted.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.files import read_json, write_json
from benchmarks.gpu_summary import failures, summary

ROOT = Path(__file__).parent.parent
GRACE = 5.0  # seconds from asking a part to end to ending it
# A group of processes that `stop` reaches all of. Where it can, it stays in the session, so that
# what ends this process and those of its session ends the part too.
APART: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


@dataclass(frozen=True)
class Run:
    """One run of a part: where its results go, until when, and a folder that is thrown away."""

    out: Path
    scratch: Path
    seconds: float

    @property
    def minutes(self) -> str:
        """The time that a part may measure, which leaves it some to start and to finish."""
        return f"{max(0.0, 0.85 * self.seconds - 10) / 60:.3f}"


Command = Callable[[Run], list[str]]


@dataclass(frozen=True)
class Part:
    """name: its first word is what --only takes. share: of the time, in the parts' common measure.

    needs: a program without which it is skipped.
    """

    name: str
    share: float
    command: Command
    needs: str | None = None


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


# Test files, less test_ and .py, that a GPU changes nothing about.
WITHOUT_A_GPU = (
    "benchmarks", "compile", "distributed", "gpu", "ranks", "sweep", "train_distributed"
)  # fmt: skip


def tests(run: Run) -> list[str]:
    """The test suite, without what needs no GPU and takes long, or runs on the CPU in any case."""
    command = module("pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider")
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8", "-p", "no:benchmark"]
    return [
        *command,
        *(f"--ignore=tests/test_{it}.py" for it in WITHOUT_A_GPU),
    ]


# Few points of every layer and of all sizes: a part has half a minute.
SIZES = ("1", "16", "64", "256", "1024", "4096", "16384")
UNCOMPILED = ("fastlinear auto", "fastlinear triton", "naive triton")


def sweep(name: str, dtype: str, precision: str, *options: str) -> Command:
    def command(run: Run) -> list[str]:
        written = run.scratch / f"sweep-{name}.json"
        arguments = ["--dtype", dtype, "--precision", precision, "--minutes", run.minutes]
        arguments += ["--rounds", "7", "--json", str(written), *options]
        return module("benchmarks.linear", *arguments)

    return command


def plain_sweep(dtype: str, precision: str = "highest") -> Command:
    options = ("--arms", *UNCOMPILED, "--activation", "none", "--batch-sizes", *SIZES)
    return sweep(f"{dtype}-{precision}", dtype, precision, *options)


# A compilation takes longer than all else of a point: few of them, at the end.
COMPILED_SWEEP = sweep(
    "compiled", "bfloat16", "highest",
    "--arms", "fastlinear auto", "fastlinear triton",
    "torch.compile", "torch.compile max-autotune",
    "--shapes", "bert-base-up", "square", "--batch-sizes", "64", "4096",
    "--activation", "model", "--mode", "forward", "forward+backward",
)  # fmt: skip


def sanitizer(tool: str) -> Command:
    def command(run: Run) -> list[str]:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
        command += ["--target-processes", "application-only", *module("benchmarks.numerics")]
        two = ["--arithmetics", "bfloat16", "float32"]
        return [*command, "--small", "--jobs", "1", "--repeats", "1", *two]

    return command


# What a part does not use is there for those after it.
PARTS = [
    Part("environment", 4, lambda run: module(
        "benchmarks.environment", "--json", str(run.out / "environment.json")
    )),
    Part("numerics", 34, lambda run: module(
        "benchmarks.numerics", "--json", str(run.out / "numerics.json"), "--minutes", run.minutes
    )),
    Part("tests", 26, tests),
    Part("sweep bfloat16", 9, plain_sweep("bfloat16")),
    Part("sweep float16", 6, plain_sweep("float16")),
    Part("sweep float32", 7, plain_sweep("float32")),
    Part("sweep float32 high", 6, plain_sweep("float32", "high")),
    Part("sweep compiled", 6, COMPILED_SWEEP),
    Part("tuner", 8, lambda run: module(
        "benchmarks.kernels", "--out", str(run.out), "--minutes", run.minutes
    )),
    Part("sanitizer memcheck", 4, sanitizer("memcheck"), needs="compute-sanitizer"),
    Part("sanitizer racecheck", 4, sanitizer("racecheck"), needs="compute-sanitizer"),
]  # fmt: skip


class Interrupted(Exception):
    """SIGINT or SIGTERM has come."""


def interrupt(number: int, frame: FrameType | None) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # it is ending already
    raise Interrupted


def missing() -> str | None:
    """What the machine lacks, in a sentence."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"This measures kernels on a GPU, and {sys.executable} has no {package}."
    import torch

    if not torch.cuda.is_available():
        return f"This measures kernels on a GPU, and torch {torch.__version__} finds none."
    return None


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Asks a part and all its processes to end, and after GRACE seconds ends them."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def gather_sweeps(run: Run) -> None:
    """One file from those of the sweeps of this run so far."""
    sweeps = [read_json(path) for path in sorted(run.scratch.glob("sweep-*.json"))]
    if sweeps:
        merged: dict[str, Any] = {"environment": sweeps[0].get("environment")}
        # What each says of itself: benchmarks.report tells them apart by it.
        merged["sweeps"] = [
            {key: value for key, value in one.items() if key not in ("points", "dropped")}
            for one in sweeps
        ]
        for key in ("points", "dropped"):
            merged[key] = [row for one in sweeps for row in one.get(key, [])]
        write_json(run.out / "linear.json", merged)


FINDINGS = [  # lines that say what is wrong, in what pytest and compute-sanitizer print
    re.compile(r"(?:FAILED|ERROR) (tests/.*)"),
    re.compile(r"^(tests/.*) (?:FAILED|ERROR)\b"),
    re.compile(r"^========= ((?:Invalid|Error|Warning|Race|Misaligned|Uninit|Program hit).*)"),
]


def findings(lines: list[str]) -> list[str]:
    found: dict[str, str] = {}
    for line in lines:
        for match in filter(None, (pattern.search(line) for pattern in FINDINGS)):
            found[match[1].split(" - ")[0].strip()] = match[1].strip()[:300]
    return list(found.values())


def printed(log: Path, begin: int) -> list[str]:
    """The lines of a log after `begin` bytes that have words in them."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    return [line for line in text.splitlines() if line.strip(" =-")]


def run_part(part: Part, run: Run, record: Callable[[dict[str, Any]], None]) -> None:
    """Runs a part until it ends or its time does, and records how it ended."""
    if part.needs and shutil.which(part.needs) is None:
        record({"status": "skipped", "last": f"there is no {part.needs}", "findings": []})
        return
    started, gathered = time.monotonic(), 0.0
    status = "interrupted"
    with (run.out / "log.txt").open("ab") as log:
        log.write(f"\n== {part.name}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            part.command(run),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            **APART,
        )
        try:
            while process.poll() is None and time.monotonic() - started < run.seconds:
                time.sleep(0.1)
                if time.monotonic() > gathered + 5:
                    gather_sweeps(run)
                    gathered = time.monotonic()
            code = process.poll()
            status = "stopped" if code is None else "failed" if code else "passed"
        finally:
            before = printed(run.out / "log.txt", begin)
            stop(process)
            gather_sweeps(run)
            record(
                {
                    "status": status,
                    "exit": process.returncode,
                    "seconds": round(time.monotonic() - started, 1),
                    "of": round(run.seconds, 1),
                    "last": before[-1].strip(" =")[:200] if before else "",
                    "findings": findings(printed(run.out / "log.txt", begin)),
                }
            )


def page(out: Path) -> tuple[str, bool]:
    """The summary, and whether anything failed."""
    try:
        return summary(out), bool(failures(out))
    except Exception as error:  # a file is not what it is taken for: that ends no measurement
        return f"FAILURES\nno summary could be made: {type(error).__name__}: {error}\n", True


def run_all(parts: list[Part], out: Path, minutes: float) -> None:
    """Runs the parts, and writes run.json and summary.txt after each."""
    deadline = time.monotonic() + 60 * minutes
    done = read_json(out / "run.json")
    with tempfile.TemporaryDirectory() as scratch:
        for index, part in enumerate(parts):
            left = max(0.0, deadline - time.monotonic() - GRACE)
            share = part.share / math.fsum(one.share for one in parts[index:])

            def record(result: dict[str, Any], name: str = part.name) -> None:
                done[name] = result
                write_json(out / "run.json", done)
                (out / "summary.txt").write_text(page(out)[0])
                print(f"{name}: {result['status']}, {result['last']}", flush=True)

            run_part(part, Run(out, Path(scratch), left * share), record)


def main() -> int:
    names = list(dict.fromkeys(part.name.split()[0] for part in PARTS))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for results; made if it is not there")
    parser.add_argument("--only", help=f"some of {','.join(names)}")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--check", action="store_true", help="only say whether it could run")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else names
    if unknown := set(chosen) - set(names):
        parser.error(f"--only takes {','.join(names)}, not {','.join(sorted(unknown))}")
    if arguments.out is None and not arguments.check:
        parser.error("give --out FOLDER")
    if lacking := missing():
        print(lacking, file=sys.stderr)
        return 2
    if arguments.check:
        return 0

    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    interrupted = False
    try:
        parts = [part for part in PARTS if part.name.split()[0] in chosen]
        run_all(parts, out, arguments.minutes)
    except Interrupted:
        interrupted = True
    text, failed = page(out)
    (out / "summary.txt").write_text(text)
    print("", text, sep="\n", end="", flush=True)
    return 130 if interrupted else int(failed)


if __name__ == "__main__":
    sys.exit(main())
