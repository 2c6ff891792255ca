"""Work that may hang, crash or take its process with it: each job in a process of its own."""

import collections
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

# Processes are forked off one that has imported what takes long, and has touched no GPU; new ones
# take longer. The former listens at a socket, whose path may have 100 characters or so.
SHORT = len(tempfile.gettempdir()) < 60
FORKS: Any = multiprocessing.get_context("forkserver" if SHORT else "spawn")
FORKS.set_forkserver_preload(["numpy", "torch", "triton", "benchmarks.gpu_run.cases"])

Tell = Callable[[Any], None]  # sends what can be pickled to the process that waits for it


class Ended(NamedTuple):
    """How a job's process ended; None where the job's own time was over."""

    exit: int | None


def _work(work: Callable[[Any, Tell], None], job: Any, sending: Any) -> None:
    work(job, sending.send)


def apart(
    work: Callable[[Any, Tell], None],
    jobs: Sequence[Any],
    at_once: int,
    deadline: float,
    seconds: float = float("inf"),
) -> Iterator[tuple[Any, Any]]:
    """Each job with what `work(job, tell)` tells, as it comes, and then with how that Ended.

    Args:
        work: a function that a new process can import.
        at_once: how many jobs run at a time.
        deadline: by `time.monotonic()`: then those that run are ended, and nothing is said of them.
        seconds: that each may take.
    """
    waiting = collections.deque(jobs)
    running: dict[Any, tuple[Any, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                receiving, sending = FORKS.Pipe(duplex=False)
                process = FORKS.Process(target=_work, args=(work, job, sending))
                process.start()
                sending.close()
                running[receiving] = job, process, time.monotonic() + seconds
            first = min(deadline, *(end for _, _, end in running.values())) - time.monotonic()
            for receiving in connection.wait(list(running), max(0, min(first, 1e6))):
                job, process, _ = running[receiving]
                try:
                    told = receiving.recv()
                except EOFError:
                    process.join()
                    del running[receiving]
                    told = Ended(process.exitcode)
                yield job, told
            if time.monotonic() >= deadline:
                return
            for receiving, (job, process, end) in list(running.items()):
                if time.monotonic() >= end:
                    process.kill()
                    del running[receiving]
                    yield job, Ended(None)
    finally:
        for _, process, _ in running.values():
            process.kill()
