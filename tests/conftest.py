"""Fixtures of the suite.

Kernels run on the GPU where there is one, else in Triton's interpreter on CPU tensors.
"""

import os
import random
import signal
import warnings
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anyone imports triton

# No table of the user's has a say in the tests. A folder that is not there has none.
os.environ["FASTLINEAR_CACHE"] = os.path.join(os.path.dirname(__file__), "no-tables")

import guards

import fastlinear
from fastlinear.kernels.launching import launch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pytest_report_header() -> str:
    where = "interpreted on the CPU" if launch.INTERPRETING else torch.cuda.get_device_name()
    return f"kernels: {where}"


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell starts what runs in its background. What tests start would inherit it, and
        # Ctrl-C be nothing to them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # workers share the cores
    if launch.INTERPRETING:
        guards.make_interpreter_strict()
    if DEVICE.type == "cuda":
        with warnings.catch_warnings():
            # The first product in the thread of autograd warns that it makes cuBLAS's context.
            warnings.simplefilter("ignore")
            ones = torch.ones(16, 16, device=DEVICE, requires_grad=True)
            (ones @ ones).sum().backward()


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Every output and workspace starts as NaN, between guards that no kernel may write to."""
    with guards.poisoned_outputs():
        yield


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
