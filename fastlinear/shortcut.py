"""The way of calls like an earlier one, from `linear` to the launch with nothing in between.

PyTorch's dispatcher, and what the kernels' launcher has to learn of the operands, take longer than
all the rest of a call. Neither can come out otherwise for operands that are alike in everything that
PyTorch dispatches by and everything that a launch depends on, while nothing watches the ops. So
`remember` notes down such operands, with the launch that was planned for them, and `find` compares.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastlinear import _torch_internals as internals
from fastlinear import backend

LARGEST_CACHE = 4096  # shapes
SHORTCUTS_A_SHAPE = 8  # operands of the same shapes can differ in strides, dtype and requires_grad


class Shortcut(NamedTuple):
    """What `linear` does for operands that are `alike`.

    requires_grad: whether one of them requires a gradient.
    output: a function of them.
    """

    alike: Callable[..., bool]
    requires_grad: bool
    output: Callable[[Tensor, Tensor, Tensor | None], Tensor]


_shortcuts: dict[Any, list[Shortcut]] = {}


def _key(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """The settings and the shapes, which nested tensors refuse to tell: `alike` cannot take them."""
    precision = internals.float32_matmul_precision()
    return input.shape, weight.shape, None if bias is None else bias.shape, precision


def _addresses(input: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The addresses, united bit by bit: divisible by 16 if each of them is."""
    united = input.data_ptr() | weight.data_ptr()
    return united if bias is None else united | bias.data_ptr()


def find(input: Tensor, weight: Tensor, bias: Tensor | None) -> Shortcut | None:
    """The shortcut for these operands, if there is one."""
    precision = internals.float32_matmul_precision()
    if bias is None:
        for shortcut in _shortcuts.get((input.shape, weight.shape, None, precision), ()):
            if shortcut.alike(input, weight):
                addresses = input.data_ptr() | weight.data_ptr()
                return None if addresses % 16 or internals.watched() else shortcut
        return None
    for shortcut in _shortcuts.get((input.shape, weight.shape, bias.shape, precision), ()):
        if shortcut.alike(input, weight, bias):
            addresses = input.data_ptr() | weight.data_ptr() | bias.data_ptr()
            return None if addresses % 16 or internals.watched() else shortcut
    return None


def remember(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Makes a shortcut for operands that `linear` has just computed an output of, if it may be."""
    operands = (input, weight) if bias is None else (input, weight, bias)
    if internals.watched() or not internals.plain(*operands):
        return
    shortcuts = _shortcuts.setdefault(_key(input, weight, bias), [])
    if len(shortcuts) == SHORTCUTS_A_SHAPE or _addresses(input, weight, bias) % 16:
        return
    kernels = backend.launchers().forward
    plan = backend.plan(input, weight, bias)
    if plan.copy_input or plan.launch.launch.grid == (0,):
        return
    if len(_shortcuts) > LARGEST_CACHE:
        _shortcuts.clear()
    shortcuts.append(
        Shortcut(
            internals.alike(*operands),
            internals.above_autograd() and any(one.requires_grad for one in operands),
            kernels.as_planned(plan),
        )
    )
