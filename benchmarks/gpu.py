"""Everything that is to be known of the kernels on a GPU, in two calls of at most six minutes.

`python -m benchmarks.gpu --call 1 --out FOLDER`, and then `--call 2`, run the parts below one after
another, each in a process and a time of its own, and print a page on what came out. Whatever
becomes of a part, the next one runs; killed at any time, FOLDER holds what there is by then. Either
call is of use without the other. FOLDER has, of both together, eight files:

    summary.txt                             the page, written anew after each part
    run.json                                how each part ended
    log.txt                                 what the parts printed
    families.json, kernels.json, numerics.json, linear.json    what they measured
    <device>.json                           the tuner's table, for kernels/tuned/

The first part finds out which kernels are right at all; those that are not are left out of all
that follows. `--only` runs some parts, those too that no call has of itself. It exits with 0 if all
is well, 1 if anything failed, 2 if there is no GPU, and 130 if it was interrupted.
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

from benchmarks.gpu_run.summary import failures, left_out, summary
from benchmarks.shared.files import put, read_json, write_json, write_rows
from benchmarks.shared.setting import SETTING

ROOT = Path(__file__).parent.parent
ARCHIVE = ROOT / "benchmarks" / "gpu-cache.tar.xz"  # of compiled kernels, if somebody made one
# Where Triton keeps what it compiles: what comes from elsewhere holds absolute paths.
CACHE = "/tmp/fastlinear-triton-cache"
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
        return f"{max(0.0, 0.9 * self.seconds - SETTING.start) / 60:.3f}"


Command = Callable[[Run], list[str]]


@dataclass(frozen=True)
class Part:
    """name: its first word is what --only takes. seconds: its share of the time, of what is left.

    calls: in which it runs, when it is not asked for by name.
    needs: a program without which it is skipped.
    """

    name: str
    seconds: float
    calls: tuple[int, ...]
    command: Command
    needs: str | None = None


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def cache(deed: str) -> Command:
    def command(run: Run) -> list[str]:
        if ARCHIVE.exists():
            return module("benchmarks.gpu_cache", deed)
        return [sys.executable, "-c", "print('there is no archive of compiled kernels')"]

    return command


def families(run: Run) -> list[str]:
    given = ("--json", run.out / "families.json", "--minutes", run.minutes)
    return module("benchmarks.gpu_run.families", *given)


def times(run: Run) -> list[str]:
    return module(
        "benchmarks.kernels", "--out", run.out, "--minutes", run.minutes, "--dtypes", "bfloat16"
    )


def numerics(which: str) -> Command:
    def command(run: Run) -> list[str]:
        given = ("--json", run.out / "numerics.json", "--minutes", run.minutes, "--which", which)
        return module("benchmarks.numerics", *given, *SETTING.numerics)

    return command


def tests(run: Run) -> list[str]:
    """The tests whose result depends on a GPU: streams, graphs, threads."""
    command = module("pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu")
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(6, os.cpu_count() or 1)), "-p", "no:benchmark"]
    return [*command, "-p", "benchmarks.gpu_run.plugin"]


def tune(run: Run) -> list[str]:
    """Into the scratch folder, where its lock stays; `gather` takes the table from there."""
    return module("benchmarks.gpu_run.tuning", "--folder", run.scratch, "--minutes", run.minutes)


def sweep(name: str, dtype: str, *options: object) -> Command:
    def command(run: Run) -> list[str]:
        written = run.scratch / f"sweep-{name}.json"
        arms = ["fastlinear triton"]
        if kernel_wins(run.out, dtype):  # else "auto" is nn.Linear
            arms.insert(0, "fastlinear auto")
        if name == "compiled":
            arms.append("torch.compile")
        given = ("--dtype", dtype, "--activation", "none", "--minutes", run.minutes)
        given += ("--rounds", "7", "--json", str(written), "--arms", *arms)
        return module("benchmarks.linear", *given, *options)

    return command


ALL = ("--shapes", *SETTING.layers) if SETTING.layers else ()
PLAIN = (*ALL, "--batch-sizes", *SETTING.swept_rows)
COMPILED = ("--shapes", *SETTING.compiled, "--batch-sizes", *SETTING.compiled_rows)


def sanitizer(tool: str) -> Command:
    def command(run: Run) -> list[str]:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
        command += ["--target-processes", "application-only", *module("benchmarks.numerics")]
        two = ["--arithmetics", "bfloat16", "float32"]
        return [*command, "--small", "--jobs", "1", "--repeats", "1", *two]

    return command


# What a part does not use is there for those after it.
PARTS = [
    Part("cache unpack", 10, (1, 2), cache("unpack")),
    Part("families", 110, (1, 2), families),
    Part("times", 75, (1,), times),
    Part("numerics", 100, (1,), numerics("first")),
    Part("tests", 60, (1,), tests),
    Part("tuning", 110, (2,), tune),
    Part("sweep bfloat16", 35, (2,), sweep("bfloat16", "bfloat16", *PLAIN)),
    Part("sweep float32", 20, (2,), sweep("float32", "float32", *PLAIN)),
    Part("sweep compiled", 25, (2,), sweep("compiled", "bfloat16", *COMPILED)),
    Part("numerics rest", 45, (2,), numerics("rest")),
    Part("cache hits", 3, (1, 2), cache("hits")),
    Part("sanitizer memcheck", 60, (), sanitizer("memcheck"), needs="compute-sanitizer"),
    Part("sanitizer racecheck", 60, (), sanitizer("racecheck"), needs="compute-sanitizer"),
]


class Interrupted(Exception):
    """SIGINT or SIGTERM has come."""


def interrupt(number: int, frame: FrameType | None) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # it is ending already
    raise Interrupted


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Asks a part and all its processes to end, and after GRACE seconds ends them."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def table(folder: Path) -> Path | None:
    """The tuner's table in a folder, which is the one file that says what it was measured with."""
    tables = (path for path in sorted(folder.glob("*.json")) if "fastlinear" in read_json(path))
    return next(tables, None)


def kernel_wins(folder: Path, dtype: str) -> bool:
    """Whether the table there has "auto" take a kernel for that dtype."""
    rows = read_json(found)["rows"] if (found := table(folder)) else []
    return any(row["dtype"] == dtype and row["candidate"] != "pytorch" for row in rows)


def gather(run: Run) -> None:
    """The tuner's table so far, and one file from those of the sweeps of this run."""
    if found := table(run.scratch):
        put(run.out / found.name, found.read_text())
    sweeps = [read_json(path) for path in sorted(run.scratch.glob("sweep-*.json"))]
    if sweeps:
        merged: dict[str, Any] = {"environment": sweeps[0].get("environment")}
        # What each says of itself: benchmarks.report tells them apart by it.
        merged["sweeps"] = [
            {key: value for key, value in one.items() if key not in ("points", "dropped")}
            for one in sweeps
        ]
        for key in ("dropped", "points"):
            merged[key] = [row for one in sweeps for row in one.get(key, [])]
        write_rows(run.out / "linear.json", merged, "points")


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
    environment = {
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": CACHE,
        "FASTLINEAR_CACHE": str(run.out),  # its table is the only one
        "FASTLINEAR_LEAVE_OUT": ";".join(left_out(run.out)),
    }
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
            env=os.environ | environment,
            **APART,
        )
        try:
            while process.poll() is None and time.monotonic() - started < run.seconds:
                time.sleep(0.1)
                if time.monotonic() > gathered + 5:
                    gather(run)
                    gathered = time.monotonic()
            code = process.poll()
            status = "stopped" if code is None else "failed" if code else "passed"
        finally:
            before = printed(run.out / "log.txt", begin)
            stop(process)
            gather(run)
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
    put(out / "summary.txt", page(out)[0])
    deadline = time.monotonic() + 60 * minutes
    done = read_json(out / "run.json")
    with tempfile.TemporaryDirectory() as scratch:
        for index, part in enumerate(parts):
            left = max(0.0, deadline - time.monotonic() - GRACE)
            share = part.seconds / math.fsum(one.seconds for one in parts[index:])

            def record(result: dict[str, Any], name: str = part.name) -> None:
                done[name] = result
                write_json(out / "run.json", done)
                put(out / "summary.txt", page(out)[0])
                print(f"{name}: {result['status']}, {result['last']}", flush=True)

            run_part(part, Run(out, Path(scratch), left * share), record)


def main() -> int:
    names = list(dict.fromkeys(part.name.split()[0] for part in PARTS))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for results; made if it is not there")
    parser.add_argument("--call", type=int, choices=[1, 2], help="which parts")
    parser.add_argument("--only", help=f"some of {','.join(names)}")
    parser.add_argument("--minutes", type=float, default=5.7, help="for all parts together")
    parser.add_argument("--check", action="store_true", help="only say whether it could run")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else names
    if not (arguments.call or arguments.only or arguments.check):
        parser.error("give --call 1 or --call 2, or the parts to run by --only")
    if unknown := set(chosen) - set(names):
        parser.error(f"--only takes {','.join(names)}, not {','.join(sorted(unknown))}")
    if arguments.out is None and not arguments.check:
        parser.error("give --out FOLDER")
    if lacking := SETTING.missing():
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
        parts = [
            part
            for part in PARTS
            if part.name.split()[0] in chosen
            and (arguments.call in (None, *part.calls) or (arguments.only and not part.calls))
        ]
        run_all(parts, out, arguments.minutes)
    except Interrupted:
        interrupted = True
    text, failed = page(out)
    put(out / "summary.txt", text)
    print("", text, sep="\n", end="", flush=True)
    return 130 if interrupted else int(failed)


if __name__ == "__main__":
    sys.exit(main())
