"""The table's file, which tuning writes."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastlinear.choice import known, table
from fastlinear.choice.table import Key, Row, Table


class Store:
    """The table's file. Others may write to it too: it is read again before each writing.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.head = Table(
            device=known.device_name(device) or str(device),
            driver=_driver() if device.type == "cuda" else "none",
            date=datetime.now(timezone.utc).date().isoformat(),
            rows=(),
            **known.software(),
        )
        with _locked(path):
            why = self._read()[1]
        if why is not None:
            print(f"{path} is written anew: {why}", file=sys.stderr)

    def _read(self) -> tuple[dict[Key, Row], str | None]:
        """The rows that hold here, and why those that are there do not."""
        if not self.path.exists():
            return {}, None
        try:
            found = table.read(self.path)
        except ValueError as error:
            return {}, str(error)
        why = known.outdated(found)
        if found.kernels != self.head.kernels:
            why = "it was measured with other kernels"
        if found.device != self.head.device:
            why = f"it is for {found.device!r}, and this is {self.head.device!r}"
        return ({row.key: row for row in found.rows} if why is None else {}), why

    def rows(self) -> dict[Key, Row]:
        """Those that were measured here, and with the same software."""
        return self._read()[0]

    def add(self, row: Row) -> None:
        """Writes `row` beside those that are there, in the place of one for the same product."""
        with _locked(self.path):
            rows = self.rows() | {row.key: row}
            table.write(self.path, self.head._replace(rows=tuple(rows.values())))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Between reading and writing, one process at a time, where the system can say so."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # not on every network's folder
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _driver() -> str:
    """The GPU driver's version, or what torch was built for where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"cuda {torch.version.cuda}, hip {torch.version.hip}"
