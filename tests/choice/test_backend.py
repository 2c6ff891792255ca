"""Backends: which path runs, what it says where it cannot, and what importing costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastlinear
from fastlinear.choice import backend


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "FASTLINEAR_BACKEND")
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=variables | environment,
        timeout=120,
    )


def test_use_backend_nests_and_restores() -> None:
    assert backend.current == "auto"
    with fastlinear.use_backend("triton"):
        with fastlinear.use_backend("torch"):
            assert backend.current == "torch"
        assert backend.current == "triton"
    again = fastlinear.use_backend("triton")
    with again, again:
        assert backend.current == "triton"
    assert backend.current == "auto"
    with pytest.raises(ZeroDivisionError), fastlinear.use_backend("triton"):
        raise ZeroDivisionError
    assert backend.current == "auto"


def test_use_backend_names_the_choices() -> None:
    with pytest.raises(
        ValueError, match="backend must be one of 'auto', 'triton', 'torch', but is 'cuda'"
    ):
        fastlinear.use_backend("cuda")


def test_environment_sets_the_backend() -> None:
    code = "from fastlinear.choice import backend; print(backend.current)"
    assert in_a_new_process(code, FASTLINEAR_BACKEND="torch").stdout.strip() == "torch"
    wrong = in_a_new_process(code, FASTLINEAR_BACKEND="cudnn")
    assert (
        "FASTLINEAR_BACKEND must be one of 'auto', 'triton', 'torch', but is 'cudnn'"
        in wrong.stderr
    )


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_other_backends_are_pytorch_itself(name: str, device: torch.device) -> None:
    input, weight, bias = (torch.randn(shape, device=device) for shape in ((4, 5), (3, 5), (3,)))
    with fastlinear.use_backend(name):
        assert torch.equal(fastlinear.linear(input, weight, bias), F.linear(input, weight, bias))


def test_triton_on_cpu_says_how_to_get_it() -> None:
    code = """
import torch, fastlinear
layer = fastlinear.Linear(3, 2)
print(layer(torch.ones(1, 3)).shape)
with fastlinear.use_backend("triton"):
    layer(torch.ones(1, 3))
"""
    result = in_a_new_process(code, CUDA_VISIBLE_DEVICES="")
    assert result.stdout.strip() == "torch.Size([1, 2])"
    assert "backend 'triton' takes tensors on a GPU, but these are on cpu" in result.stderr
    assert "TRITON_INTERPRET=1" in result.stderr


def test_triton_not_installed_says_what_to_install() -> None:
    code = """
import sys
from pathlib import Path
sys.modules["triton"] = None  # as if it were not installed
import torch, fastlinear
print(fastlinear.Linear(3, 2)(torch.ones(1, 3)).shape)
with fastlinear.use_backend("triton"):
    fastlinear.Linear(3, 2)(torch.ones(1, 3))
"""
    result = in_a_new_process(code)
    assert result.stdout.strip() == "torch.Size([1, 2])"
    assert "backend 'triton' needs the package triton, 3.6 or newer" in result.stderr
    assert "pip install 'fastlinear[triton]'" in result.stderr


def test_import_brings_no_triton_and_costs_little(tmp_path: Path) -> None:
    code = """
import os, sys, time
start = time.process_time()
import torch
between = time.process_time()
# As torch is, and as pip installs both: compiled to bytecode, which the first process writes.
sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["BYTECODE"]
compiled = time.process_time()
import fastlinear
share = (time.process_time() - compiled) / (between - start)
print(share, "triton" in sys.modules, "kernels" in sys.modules)
import importlib.util
importlib.util.find_spec("torch.utils.flop_counter")  # asking for it is not importing it
import torch.utils.flop_counter
print(torch.ops.fastlinear.linear in torch.utils.flop_counter.flop_registry)
"""
    results = [in_a_new_process(code, BYTECODE=str(tmp_path)).stdout.split() for _ in range(4)]
    assert all(result[1:] == ["False", "False", "True"] for result in results)
    # As a share of torch's own import, which a slow or busy machine slows as much.
    assert min(float(result[0]) for result in results) < 0.025, f"shares of torch's: {results}"


def test_float32_follows_torch_s_settings() -> None:
    assert backend.float32_precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    assert backend.float32_precision() == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert backend.float32_precision() == "ieee"
    matmul = torch.backends.cuda.matmul
    previous = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert backend.float32_precision() == "tf32"
    finally:
        matmul.fp32_precision = previous


def test_float32_precision_reaches_the_kernels(device: torch.device) -> None:
    input, weight = torch.randn(40, 64, device=device), torch.randn(30, 64, device=device)
    exact = input.double() @ weight.double().T

    def error() -> float:
        with fastlinear.use_backend("triton"):
            return (fastlinear.linear(input, weight) - exact).abs().max().item()

    highest = error()
    torch.set_float32_matmul_precision("high")
    assert highest < 1e-4 < error()
