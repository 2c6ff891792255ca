"""The rows of tables: which hold for a device, and which of them is for a product.

A device's tables are read once, when they are first asked for, or again when there is a process
group, all ranks of which go by one rank's. The answer depends on the tables and on shapes alone: so
ranks choose alike, and nothing is measured here.
"""

import functools
import os
import warnings
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

import fastlinear
from fastlinear import backend, ranks, tuned
from fastlinear.kernels import tables
from fastlinear.kernels.configs import PYTORCH
from fastlinear.kernels.tables import Key, Row, Table

INTERPRETER = "Triton interpreter"


class Found(NamedTuple):
    """A row, and where it is from."""

    row: Row
    file: Path
    date: str


def device_name(device: torch.device) -> str | None:
    """The name by which tables know a device; None for one that kernels do not run on."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def name_of(dtype: torch.dtype) -> str:
    """That by which tables know a dtype."""
    return str(dtype).removeprefix("torch.")


def software() -> dict[str, str]:
    """The versions that a table's times depend on."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"torch": torch.__version__, "triton": triton, "fastlinear": fastlinear.__version__}


def why_outdated(table: Table) -> str | None:
    """What has another version here than where `table` was measured, in words.

    Bug fixes of torch and Triton, 2.13.0 and 2.13.1, count as one.
    """
    for name, version in software().items():
        measured = getattr(table, name)
        parts = 3 if name == "fastlinear" else 2
        if measured.split("+")[0].split(".")[:parts] != version.split("+")[0].split(".")[:parts]:
            return f"it was measured with {name} {measured}, and this is {version}"
    return None


_group: int | None = None  # whose ranks the tables that were read are those of


def follow_group() -> None:
    """Reads tables anew where there has come to be another process group, or the first."""
    global _group
    group = ranks.group()
    if group != _group:
        _group = group
        backend.use_tables(tuned.given)


def _found(device: torch.device) -> dict[Key, Found]:
    """All rows for a device that can be used here."""
    return _read(device, tuned.generation)


@functools.lru_cache
def _read(device: torch.device, generation: int) -> dict[Key, Found]:
    if tuned.given is not None:
        return {row.key: Found(row, Path(), "") for row in tuned.given.get(device, ())}
    name = device_name(device)
    if name is None:
        return {}
    files = ranks.agreed(name, _readable(name))
    found: dict[Key, Found] = {}
    for path, text in files:
        table = tables.parse(text)
        for row in _usable(table, device):
            found[row.key] = Found(row, Path(path), table.date)
    if not files and not tuned.any_files() and ranks.in_group():
        backend.use_no_tables()
    return found


def _readable(name: str) -> ranks.Files:
    """This process's own tables for a device that were measured with the same software."""
    files = []
    for folder in tuned.folders():
        path = folder / tables.file_name(name)
        if not os.path.exists(path):  # nor in a folder that nobody may look into
            continue
        try:
            table = tables.read(path)
            reason = why_outdated(table)
            if table.device != name:
                reason = f"it is for {table.device!r}, and this is {name!r}"
        except (OSError, ValueError) as error:
            reason = str(error)
        if reason is not None:
            # Those that are shipped are the user's to replace, not to repair.
            if folder != tuned.SHIPPED:
                warnings.warn(
                    f"fastlinear ignores the table {path}: {reason}; "
                    "`python -m fastlinear tune` measures a new one",
                    RuntimeWarning,
                    stacklevel=2,
                )
            continue
        files.append((str(path), tables.as_text(table)))
    return files


def _usable(table: Table, device: torch.device) -> list[Row]:
    try:
        from fastlinear.kernels import launch

        target = launch.target_of(device)
    except (ImportError, OSError, RuntimeError):  # no Triton, or a GPU that it does not know
        return []
    return [row for row in table.rows if tables.why_illegal_row(row, target) is None]


def find(device: torch.device, key: Key) -> Found | None:
    """The row for a product, if there is one; `key.m` is any number of rows."""
    follow_group()
    return _found(device).get(key._replace(m=tables.bucket(key.m)))


@functools.lru_cache
def _sizes(device: torch.device, generation: int) -> frozenset[tuple[int, int, int]]:
    return frozenset(
        (key.n, key.k, key.m)
        for key, found in _found(device).items()
        if key.product in ("output", "training") and found.row.candidate != PYTORCH
    )


def sizes(device: torch.device) -> frozenset[tuple[int, int, int]]:
    """The n, k and m of all rows by which "auto" can take a kernel, whatever else they are for."""
    follow_group()
    return _sizes(device, tuned.generation)


@functools.lru_cache(maxsize=4096)
def ranges(
    generation: int,
    device: torch.device,
    product: str,
    dtype: torch.dtype,
    precision: str,
    activation: str | None,
    bias: bool,
    n: int,
    k: int,
) -> tuple[tuple[int, int], ...]:
    """The numbers of rows, from and to, for which a kernel is faster than PyTorch.

    `generation` is `tuned.generation`; the rest says for what product.
    """
    layer = (product, name_of(dtype), precision, activation, bias, n, k)
    wins = sorted(
        key.m
        for key, found in _found(device).items()
        if key[:-1] == layer and found.row.candidate != PYTORCH
    )
    merged: list[tuple[int, int]] = []
    for m in wins:
        first = m // 2 + 1
        if merged and merged[-1][1] == first - 1:
            first = merged.pop()[0]
        merged.append((first, m))
    return tuple(merged)


def files(device: torch.device) -> dict[Path, int]:
    """The tables in use for a device, with the rows that each gives."""
    counted: dict[Path, int] = {}
    for found in _found(device).values():
        counted[found.file] = counted.get(found.file, 0) + 1
    return counted
