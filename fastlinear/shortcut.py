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
from fastlinear import backend, implementations

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


# By shapes, which nested tensors refuse to tell: `alike` must not be asked about those. Only for
# operands whose addresses divide by 16, as nearly all do.
_shortcuts: dict[Any, list[Shortcut]] = {}


def find(input: Tensor, weight: Tensor, bias: Tensor | None) -> Shortcut | None:
    """The shortcut for these operands, if there is one."""
    # Every call takes the time that this takes: hence no function for each of its parts.
    if bias is None:
        for shortcut in _shortcuts.get((input.shape, weight.shape, None, backend.settings()), ()):
            if shortcut.alike(input, weight):
                unaligned = (input.data_ptr() | weight.data_ptr()) % 16
                return None if unaligned or internals.watched() else shortcut
        return None
    for shortcut in _shortcuts.get((input.shape, weight.shape, bias.shape, backend.settings()), ()):
        if shortcut.alike(input, weight, bias):
            unaligned = (input.data_ptr() | weight.data_ptr() | bias.data_ptr()) % 16
            return None if unaligned or internals.watched() else shortcut
    return None


def remember(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Makes a shortcut for operands that `linear` has just taken, if there can be one."""
    # First what is quickly told: where there is never a shortcut this is in vain every time.
    addresses = input.data_ptr() | weight.data_ptr() | (0 if bias is None else bias.data_ptr())
    if addresses % 16 or internals.autocasting() or internals.watched():
        return
    operands = (input, weight) if bias is None else (input, weight, bias)
    if not internals.plain(*operands):
        return
    # Asked before the plan is made, so that a table that comes between makes it one of the past.
    settings = backend.settings()
    plan = implementations.plan(input, weight, bias)
    # Another thread may have changed them in the middle: then nobody knows which the plan is for.
    if plan is None or settings != backend.settings():
        return
    straight = not plan.copy_input and plan.launch.launch.grid != (0,)
    if len(_shortcuts) >= LARGEST_CACHE:
        _shortcuts.clear()
    key = input.shape, weight.shape, None if bias is None else bias.shape, settings
    shortcuts = _shortcuts.setdefault(key, [])
    if len(shortcuts) >= SHORTCUTS_A_SHAPE:
        shortcuts.clear()
    shortcuts.append(
        Shortcut(
            internals.alike(*operands),
            internals.above_autograd() and any(one.requires_grad for one in operands),
            backend.launchers().forward.as_planned(plan) if straight else implementations.forward,
        )
    )
