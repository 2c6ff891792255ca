"""The table's file, which tuning writes."""

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastlinear.choice import known, table
from fastlinear.choice.table import Key, Row, Table


class Store:
    """The table's file. Others may write to it too: it is read again before each writing.

    replaces: why an older table that it holds is not gone on with, but written anew; or None.

    Args:
        path: the file, which need not be there yet; its folder is made.
        device: what is measured.
        own: whether the path is the tuner's own choice, so that nothing else can be there.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: somebody chose a path that holds something else than a table for this device.
    """

    def __init__(self, path: Path, device: torch.device, own: bool) -> None:
        self.path = path
        self.head = Table(
            device=known.device_name(device) or str(device),
            driver=_driver() if device.type == "cuda" else "none",
            date=datetime.now(timezone.utc).date().isoformat(),
            rows=(),
            **known.software(),
        )
        self.replaces: str | None = None
        with _locked(path):
            if not path.exists():
                return
            try:
                found = table.read(path)
                if found.device != self.head.device:
                    raise ValueError(
                        f"it is for {found.device!r}, and this is {self.head.device!r}"
                    )
                self.replaces = self._why_outdated(found)
            except ValueError as error:
                if not own:
                    raise
                self.replaces = str(error)

    def _why_outdated(self, found: Table) -> str | None:
        if found.kernels != self.head.kernels:
            return "it was measured with other kernels"
        return known.outdated(found)

    def rows(self) -> dict[Key, Row]:
        """Those that were measured here, and with the same software."""
        try:
            found = table.read(self.path)
        except (FileNotFoundError, ValueError):
            return {}
        if found.device != self.head.device or self._why_outdated(found) is not None:
            return {}
        return {row.key: row for row in found.rows}

    def add(self, row: Row) -> None:
        """Writes `row` beside those that are there, in the place of one for the same product."""
        with _locked(self.path):
            rows = self.rows() | {row.key: row}
            table.write(self.path, replace(self.head, rows=tuple(rows.values())))


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
