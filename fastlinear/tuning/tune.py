"""`fastlinear.tune`: measures what a model calls, and has backend "auto" go by it from then on."""

import functools
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlinear import _machine as machine
from fastlinear import _ranks as ranks
from fastlinear import _torch_internals as internals
from fastlinear._files import user_folder
from fastlinear.choice import backend, known, table
from fastlinear.choice.table import BY_ROWS, PYTORCH, Key, Store, Table
from fastlinear.modules import Linear
from fastlinear.tuning.measure import bytes_of, keys_of, measure_call
from fastlinear.tuning.record import Call, Noted, record
from fastlinear.tuning.stopwatch import CpuStopwatch, Measure, OutOfTime, Stopwatch

_NOT_YET = "not measured yet"
GRACE = 5.0  # seconds after its deadline in which what was begun may end
_turn = 0  # how often this process has begun to tune: as often as all ranks


@dataclass(frozen=True)
class TunedCall:
    """What was found of calls that are alike.

    layers: names of the modules that make them.
    rows: (*, in_features) as one number: of the call that is made most often.
    calls: how often a step of the model makes them.
    pytorch_us, us: microseconds of one by PyTorch and from now on, forward and, in training,
        backward; None where neither was measured.
    way: what computes the output from now on, or a gradient where it is PyTorch that computes that:
        "pytorch", "onednn", "epilogue" or "kernel"; or why it was not measured.
    """

    layers: tuple[str, ...]
    op: str
    in_features: int
    out_features: int
    rows: int
    dtype: str
    activation: str | None
    calls: int
    pytorch_us: float | None
    us: float | None
    way: str


@dataclass(frozen=True)
class Tuned:
    """What `tune` found; printed, it is a table.

    device: what it was measured on, as tables name it.
    table: the file that backend "auto" goes by from now on; None where nothing was measured.
    calls: those that take most of PyTorch's time first.
    pytorch_ms, ms: of a step's measured linear layers, before and after.
    finished: whether all was measured; else the same call of `tune` goes on.
    not_converted: how many `nn.Linear` of the model are no `fastlinear.Linear`.
    """

    device: str
    table: Path | None
    calls: tuple[TunedCall, ...]
    pytorch_ms: float
    ms: float
    finished: bool
    not_converted: int

    def __str__(self) -> str:
        columns = "{:40} {:>13} {:>6} {:>5} {:>10} {:>10}  {}"
        named = columns.format("layers", "features", "rows", "calls", "PyTorch", "now", "way")
        lines = [named] if self.calls else []
        for call in self.calls:
            first, *others = call.layers
            name = first if not others else f"{first} and {len(others)} more"
            name = name if len(name) <= 40 else f"...{name[-37:]}"
            features = f"{call.in_features} > {call.out_features}"
            times = ("-" if us is None else f"{us:.4g} us" for us in (call.pytorch_us, call.us))
            lines.append(columns.format(name, features, call.rows, call.calls, *times, call.way))
        if self.pytorch_ms:
            lines.append(
                f"a step's linear layers: {self.pytorch_ms:.4g} ms by PyTorch, {self.ms:.4g} ms "
                f"now, {self.pytorch_ms / self.ms:.2f} times as fast, on {self.device}"
            )
        elif not self.calls:
            lines.append("the model called no layer of fastlinear, and nothing was measured")
        if not self.finished:
            lines.append("the time was up: the same call goes on from here")
        if self.not_converted:
            said = "nn.Linear not converted: fastlinear.convert(model) does"
            lines.append(f"{self.not_converted} {said}")
        return "\n".join(lines)


def tune(model: nn.Module, *args: Any, seconds: float = 60, **kwargs: Any) -> Tuned:
    """Measures the linear layers of `model(*args, **kwargs)`, for backend "auto" to go by.

    It runs the model once, and its backward if the model is in training mode and gradients are
    enabled, and notes each distinct call of `fastlinear`'s layers. Those of `linear` it measures on
    the device they were made on, by PyTorch and by all that may be faster there: on a CPU oneDNN's
    fused linear, and its gradients in float32; on a GPU the kernels, and PyTorch's product with a
    fused activation. What is not as exact as PyTorch, against float64, is left out. What is faster
    by 5% or more goes into a table, one for a kind of GPU, or for a kind of CPU and its number of
    threads, in the folder FASTLINEAR_CACHE (~/.cache/fastlinear if not set); other processes go by
    it when they start.
    A gated pair counts as its two layers; `batched_linear` is listed, and goes PyTorch's way.

    The model is as before: parameters, gradients, buffers, modes, torch's random state. What hooks,
    and a forward that changes its own parameters or attributes, do while it runs is theirs. Numbers
    of rows count as the next power of two, so that changing batches need no measurements of their
    own.

    Where several ranks of a process group call it, one measures for each kind of device, and all go
    by what it found.

    Args:
        model: converted by `fastlinear.convert`, or with layers of fastlinear.
        args, kwargs: what the model is called with: a batch as it will get them.
        seconds: when to stop; what is measured by then is kept, and the same call goes on.

    Returns:
        A Tuned, to print.

    Raises:
        TypeError: model is no `nn.Module`.
        ValueError: seconds is not above 0.
        OSError: the table cannot be written; the message says where.
        RuntimeError: nobody knows where the home folder is, and FASTLINEAR_CACHE is not set; or
            TRITON_INTERPRET is: the times of interpreted kernels say nothing; or it is called
            within `batch_invariant()`.
        KeyboardInterrupt: stopped by Ctrl-C; what was measured is kept.
        Exception: whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune() takes an nn.Module, but model is {type(model).__name__}")
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, but is {seconds!r}")
    if backend.invariant:
        raise RuntimeError("tune() measures what batch_invariant() leaves no choice of: leave it")
    global _turn
    deadline, _turn = time.monotonic() + seconds, _turn + 1
    user_folder()  # or it raises
    backend.expect_ranks()
    calls = record(model, args, kwargs)
    longest = sorted(calls.items(), key=lambda one: -_operations(one[0].key) * len(one[1].rows))
    found = tune_calls(dict(longest), deadline)
    layers = [one for one in model.modules() if isinstance(one, internals.Linear)]
    return replace(found, not_converted=sum(not isinstance(one, Linear) for one in layers))


def tune_calls(calls: dict[Call, Noted], deadline: float, measure: Measure | None = None) -> Tuned:
    """`tune` of a model that makes these calls, the most valuable first.

    measure: takes the place of the device's clocks.

    Raises:
        OSError: as `tune`.
    """
    names: dict[torch.device, str] = {}
    tables: list[Path] = []
    why_not = {call: _why_not(call, noted.usual_rows) for call, noted in calls.items()}
    for device in dict.fromkeys(call.device for call in calls):
        name = names[device] = machine.name_of(device)
        measured = [call for call in calls if call.device == device and why_not[call] is None]
        wanted = {call.key: calls[call].usual_rows for call in measured}
        if wanted:
            tables.append(table_of(device))
            work = functools.partial(measure_all, wanted, device, deadline, measure)
            turn = f"fastlinear/tuning/{name}/{_turn}"
            ranks.by_one(turn, deadline, work, known.shared(name))
    backend.use_tables()
    found = [_found(call, noted, why_not[call] or _NOT_YET) for call, noted in calls.items()]
    found.sort(key=lambda call: -(call.pytorch_us or 0) * call.calls)
    timed = [call for call in found if call.pytorch_us and call.us]
    return Tuned(
        device=" and ".join(names.values()),
        table=next((path for path in tables if path.exists()), None),
        calls=tuple(found),
        pytorch_ms=sum(call.calls * (call.pytorch_us or 0) for call in timed) / 1000,
        ms=sum(call.calls * (call.us or 0) for call in timed) / 1000,
        finished=all(call.way != _NOT_YET for call in found),
        not_converted=0,
    )


def _operations(key: Key) -> int:
    products = 1 + ("input" in key.wanted) + ("weight" in key.wanted)
    return products * key.m * key.n * key.k


def _why_not(call: Call, rows: int) -> str | None:
    """Why calls are not measured, in words; None where they are."""
    device, key = call.device, call.key
    if call.op != "linear":
        return f"not measured: {call.op} goes PyTorch's way"
    if not call.plain:
        return "not measured: operands are no contiguous tensors at whole addresses"
    if machine.device_name(device) is None:
        return f"not measured: nothing else is known on {device.type}"
    if key.precision != backend.table_precision(getattr(torch, key.dtype), device):
        return "not measured: the model sets another precision of products than is set here"
    if bytes_of(key, rows) > machine.free_memory(device):
        return "not measured: it does not fit in memory"
    return None


def _found(call: Call, noted: Noted, way: str) -> TunedCall:
    """What tables say of calls now; `way` is why, where they say nothing."""
    key, device, us, pytorch_us = call.key, call.device, None, None
    found = known.row(device, key) if call.op == "linear" and call.plain else None
    if found is not None:
        us, pytorch_us = found.row.device_us, found.row.pytorch_device_us
        parts = (known.row(device, part) for part in keys_of(key, device))
        ways = [found.row.candidate, *(one.row.candidate for one in parts if one is not None)]
        if ways[0] == BY_ROWS:  # what computes the first of its products that PyTorch does not
            ways = [one for one in ways if one not in (PYTORCH, BY_ROWS)] or [PYTORCH]
        way = ways[0] if isinstance(ways[0], str) else "kernel"
    return TunedCall(
        layers=tuple(noted.names),
        op=call.op,
        in_features=key.k,
        out_features=key.n,
        rows=noted.usual_rows,
        dtype=key.dtype,
        activation=key.activation,
        calls=len(noted.rows),
        pytorch_us=pytorch_us,
        us=us,
        way=way,
    )


def table_of(device: torch.device) -> Path:
    """Where the user's table for a device lies, or will."""
    return user_folder() / table.file_name(machine.name_of(device))


def measure_all(
    wanted: dict[Key, int], device: torch.device, deadline: float, measure: Measure | None = None
) -> bool:
    """Measures what the device's table lacks, and writes it there row by row.

    Args:
        wanted: calls, the most valuable first, with the number of rows of each.
        deadline: by time.monotonic(), after which nothing more is begun.
        measure: the clocks; None is the device's.

    Returns:
        Whether all was measured.

    Raises:
        OSError: the file cannot be read or written; the message says which.
    """
    path, new, opened = table_of(device), 0, False
    try:
        store = Store(path, _here(device))
        opened = True
        if measure is None:
            cpu = device.type == "cpu"
            measure = CpuStopwatch(deadline + GRACE) if cpu else Stopwatch(device)
        for call in _with_progress(wanted):
            try:
                for row in measure_call(call, wanted[call], device, measure, store.rows):
                    store.add(row)
                    new += 1
                    if time.monotonic() > deadline:
                        break
            except torch.OutOfMemoryError:
                said = f"left out, as it does not fit in memory: {table.in_words(call)}"
                print(said, file=sys.stderr)
            if time.monotonic() > deadline:
                break
    except OutOfTime:
        pass
    except KeyboardInterrupt:
        said = f"stopped; the same call goes on from the {new} new rows in {path}"
        print(f"\n{said}", file=sys.stderr)
        raise
    except OSError as error:
        said = "FASTLINEAR_CACHE names another folder"
        if opened:  # the disk is full, say
            said = f"the {new} new rows before are in it"
        raise OSError(f"cannot use {path} for the table: {error}; {said}") from error
    finally:
        backend.use_tables()
    return all(key in store.rows for call in wanted for key in keys_of(call, device))


def _here(device: torch.device) -> Table:
    """What is measured on and with, and no rows."""
    name, date = machine.name_of(device), datetime.now(timezone.utc).date().isoformat()
    driver, software = machine.driver(device), machine.software()
    return Table(name, driver, date=date, rows=(), **software)


def _with_progress(calls: Collection[Key]) -> Iterator[Key]:
    """With a progress bar where tqdm is installed, else a line a call."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        for number, call in enumerate(calls):
            said = f"{number + 1} of {len(calls)}: {table.in_words(call)}"
            print(said, file=sys.stderr, flush=True)
            yield call
        return
    with tqdm(calls, desc="tune", unit="layer") as bar:
        for call in bar:
            bar.set_postfix_str(table.in_words(call))
            yield call
