"""The split-K kernel: how parts of K are shared and summed. Its contract is in test_forward."""

import dataclasses

import pytest
import torch
from oracle import (
    assert_as_exact,
    exact_forward,
    native_forward,
    normal,
    programs_in_order,
    shipped_configs,
)
from torch import Tensor

from fastlinear.kernels.configs.config import Config, Traits
from fastlinear.kernels.configs.tiles import legal_configs
from fastlinear.kernels.forward.linear import (
    linear_activation_forward,
    linear_forward,
    plan_forward,
)
from fastlinear.kernels.launching import launch, shared_sums

CONFIG = Config(16, 32, 16, num_warps=4, num_stages=3, kind="split_k", splits=5)
ORDERS = {
    "backwards": lambda index, count: count - 1 - index,
    "shuffled": lambda index, count: (index * 11 + 3) % count,  # of 35
}


def operands(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    return normal((m, k), dtype, device), normal((n, k), dtype, device), normal((n,), dtype, device)


def check(given: tuple[Tensor, Tensor, Tensor], config: Config, precision: str = "ieee") -> Tensor:
    output = linear_forward(*given, config=config, precision=precision)
    assert_as_exact(output, native_forward(*given), exact_forward(*given), "output")
    return output


@pytest.mark.parametrize(
    ("dtype", "precision", "config"), shipped_configs("forward", "split_k"), ids=str
)
def test_split_k_configuration(
    dtype: str, precision: str, config: Config, device: torch.device
) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    traits = Traits(getattr(torch, dtype), precision, False, launch.target_of(device))
    if not launch.INTERPRETING and config not in legal_configs("forward", traits, "split_k"):
        pytest.skip("not a configuration of this GPU")
    config = dataclasses.replace(config, splits=2)
    m, n, k = config.block_m + 3, config.block_n + 5, 3 * config.block_k + 3
    check(operands(m, n, k, getattr(torch, dtype), device), config, precision)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 50])  # of 7 steps
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_split_k_takes_any_number_of_splits(
    splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    given = operands(20, 70, 6 * CONFIG.block_k + 1, dtype, device)
    check(given, dataclasses.replace(CONFIG, splits=splits))


@pytest.mark.parametrize(("splits", "found"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (50, 7)])
def test_split_k_leaves_no_split_empty(splits: int, found: int, device: torch.device) -> None:
    given = operands(20, 70, 6 * CONFIG.block_k + 1, torch.float32, device)
    config = dataclasses.replace(CONFIG, splits=splits)
    plan = plan_forward(launch.describe(*given, None)[:3], "ieee", None, False, config).launch
    assert plan.launch.grid == (2 * 3 * found,)
    assert (not plan.partials) == (found == 1)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_split_k_sums_in_one_order_however_programs_arrive(
    order, activation: str | None, device: torch.device
) -> None:  # type: ignore[no-untyped-def]
    if device.type != "cpu":
        pytest.skip("a GPU has orders of its own: that calls repeat bit for bit is tested there")
    m, n, k = 10, 7 * CONFIG.block_n - 5, 5 * CONFIG.block_k  # 7 tiles of 5 splits
    given = operands(m, n, k, torch.float32, device)

    def call() -> tuple[Tensor, Tensor | None]:
        return linear_activation_forward(*given, activation, True, config=CONFIG)

    expected = call()
    with programs_in_order(lambda index, count: order(index, count)):
        found = call()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_split_k_keeps_layers_apart_however_programs_arrive(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a GPU has orders of its own")
    input, weight = (normal((3, size, 80), torch.float32, device) for size in (10, 30))
    expected = linear_forward(input, weight, config=CONFIG)
    with programs_in_order(lambda index, count: index * 7 % count):  # of 15, by layer
        found = linear_forward(input, weight, config=CONFIG)
    assert torch.equal(found, expected)


def test_split_k_chooses_offsets_by_its_workspace(device: torch.device) -> None:
    input, weight = (
        launch.Operand((size, 2**10), (0, 0), torch.float32, device, True)
        for size in (2**10, 2**17)
    )
    for splits, expected in ((16, False), (32, True)):
        config = dataclasses.replace(CONFIG, splits=splits)
        plan = plan_forward((input, weight, None), "ieee", None, False, config).launch
        assert plan.launch.constants["OPTIONS"].wide is expected


def test_split_k_repeats_bit_for_bit(device: torch.device) -> None:
    given = operands(13, 70, 170, torch.float32, device)
    expected = linear_forward(*given, config=CONFIG)
    assert all(torch.equal(linear_forward(*given, config=CONFIG), expected) for _ in range(3))


def test_counters_are_left_at_zero_and_used_again(device: torch.device) -> None:
    given = operands(20, 70, 100, torch.float32, device)
    like = given[0]
    before = shared_sums.counters(like, 6)
    linear_forward(*given, config=CONFIG)
    after = shared_sums.counters(like, 6)
    assert after.data_ptr() == before.data_ptr()
    assert after.dtype == torch.int32
    assert not after.any()
    more = shared_sums.counters(like, after.numel() + 1)
    assert more.numel() > after.numel()
    assert not more.any()


def test_a_layer_of_many_tiles_gets_as_many_counters(device: torch.device) -> None:
    given = normal((3, 40, 32), torch.float32, device), normal((3, 70, 32), torch.float32, device)
    config = dataclasses.replace(CONFIG, splits=2)
    plan = plan_forward(launch.describe(*given, None), "ieee", None, False, config).launch
    assert plan.counters == 3 * 3 * 3
