"""Fixtures of the suite.

Kernels run on the GPU where there is one, else in Triton's interpreter on CPU tensors.
"""

import math
import os
import random
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anyone imports triton

# No table of the user's has a say in the tests. A folder that is not there has none.
os.environ["FASTLINEAR_CACHE"] = os.path.join(os.path.dirname(__file__), "no-tables")

import fastlinear
from fastlinear.kernels import launch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pytest_report_header() -> str:
    where = "interpreted on the CPU" if launch.INTERPRETING else torch.cuda.get_device_name()
    return f"kernels: {where}"


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # workers share the cores
    if launch.INTERPRETING:
        _poison_unset_loads()
        _sum_products_exactly()
        _round_to_bfloat16()
    if DEVICE.type == "cuda":
        with warnings.catch_warnings():
            # The first product in the thread of autograd warns that it makes cuBLAS's context.
            warnings.simplefilter("ignore")
            ones = torch.ones(16, 16, device=DEVICE, requires_grad=True)
            (ones @ ones).sum().backward()


def _poison_unset_loads() -> None:
    """Gives masked loads that set no `other` NaN where the interpreter gives 0.

    On a GPU the value is undefined.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    load = InterpreterBuilder.create_masked_load

    def poisoned_load(self, ptrs, mask, other, *arguments, **named):  # type: ignore[no-untyped-def]
        if other is None:
            dtype = ptrs.get_element_ty()
            # bfloat16 is held as bit patterns, of which all ones is a NaN as well.
            value = (
                np.nan
                if np.issubdtype(_get_np_dtype(dtype), np.floating)
                else np.iinfo(_get_np_dtype(dtype)).max
            )
            other = TensorHandle(np.full_like(ptrs.data, value, dtype=_get_np_dtype(dtype)), dtype)
        return load(self, ptrs, mask, other, *arguments, **named)

    InterpreterBuilder.create_masked_load = poisoned_load


def _sum_products_exactly() -> None:
    """Rounds each interpreted `tl.dot` once, whatever numpy's BLAS does.

    The interpreter leaves the order of a product's additions to numpy, and so to the machine; its
    error says nothing of the kernel's and would take part of the budget.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def exact_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        wide = np.longdouble if acc.data.dtype == np.float64 else np.float64
        product = np.matmul(a.data.astype(wide), b.data.astype(wide)).astype(acc.data.dtype)
        return TensorHandle(product + acc.data, acc.dtype.scalar)

    InterpreterBuilder.create_dot = exact_dot


def _round_to_bfloat16() -> None:
    """Rounds bfloat16 results to nearest, as every GPU does, where the interpreter truncates.

    Truncated terms all err to one side, and their sum by many times what it would on a GPU.
    """
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(input, input_dtype, output_dtype, rounding_mode):  # type: ignore[no-untyped-def]
        if input.dtype == np.float32 and output_dtype.is_bf16():
            wide = torch.from_numpy(np.ascontiguousarray(input))
            return wide.bfloat16().view(torch.uint16).numpy()
        return convert(input, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = rounded


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every output and workspace starts as NaN, between guards that no kernel may write to.

    So an element that is never written, or read early, is seen, and so is a store past the end.
    """
    guard, untouched = 1024, -77.0
    buffers: list[torch.Tensor] = []

    def allocate(like: torch.Tensor, output: launch.Operand) -> torch.Tensor:
        shape, dtype, device = output.shape, output.dtype, like.device
        size = math.prod(shape)
        buffer = torch.full((size + 2 * guard,), untouched, dtype=dtype, device=device)
        buffer[guard : guard + size] = float("nan")
        buffers.append(buffer)
        # A tensor of its own rather than a view: autograd treats views differently.
        return torch.empty(0, dtype=dtype, device=device).set_(
            buffer.untyped_storage(), guard, shape
        )

    monkeypatch.setattr(launch, "allocate", allocate)
    yield
    for buffer in buffers:
        assert (buffer[:guard] == untouched).all(), "a kernel wrote before its output"
        assert (buffer[-guard:] == untouched).all(), "a kernel wrote past its output"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Fresh random inputs in every run.

    A failing test shows the seed, and FASTLINEAR_SEED repeats it.
    """
    seed = int(os.environ.get("FASTLINEAR_SEED", random.SystemRandom().randrange(2**31)))
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"repeat with FASTLINEAR_SEED={seed}")
    return seed


@pytest.fixture(autouse=True)
def float32_highest() -> Iterator[None]:
    """Every test starts, and leaves torch, at the default precision."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """`fastlinear.linear` takes the kernels."""
    with fastlinear.use_backend("triton"):
        yield


@pytest.fixture(params=["auto", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to compute the layer, PyTorch's and the kernels'."""
    with fastlinear.use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE
