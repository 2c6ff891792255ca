"""What is known of the device at hand: the tables that hold for it, and their rows.

A device's tables are read once, when they are first asked for, or again when there is a process
group, all ranks of which go by one rank's. The answer depends on the tables and on shapes alone: so
ranks choose alike, and nothing is measured here.
"""

import functools
import hashlib
import math
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlinear.kernels as kernels
from fastlinear import _torch_internals as internals
from fastlinear.choice import ranks, table
from fastlinear.choice.table import BY_ROWS, PYTORCH, Key, Row, Table, why_illegal_row

SHIPPED = Path(kernels.__path__[0]) / "tuned"
INTERPRETER = "Triton interpreter"
LARGEST_CACHE = 4096  # shapes
# How many times PyTorch's speed counts; and where it was measured with another torch or Triton.
MARGIN, MARGIN_OF_OTHERS = 1.05, 1.15


class Found(NamedTuple):
    """A row, and where it is from."""

    row: Row
    file: Path
    date: str


def user_folder() -> Path:
    """Where the user's own tables lie.

    FASTLINEAR_CACHE, or fastlinear/ in XDG_CACHE_HOME, which is ~/.cache where it is not set.

    Raises:
        RuntimeError: nobody knows where the home folder is.
    """
    given = os.environ.get("FASTLINEAR_CACHE")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fastlinear"


def folders() -> tuple[Path, ...]:
    """Where tables lie; a row of the second, the user's, counts before one of the first."""
    try:
        return SHIPPED, user_folder()
    except RuntimeError:  # nobody knows where the home folder is
        return (SHIPPED,)


def any_files() -> bool:
    """Whether there is a table for any device."""
    return any(name.endswith(".json") for folder in folders() for name in _names(folder))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


# Whether there is a table at all, which every call asks first. Another rank may have one.
available: bool = any_files() or ranks.expected()
seen: bool = available  # whether there has ever been one: a forward may have gone by it
generation = 0  # counts the times that tables were read anew
given: dict[torch.device, tuple[Row, ...]] | None = None  # in the place of all tables
_settled: int | None = None  # the group whose ranks have agreed that there is none
_group: int | None = None  # whose ranks the tables that were read are those of


watchers: list[Callable[[], None]] = []  # called when other tables hold than before


def reload(rows: dict[torch.device, tuple[Row, ...]] | None = None) -> None:
    """Looks for tables again, or takes these rows for all that there is."""
    global available, seen, generation, given, _settled
    given = rows
    available = rows is not None or any_files() or ranks.expected()
    seen = seen or available
    _settled = None
    generation += 1
    _changed()


def _changed() -> None:
    global _pytorchs, _least
    _pytorchs, _least = {}, {}  # another thread may be about to write to the old ones
    for watcher in watchers:
        watcher()


def settled() -> bool:
    """Whether the ranks of this group have agreed that there is no table."""
    return _settled is not None and _settled == ranks.group()


def follow_group() -> None:
    """Reads tables anew where there has come to be another process group, or the first."""
    global _group
    group = ranks.group()
    if group != _group:
        _group = group
        reload(given)


def device_name(device: torch.device) -> str | None:
    """The name by which tables know a device; None for one that they know nothing of.

    A CPU's times depend on the threads that share a product.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return None
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'' if threads == 1 else 's'}"


@functools.cache
def _processor() -> str:
    """A CPU's name, as its maker has it where the system says so."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def name_of(dtype: torch.dtype) -> str:
    """That by which tables know a dtype."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def software() -> dict[str, str]:
    """What a table's times depend on: versions, and a hash of the kernels' sources."""
    from importlib import metadata  # it takes its time

    import fastlinear  # whose version stands below its imports

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    sources = hashlib.sha256()
    folder = Path(kernels.__path__[0])
    for file in (*sorted(folder.rglob("*.py")), folder / "configs" / "tiles.json"):
        sources.update(file.read_bytes())
    return {
        "torch": torch.__version__,
        "triton": triton,
        "fastlinear": fastlinear.__version__,
        "kernels": sources.hexdigest()[:16],
    }


def outdated(table: Table) -> str | None:
    """What of torch and Triton has another version here than where `table` was measured, in words.

    Bug fixes, 2.13.0 and 2.13.1, count as one.
    """
    for name in ("torch", "triton"):
        measured, version = getattr(table, name), software()[name]
        if measured.split("+")[0].split(".")[:2] != version.split("+")[0].split(".")[:2]:
            return f"it was measured with {name} {measured}, and this is {version}"
    return None


def find(device: torch.device, key: Key) -> Found | None:
    """The row for a product, if there is one; `key.m` is any number of rows.

    Of a training with other gradients than were measured, it is that with all of them.
    """
    follow_group()
    key, rows = key._replace(m=table.bucket(key.m)), found(device)
    if key not in rows and key.product == "training":
        key = key._replace(wanted="input weight bias" if key.bias else "input weight")
    return rows.get(key)


def found(device: torch.device) -> dict[Key, Found]:
    """All rows for a device that count here."""
    return _read(device, torch.get_num_threads() if device.type == "cpu" else 0, generation)


@functools.lru_cache
def _read(device: torch.device, threads: int, generation: int) -> dict[Key, Found]:
    if given is not None:
        return {row.key: Found(row, Path(), "") for row in given.get(device, ())}
    name = device_name(device)
    if name is None:
        return {}
    files = ranks.agreed(name, readable(name))
    rows: dict[Key, Found] = {}
    for path, text in files:
        parsed = table.parse(text)
        for row in _usable(parsed, device):
            rows[row.key] = Found(row, Path(path), parsed.date)
    # Where there are GPUs, it is theirs that settle it.
    last = device.type == "cuda" or not torch.cuda.device_count()
    if not files and not any_files() and ranks.in_group() and last:
        _settle()
    return rows


def _settle() -> None:
    """Asks for tables no more: no rank of this group has one."""
    global available, _settled
    available, _settled = False, ranks.group()
    _changed()


def readable(name: str) -> ranks.Files:
    """This process's own tables for a device."""
    files = []
    for folder in folders():
        path = folder / table.file_name(name)
        if not os.path.exists(path):  # nor in a folder that nobody may look into
            continue
        ignored = None
        try:
            parsed = table.read(path)
            if parsed.device != name:
                ignored = f"it is for {parsed.device!r}, and this is {name!r}"
        except (OSError, ValueError) as error:
            ignored = str(error)
        if ignored is None:
            files.append((str(path), table.as_text(parsed)))
        # Those that are shipped are the user's to replace, not to repair.
        if folder == SHIPPED:
            continue
        if ignored is not None:
            _warn(f"fastlinear ignores the table {path}: {ignored}; fastlinear.tune writes another")
        elif (reason := outdated(parsed)) is not None:
            margin = f"{MARGIN_OF_OTHERS - 1:.0%}"
            _warn(f"fastlinear goes by the table {path} only where it gains {margin}: {reason}")
    return files


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _usable(parsed: Table, device: torch.device) -> list[Row]:
    """The rows by which a call can go here: PyTorch's way where the gain does not count."""
    margin = MARGIN if outdated(parsed) is None else MARGIN_OF_OTHERS
    try:
        from fastlinear.kernels.launching import launch

        target = launch.target_of(device)
    except (ImportError, OSError, RuntimeError):  # no Triton, or a device that it does not know
        target = None

    def usable(row: Row) -> bool:
        if isinstance(row.candidate, str):  # whether a library is there is asked when it is taken
            return True
        same = parsed.kernels == software()["kernels"]
        return same and target is not None and why_illegal_row(row, target) is None

    rows = [row for row in parsed.rows if usable(row)]
    rows = [row if row.wins(margin) else row.by_pytorch() for row in rows]
    ours = {row.key[1:3] + row.key[-3:] for row in rows if row.candidate not in (PYTORCH, BY_ROWS)}
    return [
        row.by_pytorch()
        if row.candidate == BY_ROWS and row.key[1:3] + row.key[-3:] not in ours
        else row
        for row in rows
    ]


# Whether no table has a row for a call, by what most calls can be told by. And, for what is told
# sooner, with how many elements of an input a weight of so many begins to have another way than
# PyTorch's, by the tables for so many threads in this group. Whoever adds to them holds on to those
# that there were before it read a table: other tables may have come to hold since.
_pytorchs: dict[Any, bool] = {}
_least: dict[Any, dict[int, int]] = {}


# Every call takes the time that looking these up takes.
_recording, _threads = torch.is_grad_enabled, torch.get_num_threads


def _note_least(read_by: Any) -> None:
    noted = _least
    if torch.cuda.is_available() and not torch.cuda.is_initialized():
        return  # to ask for a GPU's name would start it
    least: dict[int, int] = {}
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (torch.device("cpu"), *gpus):
        for key, one in found(device).items():
            if key.product in ("output", "training") and one.row.candidate != PYTORCH:
                elements = (key.m // 2 + 1) * key.k
                weights = key.n * key.k
                least[weights] = min(elements, least.get(weights, elements))
    noted[read_by] = least


def is_pytorchs(input: Tensor, weight: Tensor, activation: str | None) -> bool:
    """Whether a call of "auto" goes PyTorch's way, by what most calls can be told by.

    False where more has to be looked into.
    """
    try:
        elements, weights = input.numel(), weight.numel()  # half as long as their shapes
        read_by = _threads(), internals.default_group()
        least = _least.get(read_by)
        # No symbols, which would be guarded.
        told = least is not None and type(elements) is int
        if told and elements < least.get(weights, math.inf):  # type: ignore[union-attr]
            return True
        key = (
            elements,
            weights,
            input.dtype,
            input.device,
            activation,
            _recording() and (weight.requires_grad or input.requires_grad),
            read_by,
        )
        answer = _pytorchs.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensors; symbols have no hash
        return True
    if answer is None:
        if internals.tracing() is not None:  # sizes are tensors there
            return True
        follow_group()
        answers = _pytorchs
        if least is None:
            _note_least(read_by)
        answer = not _a_row(input, weight, activation)
        if len(answers) >= LARGEST_CACHE:
            answers.clear()
        answers[key] = answer
    return answer


def _a_row(input: Tensor, weight: Tensor, activation: str | None) -> bool:
    """Whether a row may have such a call go another way, whatever its precision."""
    recorded = torch.is_grad_enabled() and (weight.requires_grad or input.requires_grad)
    elements, weights = input.numel(), weight.numel()
    dtypes = {name_of(input.dtype)}
    if input.dtype != torch.float64:  # which autocast leaves alone
        dtypes |= {"float16", "bfloat16"}
    return any(
        key.product == ("training" if recorded else "output")
        and (key.n * key.k, key.m) == (weights, table.bucket(elements // key.k))
        and key.activation == activation
        and key.dtype in dtypes
        and one.row.candidate != PYTORCH
        for key, one in found(input.device).items()
    )


def files(device: torch.device) -> dict[Path, int]:
    """The tables in use for a device, with the rows that each gives."""
    counted: dict[Path, int] = {}
    for one in found(device).values():
        counted[one.file] = counted.get(one.file, 0) + 1
    return counted
