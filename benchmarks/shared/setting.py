"""What a run on a GPU and its rehearsal have of their own: where times come from, and sizes.

FASTLINEAR_REHEARSAL=1 makes it a rehearsal, in which Triton's interpreter computes small shapes and
a script says what they took. Nothing else in the benchmarks asks which of the two it is. This
imports no torch: it is asked for before it is known whether there is one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from benchmarks.shared.measure import Clock

REHEARSAL = "FASTLINEAR_REHEARSAL"


@dataclass(frozen=True)
class Setting:
    """title: what the page starts with.
    missing: says what the machine lacks, in a sentence.
    clock: where times come from.
    device: where operands lie.
    start: seconds that a part takes to start and to finish.
    trial: seconds for one kernel of `benchmarks.gpu_run.families`.
    timed, timed_rows: (out_features, in_features) and batch sizes for `benchmarks.kernels`, the
        most telling first.
    layers: of `shapes.py`, for `benchmarks.gpu_run.tuning` and the sweep; None for all.
    tuned_rows, swept_rows: batch sizes of those, the former the most valuable first.
    compiled, compiled_rows: layers and batch sizes for torch.compile.
    numerics: options of `benchmarks.numerics`.
    """

    title: str
    missing: Callable[[], str | None]
    clock: Callable[[torch.device], Clock]
    device: str
    start: float
    trial: float
    timed: tuple[tuple[int, int], ...]
    timed_rows: tuple[int, ...]
    layers: tuple[str, ...] | None
    tuned_rows: tuple[int, ...]
    swept_rows: tuple[int, ...]
    compiled: tuple[str, ...]
    compiled_rows: tuple[int, ...]
    numerics: tuple[str, ...]


def _missing() -> str | None:
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"This measures kernels on a GPU, and {sys.executable} has no {package}."
    import torch

    if not torch.cuda.is_available():
        return f"This measures kernels on a GPU, and torch {torch.__version__} finds none."
    return None


def _by_events(device: torch.device) -> Clock:
    from benchmarks.shared.measure import Clock

    return Clock(device)


def _by_script(device: torch.device) -> Clock:
    from benchmarks.shared.measure import Scripted

    return Scripted(device)


ON_A_GPU = Setting(
    title="fastlinear",
    missing=_missing,
    clock=_by_events,
    device="cuda",
    start=8,
    trial=25,
    timed=((4096, 4096), (3072, 768), (14336, 4096), (1024, 8192)),
    timed_rows=(4096, 1, 64, 16, 256, 16384),
    layers=None,
    tuned_rows=(4096, 1, 16, 64, 256, 1024, 16384, 8, 32, 128, 512, 2048, 8192, 2, 4),
    swept_rows=(1, 16, 64, 256, 1024, 4096, 16384),
    compiled=("bert-base-up", "square"),  # a compilation takes longer than all else of a point
    compiled_rows=(64, 4096),
    numerics=("--repeats", "10"),
)
REHEARSED = Setting(
    title="A REHEARSAL, of which nothing is measured: fastlinear",
    missing=lambda: None,
    clock=_by_script,
    device="cpu",
    start=4,
    trial=10,
    timed=((48, 32),),
    timed_rows=(40, 1),
    layers=("mnist-2",),
    tuned_rows=(4, 1),
    swept_rows=(1, 4),
    compiled=("mnist-2",),
    compiled_rows=(4,),
    numerics=("--small", "--repeats", "2", "--families", "linear", "gated", "activation"),
)
SETTING = REHEARSED if os.environ.get(REHEARSAL) == "1" else ON_A_GPU
