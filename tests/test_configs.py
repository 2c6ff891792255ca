"""Configurations: the predicate, the choice, the splits."""

import dataclasses
from types import ModuleType
from typing import get_args

import pytest
import torch

from fastlinear.kernels import choose as chooser
from fastlinear.kernels import choose_pair as pair_chooser
from fastlinear.kernels import configs, model, pair_model, tiles
from fastlinear.kernels.choose import choose, choose_splits
from fastlinear.kernels.choose_pair import choose_backward, choose_pair, starts_with_input
from fastlinear.kernels.configs import TARGETS, BackwardConfig, Config, why_illegal
from fastlinear.kernels.pairs import legal_pairs
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


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("kernel", get_args(configs.Kernel))
@pytest.mark.parametrize("shared_memory", [65_536, 101_376, 166_912])
def test_some_configuration_is_always_legal(
    kernel: configs.Kernel, activation: bool, shared_memory: int
) -> None:
    for target in TARGETS.values():
        smaller = dataclasses.replace(
            target, shared_memory=min(shared_memory, target.shared_memory)
        )
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for precision in ("ieee", "tf32", "bf16x6", "tf32x3"):
                for aligned in (True, False):
                    given = (kernel, dtype, precision, aligned, smaller, activation)
                    assert legal_configs(*given), given
                    assert legal_pairs(dtype, precision, aligned, smaller), given


def test_choice_fills_the_gpu() -> None:
    def chosen(m: int, n: int, k: int) -> Config:
        return choose("forward", 1, m, n, k, torch.bfloat16, "ieee", True, SM_90)

    assert chosen(8192, 8192, 8192).block_m * chosen(8192, 8192, 8192).block_n >= 128 * 128
    assert chosen(16, 4096, 4096).block_m <= 32, "rows that are not there would be multiplied"
    few_tiles = chosen(512, 512, 4096)
    assert few_tiles.block_m * few_tiles.block_n < 128 * 128, (
        "large tiles would leave most multiprocessors idle"
    )


@pytest.mark.parametrize(
    ("rows", "kind"),
    [(1, "gemv"), (2, "gemv"), (8, "split_k"), (32, "split_k"), (4096, "persistent")],
)
def test_choice_goes_by_the_number_of_rows(rows: int, kind: str) -> None:
    given = (torch.bfloat16, "ieee", True, SM_90, False)
    assert choose("forward", 1, rows, 4096, 4096, *given, True).kind == kind
    without_descriptors = choose("forward", 1, rows, 4096, 4096, *given, False).kind
    assert without_descriptors == ("tiled" if kind == "persistent" else kind)


def test_choice_splits_until_the_gpu_is_full() -> None:
    def chosen(n: int, k: int) -> Config:
        return choose("forward", 1, 16, n, k, torch.bfloat16, "ieee", True, SM_90)

    few, many = chosen(1024, 8192), chosen(64 * 4 * SM_90.multiprocessors, 8192)
    assert few.splits * 1024 // few.block_n >= SM_90.multiprocessors // 2
    assert many.splits == 1
    assert chosen(4096, 64).splits == 1, "nothing to split"


@pytest.mark.parametrize("reads_outputs", [False, True])
def test_choice_reads_a_few_rows_weight_along_its_stride_of_one(reads_outputs: bool) -> None:
    given = (torch.bfloat16, "ieee", True, SM_90, False, False, reads_outputs)
    chosen = choose("forward", 1, 1, 4096, 4096, *given)
    assert chosen.reads_outputs == reads_outputs


def test_splits_fill_idle_multiprocessors_and_no_more() -> None:
    config = Config(64, 128, 128, num_warps=8, num_stages=4)
    assert choose_splits(config, 1, 65536, 128, 128, SM_90) == SM_90.multiprocessors
    assert choose_splits(config, 1, 65536, 4096, 4096, SM_90) == 1
    assert choose_splits(config, 1, 128, 128, 128, SM_90) == 1, "too few rows to share"
    assert choose_splits(config, 1, 1024, 128, 128, SM_90) == 4, (
        "each split takes four steps at least"
    )


def test_pair_is_one_launch_s() -> None:
    with pytest.raises(ValueError, match=r"they are \(8, 3\) and \(4, 3\)"):
        BackwardConfig(LARGE, dataclasses.replace(LARGE, num_warps=4))


def test_pair_follows_the_rows() -> None:
    def pair(m: int, n: int, k: int) -> BackwardConfig:
        return choose_pair(1, m, n, k, torch.bfloat16, "ieee", True, SM_90)

    assert pair(8192, 8192, 8192).input.block_m >= 128
    few = pair(16, 4096, 4096)
    assert few.input.block_m == 16, "rows that are not there would be multiplied"
    assert few.weight.block_m <= 32, "and here summed"


@pytest.mark.parametrize(("m", "first"), [(16, True), (1024, True), (65536, False)])
def test_longer_programs_start_first(m: int, first: bool) -> None:
    given = (m, 4096, 4096, torch.bfloat16, "ieee")
    pair = choose_pair(1, *given, True, SM_90)
    assert starts_with_input(pair, 1, *given, SM_90) == first


def test_one_launch_unless_two_are_faster() -> None:
    def chosen(m: int, side: int) -> BackwardConfig | None:
        given = (1, m, side, side, torch.bfloat16, "ieee", True, SM_90)
        return choose_backward(*given, descriptors=True)

    assert chosen(16, 4096) == choose_pair(1, 16, 4096, 4096, torch.bfloat16, "ieee", True, SM_90)
    assert chosen(128, 4096) is not None
    assert chosen(32768, 32768) is None


@pytest.mark.parametrize("module", [configs, tiles, model, chooser, pair_model, pair_chooser])
def test_choosing_imports_no_triton_and_measures_nothing(module: ModuleType) -> None:
    imported = {name for name, value in vars(module).items() if isinstance(value, ModuleType)}
    assert imported <= {"dataclasses", "functools", "json", "math", "torch"}
