"""Processes that run the distributed tests: `Ranks` starts, asks and ends them.

Run as a program, this file is what it starts: a process that imports everything once, forks one
process for each rank, and kills them all when its standard input ends. That ends with whoever
holds its other side, however it ends.
"""

import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_TIMEOUT = 120  # seconds, to import everything on a busy machine


class Ranks:
    """Processes in one process group of gloo that run the functions of a module together.

    Args:
        size: how many.
        module: what to import in them.
        environment: what they have besides this process's.
        timeout: seconds that a run may take.
    """

    def __init__(
        self, size: int, module: str, environment: dict[str, str], timeout: float = 60
    ) -> None:
        self.size, self.module, self.timeout = size, module, timeout
        # Interpreted kernels run on one thread; gloo needs no network.
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.environment = os.environ | own | environment
        self.process: subprocess.Popen[bytes] | None = None
        self.connections: list[Connection] = []
        self.pids: list[int] = []

    def run(self, function: str, *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns, on each rank.

        Raises AssertionError with the first traceback that comes, or where a rank has not answered
        in time or is gone. Then all ranks are ended, as those that are left would wait for the
        others, and the next run starts new ones.
        """
        try:
            if self.process is None:
                self._start()
            for connection in self.connections:
                connection.send((function, arguments))
            return self._answers(function, self.timeout)
        except BaseException:
            self.end()
            raise

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        pairs = [Pipe() for _ in range(self.size)]
        descriptors = [theirs.fileno() for _, theirs in pairs]
        command = [sys.executable, __file__, self.module, str(self.timeout), self.folder.name]
        self.process = subprocess.Popen(
            [*command, *map(str, descriptors)],
            stdin=subprocess.PIPE,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C is for whoever ends them
            env=self.environment,
        )
        self.connections = [ours for ours, _ in pairs]
        for _, theirs in pairs:
            theirs.close()
        self.pids = self._answers("start", START_TIMEOUT)

    def _answers(self, function: str, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            left = {
                self.connections[rank]: rank for rank in range(self.size) if rank not in answers
            }
            ready = wait(list(left), timeout)
            if not ready:
                raise AssertionError(
                    f"{function}: no answer of ranks {list(left.values())} within {timeout} s"
                )
            for connection, rank in left.items():
                if connection in ready:
                    try:
                        failed, answers[rank] = connection.recv()
                    except EOFError:
                        failed, answers[rank] = True, "its process has ended"
                    if failed:
                        raise AssertionError(f"{function}, rank {rank}: {answers[rank]}")
        return [answers[rank] for rank in range(self.size)]

    def end(self) -> None:
        """Ends all processes, and returns when there are none."""
        if self.process is None:
            return
        process, self.process = self.process, None
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(START_TIMEOUT)
        except subprocess.TimeoutExpired:  # it has not come to the end of its imports
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for connection in self.connections:
            connection.close()
        self.folder.cleanup()


def alive(pids: list[int]) -> list[int]:
    """Those that are processes, dead ones that nobody has waited for included."""
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            found.append(pid)
    return found


def _fork(module: str, timeout: str, folder: str, *descriptors: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    functions = importlib.import_module(module)
    connections = [Connection(int(descriptor)) for descriptor in descriptors]
    pids = []
    for rank, connection in enumerate(connections):
        pids.append(os.fork())
        if pids[-1] == 0:
            for other in connections:
                if other is not connection:
                    other.close()
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(Path(folder, "store")), len(connections)),
                rank=rank,
                world_size=len(connections),
                timeout=timedelta(seconds=START_TIMEOUT),
            )
            _serve(connection, functions, float(timeout))
            os._exit(0)
    for connection in connections:
        connection.close()
    sys.stdin.buffer.read()  # until it ends
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve(connection: Connection, functions: Any, timeout: float) -> None:
    connection.send((False, os.getpid()))
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        # Just before the run is given up: where each rank stands, on standard error.
        faulthandler.dump_traceback_later(0.9 * timeout)
        try:
            answer = (False, getattr(functions, function)(*arguments))
        except Exception:
            answer = (True, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


if __name__ == "__main__":
    _fork(*sys.argv[1:])
