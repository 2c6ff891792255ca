"""Configurations: the predicate, the choice, the splits."""

import dataclasses
import itertools
from types import ModuleType
from typing import Any, get_args

import pytest
import torch

from fastlinear.kernels.backward import grad_weight as backward_weight
from fastlinear.kernels.backward import linear as backward
from fastlinear.kernels.configs import choose as chooser
from fastlinear.kernels.configs import choose_pair as pair_chooser
from fastlinear.kernels.configs import config as configs
from fastlinear.kernels.configs import legality, model, pair_model, tiles
from fastlinear.kernels.configs.choose import choose, choose_splits
from fastlinear.kernels.configs.choose_pair import choose_backward, choose_pair, starts_with_input
from fastlinear.kernels.configs.config import TARGETS, BackwardConfig, Config, Traits
from fastlinear.kernels.configs.legality import why_illegal
from fastlinear.kernels.configs.tiles import legal_configs, legal_pairs
from fastlinear.kernels.forward import gated
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.launching import launch

SM_90 = TARGETS["sm_90"]
ALIGNED = Traits(torch.bfloat16, "ieee", True, SM_90)
LARGE = Config(128, 256, 64, num_warps=8, num_stages=3)
BLOCKS = Config(32, 32, 32, num_warps=1, num_stages=1)


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
    assert why_illegal("forward", LARGE, ALIGNED) is None
    said = why_illegal("forward", dataclasses.replace(LARGE, **change), ALIGNED)
    assert said is not None
    assert reason in said


def test_predicate_keeps_large_tiles_for_aligned_operands() -> None:
    said = why_illegal("forward", LARGE, ALIGNED._replace(aligned=False))
    assert "addresses" in str(said)


def test_options_let_a_thread_have_every_register_on_nvidia() -> None:
    assert LARGE.compile_options(SM_90)["maxnreg"] == 255
    assert "maxnreg" not in LARGE.compile_options(TARGETS["gfx942"])


UNALIGNED = Traits(torch.float32, "ieee", False, SM_90)


@pytest.mark.parametrize(
    ("kernel", "tile", "traits", "changed"),
    [
        ("forward", (32, 64, 16, 3, 4), UNALIGNED, "wide"),
        ("forward", (64, 64, 16, 3, 8), UNALIGNED, "wide"),
        ("forward", (64, 64, 32, 4, 4), UNALIGNED._replace(precision="tf32"), "second_product"),
        ("forward", (64, 64, 16, 3, 4), UNALIGNED._replace(precision="bf16x6"), "wide"),
        ("gated_forward", (128, 128, 64, 4, 8), ALIGNED._replace(activation=True), "wide"),
    ],
    ids=["far", "far, more warps", "two products", "far pieces", "far gated pair"],
)
def test_predicate_leaves_registers(
    kernel: configs.Kernel, tile: tuple[int, ...], traits: Traits, changed: str
) -> None:
    """What the compiler was seen to spill at."""
    config = tiles.shaped(kernel, *tile)
    assert why_illegal(kernel, config, traits) is None
    short = traits._replace(**{changed: True})
    assert "registers a thread" in str(why_illegal(kernel, config, short))


def test_predicate_asks_more_of_grad_input_than_of_grad_weight() -> None:
    far = UNALIGNED._replace(wide=True)
    of_two = UNALIGNED._replace(precision="tf32", second_product=True)
    for tile, traits in (((32, 64, 16, 3, 4), far), ((64, 64, 32, 4, 4), of_two)):
        said = [
            why_illegal(kernel, tiles.shaped(kernel, *tile), traits)
            for kernel in ("forward", "backward_weight")
        ]
        assert (said[0] is None, said[1] is None) == (False, True)


FAR_ROWS = 2**20 + 16  # of 2**11 elements


@pytest.mark.parametrize(
    ("rows", "features", "aligned"), [(4096, 40, True), (FAR_ROWS, 48, True), (FAR_ROWS, 40, False)]
)
@pytest.mark.parametrize("product", ["output", "gated", "grad_weight", "gradients"])
def test_far_results_of_odd_sizes_count_as_unaligned(
    product: str, rows: int, features: int, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their addresses would take registers that 64-bit offsets have taken."""
    asked: list[Traits] = []

    def chosen(*arguments: Any, **_: Any) -> Any:
        asked.extend(one for one in arguments if isinstance(one, Traits))
        return BLOCKS if product != "gradients" else BackwardConfig(BLOCKS, BLOCKS)

    def fields(*shape: int, columns: bool = False) -> launch.Operand:
        one = launch.Operand((), (), torch.float32, torch.device("cpu"), True)
        found = one.contiguous(*(shape[::-1] if columns else shape))
        return found._replace(shape=shape, strides=found.strides[::-1]) if columns else found

    for module in (forward, gated, backward_weight):
        monkeypatch.setattr(module, "choose", chosen)
    monkeypatch.setattr(backward, "choose_backward", chosen)
    monkeypatch.setattr(launch, "target_of", lambda device: SM_90)
    far, weight = fields(rows, 2048), fields(features, 2048)
    columns, weight_columns = (fields(size, features, columns=True) for size in (rows, 2048))
    if product == "output":
        plan_forward = forward.plan_forward.__wrapped__
        plan_forward((far, weight, None), "ieee", None, False, None)
    elif product == "gated":
        plan_gated = gated.plan_gated_forward.__wrapped__
        plan_gated((far, weight, weight, None, None), "ieee", "silu", False, None)
        aligned = features == 48  # for its activation's sake
    elif product == "grad_weight":
        plan_weight = backward_weight.plan_backward_weight.__wrapped__
        plan_weight((far, columns, None), False, False, "ieee", None, None)
    else:
        plan_backward = backward.plan_backward.__wrapped__
        plan_backward((far, weight_columns, columns), None, False, False, "ieee", None, None)
    (traits,) = asked
    assert (traits.aligned, traits.wide) == (aligned, rows == FAR_ROWS)


def test_a_pair_s_grad_input_is_chosen_as_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "target_of", lambda device: SM_90)
    one = launch.Operand((), (), torch.float32, torch.device("cpu"), True)
    weight, input = one.contiguous(4001, 4001), one.contiguous(4096, 4001)
    operands = one.contiguous(4096, 2 * 4001), weight, input
    plan_backward = backward.plan_backward.__wrapped__
    config = plan_backward(operands, weight, False, False, "tf32", None, None).config
    traits = Traits(torch.float32, "tf32", False, SM_90)
    assert config == choose_pair(1, 4096, 8002, 4001, traits._replace(second_product=True))
    assert config != choose_pair(1, 4096, 8002, 4001, traits)


def test_predicate_counts_the_target_s_shared_memory() -> None:
    small = dataclasses.replace(SM_90, shared_memory=99 * 1024)  # consumer GPUs
    said = why_illegal("forward", LARGE, ALIGNED._replace(target=small))
    assert "shared memory" in str(said)


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
            for precision in ("ieee", "tf32", "bf16x6"):
                for aligned, wide in itertools.product((True, False), repeat=2):
                    traits = Traits(dtype, precision, aligned, smaller, activation, wide=wide)
                    assert legal_configs(kernel, traits), traits
                    for two in (True, False):
                        pair = traits._replace(activation=False, second_product=two)
                        assert legal_pairs(pair), pair


def test_choice_fills_the_gpu() -> None:
    def chosen(m: int, n: int, k: int) -> Config:
        return choose("forward", 1, m, n, k, ALIGNED)

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
    described = ALIGNED._replace(descriptors=True)
    assert choose("forward", 1, rows, 4096, 4096, described).kind == kind
    without_descriptors = choose("forward", 1, rows, 4096, 4096, ALIGNED).kind
    assert without_descriptors == ("tiled" if kind == "persistent" else kind)


def test_choice_splits_until_the_gpu_is_full() -> None:
    def chosen(n: int, k: int) -> Config:
        return choose("forward", 1, 16, n, k, ALIGNED)

    few, many = chosen(1024, 8192), chosen(64 * 4 * SM_90.multiprocessors, 8192)
    assert few.splits * 1024 // few.block_n >= SM_90.multiprocessors // 2
    assert many.splits == 1
    assert chosen(4096, 64).splits == 1, "nothing to split"


@pytest.mark.parametrize("reads_outputs", [False, True])
def test_choice_reads_a_few_rows_weight_along_its_stride_of_one(reads_outputs: bool) -> None:
    chosen = choose("forward", 1, 1, 4096, 4096, ALIGNED, reads_outputs)
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
        return choose_pair(1, m, n, k, ALIGNED)

    assert pair(8192, 8192, 8192).input.block_m >= 128
    few = pair(16, 4096, 4096)
    assert few.input.block_m == 16, "rows that are not there would be multiplied"
    assert few.weight.block_m <= 32, "and here summed"


@pytest.mark.parametrize(("m", "first"), [(16, True), (1024, True), (65536, False)])
def test_longer_programs_start_first(m: int, first: bool) -> None:
    pair = choose_pair(1, m, 4096, 4096, ALIGNED)
    assert starts_with_input(pair, 1, m, 4096, 4096, ALIGNED) == first


def test_one_launch_unless_two_are_faster() -> None:
    def chosen(m: int, side: int) -> BackwardConfig | None:
        return choose_backward(1, m, side, side, ALIGNED._replace(descriptors=True))

    assert chosen(16, 4096) == choose_pair(1, 16, 4096, 4096, ALIGNED)
    assert chosen(128, 4096) is not None
    assert chosen(32768, 32768) is None


@pytest.mark.parametrize(
    "module", [configs, legality, tiles, model, chooser, pair_model, pair_chooser]
)
def test_choosing_imports_no_triton_and_measures_nothing(module: ModuleType) -> None:
    imported = {name for name, value in vars(module).items() if isinstance(value, ModuleType)}
    assert imported <= {"dataclasses", "functools", "json", "math", "torch"}
