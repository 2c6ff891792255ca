"""Configurations: the predicate, the choice, the splits."""

import dataclasses
from types import ModuleType

import pytest
import torch

from fastlinear.kernels import choose as chooser
from fastlinear.kernels import configs, tiles
from fastlinear.kernels.choose import choose, choose_splits
from fastlinear.kernels.configs import TARGETS, Config, why_illegal
from fastlinear.kernels.tiles import legal_configs

SM_90 = TARGETS["sm_90"]
LARGE = Config(128, 256, 64, num_warps=8, num_stages=3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_k": 48}, "block_k=48 is not a power of two"),
        ({"block_m": 8}, "block_m=8 is not a power of two of at least 16"),
        ({"num_stages": 5}, "operands need 245760 bytes of shared memory, sm_90 has 232448"),
        ({"num_warps": 4}, "accumulators take 256 registers a thread"),
    ],
)
def test_predicate_says_why(change: dict[str, int], reason: str) -> None:
    assert why_illegal("forward", LARGE, torch.bfloat16, "ieee", True, SM_90) is None
    said = why_illegal(
        "forward", dataclasses.replace(LARGE, **change), torch.bfloat16, "ieee", True, SM_90
    )
    assert said is not None
    assert reason in said


def test_predicate_keeps_large_tiles_for_aligned_operands() -> None:
    assert "addresses" in str(why_illegal("forward", LARGE, torch.bfloat16, "ieee", False, SM_90))


def test_predicate_counts_the_target_s_shared_memory() -> None:
    small = dataclasses.replace(SM_90, shared_memory=99 * 1024)  # consumer GPUs
    assert "shared memory" in str(
        why_illegal("forward", LARGE, torch.bfloat16, "ieee", True, small)
    )


@pytest.mark.parametrize("kernel", ["forward", "backward_weight"])
@pytest.mark.parametrize("shared_memory", [65_536, 101_376, 166_912])
def test_some_configuration_is_always_legal(kernel: configs.Kernel, shared_memory: int) -> None:
    for target in TARGETS.values():
        smaller = dataclasses.replace(
            target, shared_memory=min(shared_memory, target.shared_memory)
        )
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for precision in ("ieee", "tf32"):
                for aligned in (True, False):
                    assert legal_configs(kernel, dtype, precision, aligned, smaller)


def test_choice_fills_the_gpu() -> None:
    def chosen(m: int, n: int, k: int) -> Config:
        return choose("forward", 1, m, n, k, torch.bfloat16, "ieee", True, SM_90)

    assert chosen(8192, 8192, 8192).block_m * chosen(8192, 8192, 8192).block_n >= 128 * 128
    assert chosen(16, 4096, 4096).block_m <= 32, "rows that are not there would be multiplied"
    few_tiles = chosen(512, 512, 4096)
    assert few_tiles.block_m * few_tiles.block_n < 128 * 128, (
        "large tiles would leave most multiprocessors idle"
    )


def test_splits_fill_idle_multiprocessors_and_no_more() -> None:
    config = Config(64, 128, 128, num_warps=8, num_stages=4)
    assert choose_splits(config, 1, 65536, 128, 128, SM_90) == SM_90.multiprocessors
    assert choose_splits(config, 1, 65536, 4096, 4096, SM_90) == 1
    assert choose_splits(config, 1, 128, 128, 128, SM_90) == 1, "too few rows to share"
    assert choose_splits(config, 1, 1024, 128, 128, SM_90) == 4, (
        "each split takes four steps at least"
    )


@pytest.mark.parametrize("module", [configs, tiles, chooser])
def test_choosing_imports_no_triton_and_measures_nothing(module: ModuleType) -> None:
    imported = {name for name, value in vars(module).items() if isinstance(value, ModuleType)}
    assert imported <= {"functools", "math", "torch"}
