"""What becomes of launches that are to be left out, or that have a fault planted in them.

FASTLINEAR_LEAVE_OUT has kernels, by `name_of`, that raise `LeftOut` instead; FASTLINEAR_PLANT has
kernels and what they are to have of FAULTS, as in "linear_gemv_kernel=hangs;linear_forward_kernel,
activated=wrong". With neither nothing is watched, and a launch takes the time that it takes.
"""

import os
import time
from collections.abc import Callable
from typing import Any

FAULTS = ("hangs", "wrong", "cannot launch")
LEAVE_OUT, PLANT = "FASTLINEAR_LEAVE_OUT", "FASTLINEAR_PLANT"
# By a pointer that is given.
_MARKS = {
    "partial_ptr": "split",
    "partial_weight_ptr": "split",
    "second_weight_ptr": "of two products",
}


class LeftOut(RuntimeError):
    """What was called launches a kernel that is known to be at fault."""


def name_of(kernel: Any, constants: dict[str, Any], pointers: Any) -> str:
    """The kernel's name, with what of its arguments makes it another one to be proven."""
    name, options = kernel.fn.__name__, constants["OPTIONS"]
    given = {
        argument
        for argument, one in zip(kernel.arg_names, pointers, strict=False)
        if one is not None
    }
    marks = [mark for pointer, mark in _MARKS.items() if pointer in given]
    marks += ["accumulating"] * bool(constants.get("ACCUMULATE"))
    if name == "elementwise_backward_kernel":
        marks += ["of a gate"] * ("up_ptr" in given)
    elif options.activation and not name.startswith("gate"):
        marks.append("activated")
    marks += ["of pieces"] * (options.precision == "bf16x6")
    return ", ".join([name, *marks])


def planted(text: str) -> dict[str, str]:
    """Faults by kernel.

    Raises:
        ValueError: one is none of FAULTS.
    """
    faults = dict(one.rsplit("=", 1) for one in text.split(";") if one)
    if wrong := set(faults.values()) - set(FAULTS):
        raise ValueError(f"faults are {', '.join(FAULTS)}, not {', '.join(sorted(wrong))}")
    return faults


def watch(report: Callable[[str], None] | None = None) -> None:
    """Has all launches of this process do what the environment says of them.

    report: is told of each launch before it is made.
    """
    left_out = set(filter(None, os.environ.get(LEAVE_OUT, "").split(";")))
    faults = planted(os.environ.get(PLANT, ""))
    if not (left_out or faults or report):
        return
    from fastlinear.kernels.launching import launch

    run = launch.run

    def watched(kernel: Any, launched: launch.Launch, pointers: Any) -> None:
        name = name_of(kernel, launched.constants, pointers)
        if name in left_out:
            raise LeftOut(f"{name} is left out")
        if report:
            report(name)
        fault = faults.get(name)
        if fault == "hangs":
            time.sleep(1e6)
        if fault == "cannot launch":
            raise launch.CannotLaunch(f"{name} cannot be launched, as was planted")
        if fault != "wrong":  # which leaves outputs as they were
            run(kernel, launched, pointers)

    launch.run = watched
