"""The kernels' launchers, if the machine has what they need."""

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from fastlinear.kernels.configs.config import Target


class Launchers(NamedTuple):
    """The kernels' modules."""

    forward: ModuleType
    backward: ModuleType
    backward_weight: ModuleType
    activation: ModuleType
    gated: ModuleType
    gated_backward: ModuleType


@functools.cache
def launchers() -> Launchers:
    """The modules of the launchers, imported when a kernel is first needed.

    Raises:
        RuntimeError: Triton is not installed.
    """
    try:
        from fastlinear.kernels.backward import elementwise as activation
        from fastlinear.kernels.backward import gated as gated_backward
        from fastlinear.kernels.backward import grad_weight as backward_weight
        from fastlinear.kernels.backward import linear as backward
        from fastlinear.kernels.forward import gated
        from fastlinear.kernels.forward import linear as forward
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"backend 'triton' needs the package triton, 3.6 or newer ({error}); "
            "install it with `pip install 'fastlinear[triton]'`, or use backend 'auto'"
        ) from error
    return Launchers(forward, backward, backward_weight, activation, gated, gated_backward)


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton is there, and knows the device."""
    try:
        launchers().forward.launch.target_of(device)
    except RuntimeError:
        return False
    return True


def target_of(device: torch.device) -> Target | None:
    """What kernels have to fit; None without Triton, or on a device that it does not know.

    No kernel is imported for it: tables ask, which may name none.
    """
    try:
        from fastlinear.kernels.launching import launch

        return launch.target_of(device)
    except (ImportError, OSError, RuntimeError):
        return None
