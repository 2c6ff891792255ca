"""The settings of the process."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch

from fastlinear import _machine as machine
from fastlinear import _ranks as ranks
from fastlinear import _torch_internals as internals
from fastlinear.choice import known
from fastlinear.kernels.launching.operands import DTYPES

if TYPE_CHECKING:
    from fastlinear.choice.table import Row

BACKENDS = ("auto", "triton", "torch")


def _checked(given: str, source: str, choices: tuple[str, ...] = BACKENDS) -> str:
    if given not in choices:
        raise ValueError(
            f"{source} must be one of {', '.join(map(repr, choices))}, but is {given!r}"
        )
    return given


# Process-wide, as torch.set_float32_matmul_precision is: the layer's forward
# reads it, its backward follows its forward.
current: str = _checked(os.environ.get("FASTLINEAR_BACKEND", "auto"), "FASTLINEAR_BACKEND")
invariant: bool = False  # within batch_invariant()
float32_products: str = "ieee"  # within use_float32_products()


class use_backend:
    """Context manager that says which path computes `fastlinear.linear`.

    FASTLINEAR_BACKEND sets it from outside.

    The setting is the process's, like PyTorch's own precision settings: threads that enter and
    leave at different times change it for each other. A call's backward takes the path of its
    forward. What `torch.utils.checkpoint` computes again in backward is a call of its own, and
    takes the setting in force then.

    Args:
        backend: "auto" takes whatever is known to be fastest: `torch.nn.functional.linear`, until a
            table measured on the GPU at hand says that a kernel is faster. "triton" takes the
            kernels or raises, saying what is missing; it never falls back. "torch" is always
            `torch.nn.functional.linear`.

    Raises:
        ValueError: backend is none of these.
        RuntimeError: on entering anything but "triton" within `batch_invariant()`.
    """

    def __init__(self, backend: str) -> None:
        self.backend = _checked(backend, "backend")
        self.previous: list[str] = []  # a stack: one instance may be entered again within itself

    def __enter__(self) -> None:
        global current
        if invariant and self.backend != "triton":
            raise RuntimeError(
                "within batch_invariant() only the kernels keep its promise: "
                f"use_backend() takes 'triton' there, but backend is {self.backend!r}"
            )
        self.previous.append(current)
        current = self.backend

    def __exit__(self, *error: object) -> None:
        global current
        current = self.previous.pop()


class _SettingOfKernels:
    """Context manager within which a global of this module, which kernels read, is another."""

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value
        self.previous: list[object] = []  # a stack, as use_backend's

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                f"{type(self).__name__}() cannot be entered within a compiled function; "
                "enter it around the call"
            )
        self.previous.append(globals()[self.name])
        globals()[self.name] = self.value
        _choose_settings()

    def __exit__(self, *error: object) -> None:
        globals()[self.name] = self.previous.pop()
        _choose_settings()


class batch_invariant(_SettingOfKernels):
    """Context manager within which a row's results do not depend on the rows beside it.

    Output and grad_input of a row come out bit for bit the same for every batch size, alone or
    within a larger batch: what an input's neighbours are, as in a server that batches requests,
    then changes nothing. The kernels compute them, in a configuration that depends on the layer's
    features and dtype alone, with no sum split over programs; backend "auto" is "triton" there.
    grad_weight and grad_bias are sums over the batch, in the order of its rows.

    Calls take the configuration that is in force when they run: a backward has to run within it
    too, and so has a compiled function, which cannot enter it itself.

    Raises:
        RuntimeError: on entering it with backend "torch", which promises nothing of the kind, or
            within a function that is being compiled.
    """

    def __init__(self) -> None:
        super().__init__("invariant", True)
        self.kernels = use_backend("triton")

    def __enter__(self) -> None:
        if current == "torch":
            raise RuntimeError(
                "batch_invariant() needs the kernels, which backend 'auto' and 'triton' can take, "
                "but backend is 'torch'"
            )
        super().__enter__()
        self.kernels.__enter__()

    def __exit__(self, *error: object) -> None:
        self.kernels.__exit__()
        super().__exit__()


class use_float32_products(_SettingOfKernels):
    """Context manager that says how the kernels form float32 products at PyTorch's "highest".

    Like PyTorch's own precision settings it is the process's, and in force for the calls that run
    within it: a backward has to run within it too, and so has a compiled function, which cannot
    enter it itself. At "high" products are TF32 in any case.

    Args:
        products: "ieee", which is in force outside: multiply-adds of float32. "bf16x6": sums of
            512 terms or more, for more than 64 rows, on NVIDIA's tensor cores, each product as six
            of bfloat16; all others as "ieee". The README has the error of each.

    Raises:
        ValueError: products is none of these.
        RuntimeError: on entering it within a function that is being compiled.
    """

    def __init__(self, products: str) -> None:
        super().__init__("float32_products", _checked(products, "products", ("ieee", "bf16x6")))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on `device_type`, or None where it is off."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def dtype_under(autocast: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """What autocast makes of `dtype`: float64, and what is no float, it lets be."""
    spared = dtype == torch.float64 or dtype not in DTYPES
    return dtype if autocast is None or spared else autocast


def float32_precision() -> str:
    """How float32 products are to be formed, as the launchers take it.

    By torch's settings, where unset counts as "highest", as it does for cuBLAS, and then by
    `use_float32_products`.
    """
    if internals.float32_matmul_precision() == "tf32":
        return "tf32"
    return "ieee" if float32_products == "ieee" else f"long {float32_products}"


def _all_settings() -> Hashable:
    ours = float32_products, invariant, current, known.generation
    return internals.product_settings(), ours


def _choose_settings() -> None:
    global settings
    default = not invariant and float32_products == "ieee" and not known.available
    settings = internals.float32_matmul_precision if default else _all_settings


# What plans depend on besides operands: called in every call, and so asked no more than it has to.
settings: Callable[[], Hashable]
_choose_settings()
known.watchers.append(_choose_settings)


def use_tables(rows: dict[torch.device, tuple[Row, ...]] | None = None) -> None:
    """Goes by the tables that there are now, or by these rows alone."""
    known.reload(rows)


def expect_ranks() -> None:
    """Looks for the tables of other ranks, where there have come to be any."""
    if not known.available and ranks.expected() and not known.settled():
        use_tables()


def table_precision(dtype: torch.dtype, device: torch.device) -> str:
    """By which tables know how products of `dtype` are formed."""
    if dtype != torch.float32:
        return "ieee"
    if device.type == "cpu" and machine.device_name(device) != machine.INTERPRETER:
        return internals.float32_precision_on_cpu()
    return float32_precision()
