"""The way of calls like an earlier one, from `linear` to the launch with nothing in between.

PyTorch's dispatcher, and what the launcher has to learn of operands, take longer than all the rest
of a call. Neither comes to anything new for operands that are alike in all that PyTorch dispatches
by and all that a plan depends on, while nothing watches the ops. So `remember` notes such operands
down, with what was planned for them, and `find` compares.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear import backend

LARGEST_CACHE = 4096  # shapes
SHORTCUTS_A_SHAPE = 8  # operands of the same shapes may differ in strides, dtype and requires_grad


class Shortcut(NamedTuple):
    """What `linear` does for operands that are `alike`.

    requires_grad: whether a gradient of one of them may be wanted.
    output: a function of them.
    """

    alike: Callable[..., bool]
    requires_grad: bool
    output: Callable[[Tensor, Tensor, Tensor | None], Tensor]


# By shapes, which nested tensors refuse to tell: `alike` must not be asked about those.
_shortcuts: dict[Any, list[Shortcut]] = {}


def find(input: Tensor, weight: Tensor, bias: Tensor | None) -> Shortcut | None:
    """The shortcut for these operands, if there is one."""
    shapes = input.shape, weight.shape, None if bias is None else bias.shape
    operands = (input, weight) if bias is None else (input, weight, bias)
    for shortcut in _shortcuts.get((shapes, backend.settings()), ()):
        if shortcut.alike(*operands):
            usable = _aligned(operands) and not internals.watched()
            return shortcut if usable else None
    return None


def remember(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Makes a shortcut for operands that `linear` has just taken, if there can be one."""
    shapes = input.shape, weight.shape, None if bias is None else bias.shape
    operands = (input, weight) if bias is None else (input, weight, bias)
    if internals.watched() or not internals.plain(*operands) or not _aligned(operands):
        return
    plan = backend.plan(input, weight, bias)
    if plan.copy_input or plan.launch.launch.grid == (0,):
        return
    if len(_shortcuts) >= LARGEST_CACHE:
        _shortcuts.clear()
    shortcuts = _shortcuts.setdefault((shapes, backend.settings()), [])
    if len(shortcuts) >= SHORTCUTS_A_SHAPE:
        shortcuts.clear()
    shortcuts.append(
        Shortcut(
            internals.alike(*operands),
            internals.above_autograd() and any(one.requires_grad for one in operands),
            backend.launchers().forward.as_planned(plan),
        )
    )


def _aligned(operands: tuple[Tensor, ...]) -> bool:
    """Whether all addresses divide by 16, as nearly always: plans for others are not kept here."""
    bits = 0
    for operand in operands:
        bits |= operand.data_ptr()
    return bits % 16 == 0
