"""The kernel for a few rows: its configurations, its sums, its rows, its activations.

What every kind of forward kernel has to do is in test_forward.py.
"""

import dataclasses

import pytest
import torch
from oracle import (
    DTYPES,
    assert_as_exact,
    exact_backward,
    exact_forward,
    fenced,
    native_backward,
    native_forward,
    normal,
)
from torch import Tensor

from fastlinear.kernels.backward.linear import linear_backward_input
from fastlinear.kernels.configs.config import TARGETS, Config, Kernel, Traits
from fastlinear.kernels.configs.legality import why_illegal
from fastlinear.kernels.configs.tiles import legal_configs
from fastlinear.kernels.forward.linear import linear_activation_forward, linear_forward
from fastlinear.kernels.launching import launch
from fastlinear.kernels.launching.operands import Activation
from fastlinear.ops.elementwise import ACTIVATIONS

SMALL = Config(2, 4, 32, num_warps=4, num_stages=1, kind="gemv")


def check(input: Tensor, weight: Tensor, bias: Tensor | None, config: Config) -> None:
    assert_as_exact(
        linear_forward(input, weight, bias, config=config),
        native_forward(input, weight, bias),
        exact_forward(input, weight, bias),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_m", [1, 2, 4])
@pytest.mark.parametrize("reads_outputs", [False, True], ids=["weight", "weight transposed"])
def test_gemv_configuration(
    dtype: torch.dtype, block_m: int, reads_outputs: bool, device: torch.device
) -> None:
    target = TARGETS["sm_90"] if launch.INTERPRETING else launch.target_of(device)
    traits = Traits(dtype, "ieee", False, target, activation=True)
    (config,) = (
        config
        for config in legal_configs("forward", traits, "gemv")
        if config.block_m == block_m and config.reads_outputs == reads_outputs
    )
    m, n, k = block_m + 1, config.block_n + 3, 2 * config.block_k + 5
    input, bias = normal((m, k), dtype, device), normal((n,), dtype, device)
    weight = normal((k, n), dtype, device).t() if reads_outputs else normal((n, k), dtype, device)
    check(input, weight, bias, config)
    if reads_outputs:
        grad_input = linear_backward_input(input, weight.t(), config=config)
        operands = input, bias.new_zeros(m, n), weight.t()
        native, exact = native_backward(*operands)[0], exact_backward(*operands)[0]
        assert_as_exact(grad_input, native, exact, "grad_input")


@pytest.mark.parametrize("block_m", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_gemv_rows_do_not_depend_on_each_other(m: int, block_m: int, device: torch.device) -> None:
    config = dataclasses.replace(SMALL, block_m=block_m)
    input, weight = normal((m, 45), torch.float32, device), normal((7, 45), torch.float32, device)
    bias = normal((7,), torch.float32, device)
    check(input, weight, bias, config)
    together = linear_forward(input, weight, bias, config=config)
    for row in range(m):
        alone = linear_forward(input[row : row + 1], weight, bias, config=config)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 6000])
def test_gemv_sums_of_any_length(k: int, dtype: torch.dtype, device: torch.device) -> None:
    config = dataclasses.replace(SMALL, block_k=512 if k > 512 else 32)
    # All positive: sums that grow lose the most.
    input = fenced(torch.rand(3, k, dtype=dtype, device=device))
    weight = fenced(torch.rand(5, k, dtype=dtype, device=device))
    check(input, weight, normal((5,), dtype, device), config)


def test_gemv_batch_of_layers(device: torch.device) -> None:
    shapes = (3, 3, 40), (3, 5, 40), (3, 5)
    check(*(normal(shape, torch.float32, device) for shape in shapes), SMALL)


def test_gemv_repeats_bit_for_bit(device: torch.device) -> None:
    input = normal((3, 1500), torch.float32, device)
    weight = normal((9, 1500), torch.float32, device)
    config = dataclasses.replace(SMALL, block_k=256)
    first = linear_forward(input, weight, config=config)
    assert torch.equal(first, linear_forward(input, weight, config=config))
    # Exact products take no longer here.
    assert torch.equal(first, linear_forward(input, weight, config=config, precision="tf32"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gemv_applies_and_saves(activation: Activation, device: torch.device) -> None:
    shapes = (3, 40), (5, 40), (5,)
    operands = tuple(normal(shape, torch.float32, device) for shape in shapes)
    output, preactivation = linear_activation_forward(*operands, activation, True, config=SMALL)
    native, exact = native_forward(*operands), exact_forward(*operands)
    assert preactivation is not None
    assert_as_exact(preactivation, native, exact, "the pre-activation")
    function = ACTIVATIONS[activation]
    # As exact as the pre-activation. Only relu_squared makes an error larger, by its derivative.
    largest = exact.abs().max().item()
    scale = 2 * largest * largest if activation == "relu_squared" else largest
    assert_as_exact(output, function(native), function(exact), "output", scale)


@pytest.mark.parametrize(
    ("kernel", "change", "reason"),
    [
        ("forward", {"block_m": 8}, "block_m=8 is more rows than the 4"),
        ("forward", {"block_n": 3}, "block_n=3 is not a power of two"),
        ("forward", {"block_k": 0}, "block_k=0 is not a power of two"),
        ("forward", {"block_m": 4, "block_n": 4, "block_k": 1024}, "accumulators take 128"),
        ("backward_weight", {}, "computes a forward product, no backward_weight"),
        ("gated_forward", {}, "computes a forward product, no gated_forward"),
    ],
)
def test_gemv_illegal(kernel: Kernel, change: dict[str, int], reason: str) -> None:
    traits = Traits(torch.bfloat16, "ieee", True, TARGETS["sm_90"])
    assert why_illegal("forward", SMALL, traits) is None
    said = why_illegal(kernel, dataclasses.replace(SMALL, **change), traits)
    assert said is not None
    assert reason in said
