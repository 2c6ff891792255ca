"""Launches: the first of its kind goes through Triton, later ones to what Triton has compiled.

Triton looks at every argument of every launch for what it specialises kernels on, which takes
longer than all the rest of a call. Nearly all of that is the same whenever one `Launch` is
launched; what is not, `specialization` tells quickly. So the compiled kernel is kept with it.
"""

import contextvars
import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..language.arguments import Matrix, Vector
from ..language.indexing import locate_tile

# Kernels interpret, or compile, for the life of the process:
# triton.jit decides when it decorates them.
INTERPRETING: bool = not isinstance(locate_tile, triton.runtime.JITFunction)

KNOWN = ("3.6", "3.7", "3.8", "3.9")


def known(version: str) -> bool:
    """Whether `run` is known to do all that this Triton's own way to the launcher does.

    With every other version all launches go Triton's own way.
    """
    return version.startswith(tuple(f"{one}." for one in KNOWN))


# Triton's interpreter keeps in globals which program of which kernel it runs: threads take turns.
_interpreter = threading.RLock()


def _renew_lock() -> None:
    global _interpreter
    _interpreter = threading.RLock()


if INTERPRETING and hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread's holder is not there
DIRECT: bool = known(triton.__version__) and not INTERPRETING
AMD: bool = torch.version.hip is not None
DEVICE_ERROR = "Triton Error ["  # the start of those that a driver's calls return
LARGEST_CACHE = 64  # of one Launch: every choice of unaligned pointers has a kernel of its own

if known(triton.__version__):  # another may have none of these
    RUNTIME, COMPILATION = triton.knobs.runtime, triton.knobs.compilation
    ENTER, LEAVE = type(RUNTIME).launch_enter_hook, type(RUNTIME).launch_exit_hook
    WATCHED_FROM_OUTSIDE: bool = bool(RUNTIME.debug or COMPILATION.instrumentation_mode)


class CannotLaunch(RuntimeError):
    """Triton cannot compile a kernel, or cannot launch it; it has not run."""


class Compiled(NamedTuple):
    """A kernel as Triton has compiled it, and what its launcher takes.

    source, kernel: what was compiled, and Triton's object of the result, which keeps it loaded.
    launcher, function, metadata: that object's.
    current_stream: a device's, by its index; Triton knows how PyTorch is asked for it.
    device: the index of the device that it is loaded on.
    only_device: whether there is no other, and so no need to ask which is the current one.
    grid: of three dimensions.
    arguments: all that follow the pointers, in the kernel's order. Triton's launcher skips
        constexprs.
    """

    source: Any
    kernel: Any
    launcher: Callable[..., None]
    function: Any
    metadata: Any
    current_stream: Callable[[int], int]
    device: int
    only_device: bool
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@dataclass(eq=False, slots=True)
class Launch:
    """All of a kernel's launch but its pointers.

    It is for operands of one description (`launch.describe`), from which the device, the dtypes of
    all pointers and which of them are None must follow. What is compiled for it is kept with it:
    it is to be kept too, rather than made for every call.

    grid: as Triton takes it; (0,) where there is nothing to compute.
    scalars: what the kernel takes after its pointers, in its order, None for each pointer at their
        end that it can do without here.
    constants: its constexprs, and Triton's options.
    operands: what the first pointers are those of, without them; None for a pointer alone.
    describes: whether the kernel makes descriptors, which takes memory on the device.
    compiled: by `specialization`.
    strides: of the operands, each with the position of its pointer.
    """

    grid: tuple[int]
    scalars: tuple[float | None, ...]
    constants: dict[str, Any]
    operands: tuple[Matrix | Vector | None, ...] = ()
    describes: bool = False
    compiled: dict[tuple[bool, ...], Compiled] = field(default_factory=dict, repr=False)
    strides: list[tuple[int, tuple[int | None, ...]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.strides = [(at, one[1:]) for at, one in enumerate(self.operands) if one is not None]

    def arguments(self, pointers: Sequence[Any]) -> list[Any]:
        """The kernel's, but for constexprs."""
        pairs = itertools.zip_longest(pointers, self.operands)
        given = [one if of is None else of._replace(ptr=one) for one, of in pairs]
        return [*given, *self.scalars]


def specialization(pointers: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """What Triton specialises a kernel on that launches of one `Launch` do not share.

    That is which addresses divide by 16, outputs' and workspaces' included, and on AMD also which
    storages are small. Values and widths of integers, constexprs, options, dtypes, device, and
    which pointers are None are the Launch's.
    """
    aligned = tuple([one is None or one.data_ptr() % 16 == 0 for one in pointers])
    if not AMD:
        return aligned
    small = [one is None or one.untyped_storage().nbytes() < 2**31 for one in pointers]
    return *aligned, *small


def watched(kernel: Any) -> bool:
    """Whether Triton has more to do in a launch than to launch: hooks to call, checks to compile.

    Hooks that are called when a kernel is compiled or loaded are no concern of later launches.
    Environment variables count as they were when Triton was imported. 3.9 asks for one more at each
    launch, TRITON_FPSAN_HOMOMORPHIC_CASTS, which changes nothing but with an instrumentation mode.
    """
    assigned = RUNTIME.__dict__ or COMPILATION.__dict__  # since Triton was imported
    if not (assigned or ENTER.calls or LEAVE.calls or kernel.pre_run_hooks):
        return WATCHED_FROM_OUTSIDE
    enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)  # a chain of hooks, unless a hook has taken its place
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or RUNTIME.debug
        or RUNTIME.add_stages_inspection_hook
        or COMPILATION.instrumentation_mode
    )


def run(kernel: Any, launch: Launch, pointers: tuple[Tensor | None, ...]) -> None:
    """Launches `kernel` on the device of its operands, which the first of `pointers` is on."""
    if not DIRECT or watched(kernel):
        _run_by_triton(kernel, launch, pointers)
        return
    given: list[Any] = []
    bits = 0
    for one in pointers:
        # Triton's launcher takes addresses as well as tensors, and skips what was None at first.
        address = 0 if one is None else one.data_ptr()
        given.append(address)
        bits |= address
    for at, strides in launch.strides:  # and a plain tuple as well as a Matrix
        given[at] = (given[at],) + strides  # noqa: RUF005  in half the time
    # Nearly always all are aligned, and then nothing is to be told apart.
    key = specialization(pointers) if bits % 16 or AMD else ()
    compiled = launch.compiled.get(key)
    if compiled is None or compiled[0] is not kernel:
        found = _run_by_triton(kernel, launch, pointers)
        if found is not None:
            if len(launch.compiled) >= LARGEST_CACHE:
                launch.compiled.clear()
            launch.compiled[key] = _keep(kernel, found, launch, pointers)
        return
    _, _, launcher, function, metadata, current_stream, device, only_device, grid, arguments = (
        compiled
    )
    if not only_device and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(kernel, launch, pointers)
        return
    # The call that Triton's own way ends with, less the hooks.
    stream = current_stream(device)
    launcher(*grid, stream, function, metadata, None, None, None, *given, *arguments)


def _run_by_triton(kernel: Any, launch: Launch, pointers: tuple[Tensor | None, ...]) -> Any:
    """Triton's object of the compiled kernel; None where it has none to give.

    Raises:
        CannotLaunch: Triton does not know the GPU, finds no C compiler, has no place for its cache,
            or the like; the message has its words.
    """
    first: Any = pointers[0]
    start = _with_memory(kernel[launch.grid], launch)
    arguments, options = launch.arguments(pointers), launch.constants
    if "TRITON_DEFAULT_FP_FUSION" not in os.environ:
        # The default, of which 3.9 warns that 3.10 is to have another.
        options = options | {"enable_fp_fusion": True}
    if INTERPRETING:
        with _interpreter:
            return start(*arguments, **options)
    try:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return start(*arguments, **options)
        return start(*arguments, **options)
    except Exception as error:
        # The device's own errors, of whatever ran on it before, say what they are.
        if isinstance(error, torch.OutOfMemoryError) or DEVICE_ERROR in str(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise CannotLaunch(
            f"backend 'triton' needs Triton to compile and launch {kernel.__name__} on "
            f"{first.device}, but Triton {triton.__version__} cannot ({said:.300}); "
            "use backend 'torch'"
        ) from error


def _with_memory(start: Callable[..., Any], launch: Launch) -> Callable[..., Any]:
    """`start`, with memory for what it launches if that makes descriptors."""
    return functools.partial(_lend_memory, start) if launch.describes else start


def _lend_memory(start: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Starts what asks for memory, of an allocator that is the context's, and so each thread's own.

    In a copy of the context, so that whoever has set an allocator keeps it.
    """
    context = contextvars.copy_context()
    context.run(triton.set_allocator, _memory)
    return context.run(start, *arguments, **options)


def _memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """Bytes on the current device; PyTorch's start at a multiple of 512, descriptors at one of 128.

    They may be freed once the launch is queued, like any tensor that is used on its own stream.
    """
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def _keep(
    source: Any, kernel: Any, launch: Launch, pointers: tuple[Tensor | None, ...]
) -> Compiled:
    first: Any = pointers[0]
    constexprs = source.arg_names[len(pointers) + len(launch.scalars) :]
    return Compiled(
        source,
        kernel,
        _with_memory(kernel.run, launch),
        kernel.function,
        kernel.packed_metadata,
        triton.runtime.driver.active.get_current_stream,
        first.device.index,
        torch.cuda.device_count() <= 1,
        (*launch.grid, 1, 1)[:3],
        (*launch.scalars, *(launch.constants.get(name) for name in constexprs)),
    )
