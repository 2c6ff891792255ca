"""Draws calls and checks them, for as long as it is given.

Run it as `python tests/fuzz.py --minutes 30`, or `make fuzz MINUTES=30`.

A process a core draws cases of its own, each fresh. The first failure, shrunk, ends the run: it is
printed as the command that repeats it. Exits with 1 then, and with 130 where it is interrupted.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anyone imports triton
# No table of the user's has a say, as in the tests.
os.environ["FASTLINEAR_CACHE"] = os.path.join(os.path.dirname(__file__), "no-tables")

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "helpers"))

import guards
from cases import FUNCTIONS, Case, cases
from hypothesis import HealthCheck, Phase, given, settings
from properties import check
from tqdm import tqdm

from fastlinear.kernels.launching import launch

ROUND = 50  # cases that hypothesis draws without one like another
LONGEST_LINE = 2000


def prepare() -> None:
    torch.set_num_threads(1)  # processes share the cores
    if launch.INTERPRETING:
        guards.make_interpreter_strict()


def draw(until: float, count: Any, line: Any, failures: Any) -> None:
    """Checks cases until the time is over or one fails, which is told to `failures`.

    count: how many have been checked, by all processes.
    line: the case at hand, for whoever finds this process dead.
    """
    prepare()
    failing = False

    def property(case: Case) -> None:
        nonlocal failing
        if time.monotonic() > until and not failing:  # what fails is shrunk to its end
            return
        line.value = str(case).encode()
        try:
            check(case)
        except Exception:
            failing = True
            raise
        with count.get_lock():
            count.value += 1

    round_of = settings(
        max_examples=ROUND,
        derandomize=False,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    while time.monotonic() < until:
        for function in FUNCTIONS:
            try:
                round_of(given(cases(function))(property))()
            except Exception as error:  # hypothesis ends with the simplest case that fails
                failures.send((line.value.decode(), f"{type(error).__name__}: {error}"))
                return


def fuzz(minutes: float, processes: int) -> int:
    """The exit code."""
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)
    lines = [context.Array("c", LONGEST_LINE) for _ in range(processes)]
    failed, failures = context.Pipe(duplex=False)
    until = time.monotonic() + 60 * minutes
    workers = [
        context.Process(target=draw, args=(until, count, line, failures), daemon=True)
        for line in lines
    ]
    # Processes inherit what is ignored: Ctrl-C is for this one, which ends them.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, interrupt)
    code, ending = 0, "no failure"
    try:
        with tqdm(unit="case", desc=f"fuzz, {minutes:g} min") as bar:
            while any(worker.is_alive() for worker in workers) and not failed.poll(0.5):
                bar.update(count.value - bar.n)
                if any(worker.exitcode for worker in workers):
                    break
            bar.update(count.value - bar.n)
        if failed.poll():
            case, error = failed.recv()
            code, ending = 1, f"{error.splitlines()[0]}\n{repeating(case)}"
        for worker, line in zip(workers, lines, strict=True):
            if worker.exitcode and not code:
                died = f"a process ended with exit code {worker.exitcode}"
                code, ending = 1, f"{died}\n{repeating(line.value.decode())}"
    except KeyboardInterrupt:
        code, ending = 130, "interrupted"
    for worker in workers:
        worker.terminate()
        worker.join()
    print(f"{count.value} cases, {ending}")
    return code


def repeating(case: str) -> str:
    return f"repeat with: python tests/fuzz.py --case '{case}'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="how long to go on")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="a core each")
    parser.add_argument("--case", help="check this one alone")
    arguments = parser.parse_args()
    if arguments.case is None:
        sys.exit(fuzz(arguments.minutes, arguments.processes))
    prepare()
    check(Case.parse(arguments.case))
    print("1 case, no failure")


if __name__ == "__main__":
    main()
