"""Launches without Triton's own way to them, after the first of a kind.

Triton looks at every argument of every launch for what it has specialised the kernel on, which takes
longer than all the rest of a call. Most of that is the same in all launches of one `Launch`, and the
rest, `specialization`, is quickly told; so the kernel that Triton has compiled is kept with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from .indexing import locate_tile

# Kernels interpret, or compile, for the life of the process:
# triton.jit decides when it decorates them.
INTERPRETING: bool = not isinstance(locate_tile, triton.runtime.JITFunction)

# The Tritons whose launchers are known to take what `run` gives them. 3.9 makes the same call, but
# has more to look at (fpsan, gsan), so that it launches every time in its own way.
KNOWN_TRITONS = ("3.6.", "3.7.")
DIRECT: bool = not INTERPRETING and triton.__version__.startswith(KNOWN_TRITONS)

KEPT_KERNELS = 64  # of one Launch; more than a few come of addresses that are aligned by turns
AMD: bool = torch.version.hip is not None
RUNTIME, COMPILATION = knobs.runtime, knobs.compilation
INSTRUMENTED: str = COMPILATION.instrumentation_mode


class Compiled(NamedTuple):
    """A kernel as Triton has compiled it, and how it is launched.

    source, kernel: what it was compiled from, and Triton's object of it, which keeps it loaded.
    launcher, function, metadata: that object's.
    current_stream: a device's, by its index; Triton knows how PyTorch is asked for it.
    device: the index of the device that it is loaded on.
    only_device: whether there is no other, so that it need not be made the current one.
    arguments: all but the pointers, in the kernel's order; the launcher skips constexprs.
    """

    source: Any
    kernel: Any
    launcher: Callable[..., None]
    function: Any
    metadata: Any
    current_stream: Callable[[int], int]
    device: int
    only_device: bool
    arguments: tuple[Any, ...]


@dataclass(eq=False, slots=True)
class Launch:
    """All of a kernel's launch but its pointers.

    It is for operands of one description (`launch.describe`): a device, dtypes, and which of the
    pointers are None must follow from it. What is compiled for it is kept with it, so it is to be
    kept, rather than made for every call.

    grid: as Triton takes it; (0,) where there is nothing to compute.
    scalars: the kernel's sizes and strides, in its order.
    constants: its constexprs, and Triton's options.
    compiled: by `specialization`.
    """

    grid: tuple[int]
    scalars: tuple[float, ...]
    constants: dict[str, Any]
    compiled: dict[tuple[Any, ...], Compiled] = field(default_factory=dict, repr=False)


def specialization(pointers: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What Triton specialises a kernel on that launches of one `Launch` do not share.

    That is which addresses divide by 16, outputs' and workspaces' included, and on AMD also which
    storages are small. Integers by value and width, constexprs, options, dtypes, device, and which
    pointers are None are the Launch's.
    """
    aligned = (one is None or one.data_ptr() % 16 == 0 for one in pointers)
    if AMD:
        return *aligned, *(
            one is None or one.untyped_storage().nbytes() < 2**31 for one in pointers
        )
    return tuple(aligned)


def watched(kernel: Any) -> bool:
    """Whether Triton has more to do in a launch than to launch: hooks to call, checks to compile.

    Hooks that are called when a kernel is compiled or loaded are no concern of later launches.
    Environment variables count as they were when Triton was imported.
    """
    enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
    try:
        hooks = enter.calls or leave.calls
    except AttributeError:  # a function, or None, has been put in the place of a chain
        hooks = True
    return bool(
        hooks
        or kernel.pre_run_hooks
        or RUNTIME.debug
        or RUNTIME.add_stages_inspection_hook
        or COMPILATION.__dict__.get("instrumentation_mode", INSTRUMENTED)
    )


def run(kernel: Any, launch: Launch, pointers: tuple[Tensor | None, ...]) -> None:
    """Launches `kernel` on the device of its operands, which the first of `pointers` is on."""
    if not DIRECT or watched(kernel):
        _run_by_triton(kernel, launch, pointers)
        return
    addresses, bits = [], 0
    for one in pointers:
        # Triton's launcher takes addresses as well as tensors, and skips what was None at first.
        address = 0 if one is None else one.data_ptr()
        addresses.append(address)
        bits |= address
    # Nearly always all are aligned, and then there is no need to say which.
    key = specialization(pointers) if bits % 16 or AMD else ()
    compiled = launch.compiled.get(key)
    if compiled is None or compiled[0] is not kernel:
        found = _run_by_triton(kernel, launch, pointers)
        if found is not None:
            if len(launch.compiled) >= KEPT_KERNELS:
                launch.compiled.clear()
            launch.compiled[key] = _keep(kernel, found, launch, pointers)
        return
    _, _, launcher, function, metadata, current_stream, device, only_device, arguments = compiled
    if not only_device and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(kernel, launch, pointers)
        return
    # The call that Triton's own run ends with, less the hooks.
    stream = current_stream(device)
    launcher(
        *launch.grid, 1, 1, stream, function, metadata, None, None, None, *addresses, *arguments
    )


def _run_by_triton(kernel: Any, launch: Launch, pointers: tuple[Tensor | None, ...]) -> Any:
    """Triton's object of the compiled kernel, or None if there is none."""
    first: Any = pointers[0]
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return kernel[launch.grid](*pointers, *launch.scalars, **launch.constants)
    return kernel[launch.grid](*pointers, *launch.scalars, **launch.constants)


def _keep(
    source: Any, kernel: Any, launch: Launch, pointers: tuple[Tensor | None, ...]
) -> Compiled:
    first: Any = pointers[0]
    constexprs = source.arg_names[len(pointers) + len(launch.scalars) :]
    return Compiled(
        source,
        kernel,
        kernel.run,
        kernel.function,
        kernel.packed_metadata,
        triton.runtime.driver.active.get_current_stream,
        first.device.index,
        torch.cuda.device_count() <= 1,
        (*launch.scalars, *(launch.constants[name] for name in constexprs)),
    )
