"""The backward kernels against float64.

Each gradient, split sums, shapes, dtypes, strides, configurations. grad_weight also in ../
test_float32.py (pieces) and test_numbers.py (what is read), and in api/test_main_grad.py.
"""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from oracle import (
    DTYPES,
    SHAPES,
    assert_as_exact,
    exact_backward,
    fenced,
    native_backward,
    normal,
    shipped_configs,
    shipped_pairs,
    sum_scale,
)
from torch import Tensor

from fastlinear.kernels.backward.grad_weight import linear_backward_weight
from fastlinear.kernels.backward.linear import linear_backward, linear_backward_input
from fastlinear.kernels.configs.config import BackwardConfig, Config, Traits
from fastlinear.kernels.configs.tiles import legal_configs, legal_pairs
from fastlinear.kernels.launching import launch, shared_sums


def check(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    config: Config | None = None,
    splits: int | None = None,
    precision: str = "ieee",
) -> None:
    """Compares grad_input (under its own configuration), grad_weight and grad_bias."""
    batched = weight.dim() == 3
    grad_input = linear_backward_input(grad_output, weight, precision=precision)
    grad_weight, grad_bias = linear_backward_weight(
        grad_output, input, True, batched=batched, precision=precision, config=config, splits=splits
    )
    assert grad_bias is not None
    without_bias, no_bias = linear_backward_weight(
        grad_output,
        input,
        False,
        batched=batched,
        precision=precision,
        config=config,
        splits=splits,
    )
    assert no_bias is None
    torch.testing.assert_close(without_bias, grad_weight, rtol=0, atol=0)

    assert_gradients((grad_input, grad_weight, grad_bias), grad_output, input, weight)


def assert_gradients(
    gradients: tuple[Tensor | None, ...], grad_output: Tensor, input: Tensor, weight: Tensor
) -> None:
    exact = exact_backward(grad_output, input, weight)
    native = native_backward(grad_output, input, weight)
    names = ("grad_input", "grad_weight", "grad_bias")
    for name, *results in zip(names, gradients, native, exact, strict=True):
        assert results[0].is_contiguous()
        scale = 0.0
        if name == "grad_bias":
            scale = sum_scale(grad_output.flatten(0, -2), grad_output.dtype, 0)
        assert_as_exact(*results, what=name, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backward_matches_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    m, n, k = shape
    check(*(normal(size, dtype, device) for size in ((m, n), (m, k), (n, k))))


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_splits(splits: int, dtype: torch.dtype, device: torch.device) -> None:
    # 200 rows in 32s make 7 blocks: 3 splits are unequal, 7 hold a block each.
    check(
        *(normal(size, dtype, device) for size in ((200, 33), (200, 40), (33, 40))), splits=splits
    )


def test_backward_split_sums_repeat_bit_for_bit(device: torch.device) -> None:
    grad_output, input = (
        normal((700, 20), torch.float32, device),
        normal((700, 20), torch.float32, device),
    )
    first = linear_backward_weight(grad_output, input, True, splits=5)
    for _ in range(3):
        for again, before in zip(
            linear_backward_weight(grad_output, input, True, splits=5), first, strict=True
        ):
            assert torch.equal(again, before)


STRIDED = {  # (grad_output, input), both of 60 rows, 20 and 30 features
    "one number for all, as sum() gives": lambda d: (
        torch.ones((), device=d).expand(60, 20),
        normal((60, 30), torch.float32, d),
    ),
    "one row for all, as mean(0) gives": lambda d: (
        normal((20,), torch.float32, d).expand(60, 20),
        normal((60, 30), torch.float32, d),
    ),
    "both transposed": lambda d: (
        normal((20, 60), torch.float32, d).t(),
        normal((30, 60), torch.float32, d).t(),
    ),
    "slices": lambda d: (
        normal((70, 50), torch.float32, d)[4:64, 7:27],
        normal((120, 60), torch.float32, d)[::2, ::2],
    ),
    "rows nested differently": lambda d: (
        normal((5, 4, 3, 20), torch.float32, d).transpose(0, 1).reshape(4, 5, 3, 20),
        normal((4, 3, 5, 30), torch.float32, d).transpose(1, 2),
    ),
    "expanded input": lambda d: (
        normal((3, 20, 20), torch.float32, d),
        normal((20, 30), torch.float32, d).expand(3, 20, 30),
    ),
    "permuted, copied": lambda d: (
        normal((3, 4, 5, 20), torch.float32, d).permute(2, 1, 0, 3),
        normal((5, 4, 3, 30), torch.float32, d),
    ),
    "images, channels last": lambda d: (
        normal((3, 20, 4, 5), torch.float32, d).permute(0, 2, 3, 1),
        normal((3, 30, 4, 5), torch.float32, d).permute(0, 2, 3, 1),
    ),
}


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("splits", [1, 2])
def test_backward_takes_strided_operands(layout, splits: int, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    grad_output, input = map(fenced, layout(device))
    check(grad_output, input, normal((20, 30), torch.float32, device), splits=splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_backward_batch_of_layers(splits: int, dtype: torch.dtype, device: torch.device) -> None:
    shapes = ((3, 70, 41), (3, 70, 20), (3, 41, 20))
    check(*(normal(shape, dtype, device) for shape in shapes), splits=splits)


def test_backward_batch_of_stride_zero(device: torch.device) -> None:
    grad_output = normal((37, 41), torch.float32, device).expand(3, 37, 41)
    input = normal((37, 20), torch.float32, device).expand(3, 37, 20)
    check(grad_output, input, normal((3, 41, 20), torch.float32, device))


@pytest.mark.parametrize(
    ("dtype", "precision", "config"), shipped_configs("backward_weight"), ids=str
)
def test_backward_weight_configuration(
    dtype: str, precision: str, config: Config, device: torch.device
) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    traits = Traits(getattr(torch, dtype), precision, False, launch.target_of(device))
    if not launch.INTERPRETING and config not in legal_configs("backward_weight", traits):
        pytest.skip("not a configuration of this GPU")
    m, n, k = 2 * config.block_m + 3, config.block_n + 5, config.block_k + 9
    operands = (normal(shape, getattr(torch, dtype), device) for shape in ((m, n), (m, k), (n, k)))
    check(*operands, config=config, precision=precision)


# All gradients in one launch.

# Tiles of both products and steps of both sums, none as large as another.
UNEQUAL = BackwardConfig(
    Config(16, 64, 32, num_warps=1, num_stages=1), Config(64, 32, 16, num_warps=1, num_stages=1)
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    run = launch.run

    def spy(kernel, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:  # type: ignore[no-untyped-def]
        names.append(kernel.__name__)
        run(kernel, plan, pointers)

    monkeypatch.setattr(launch, "run", spy)
    return names


@pytest.fixture
def counters() -> Iterator[None]:
    """Counters are zero when a launch is over, as the next one needs them."""
    yield
    assert all(not counters.any() for counters in shared_sums._counters.values())


def check_together(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    config: BackwardConfig | None = None,
    splits: int | None = None,
    precision: str = "ieee",
) -> None:
    gradients = linear_backward(
        grad_output,
        input,
        weight,
        True,
        batched=weight.dim() == 3,
        precision=precision,
        config=config,
        splits=splits,
    )
    assert_gradients(gradients, grad_output, input, weight)


def pair_for(device: torch.device) -> BackwardConfig | None:
    """UNEQUAL, where any blocks will do; a GPU chooses, and its pairs are checked below."""
    return UNEQUAL if launch.INTERPRETING else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("counters")
def test_together_matches_float64_in_one_launch(
    shape: tuple[int, int, int], dtype: torch.dtype, launched: list[str], device: torch.device
) -> None:
    m, n, k = shape
    operands = (normal(size, dtype, device) for size in ((m, n), (m, k), (n, k)))
    check_together(*operands, config=pair_for(device))
    assert launched == ["linear_backward_kernel"] * (max(m * k, n) > 0)


@pytest.mark.parametrize("splits", [2, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("counters")
def test_together_splits(splits: int, dtype: torch.dtype, device: torch.device) -> None:
    shapes = ((100, 70), (100, 40), (70, 40))
    operands = (normal(size, dtype, device) for size in shapes)
    check_together(*operands, config=pair_for(device), splits=splits)


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
def test_together_takes_strided_operands(layout, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    grad_output, input = map(fenced, layout(device))
    weight = fenced(normal((60, 40), torch.float32, device)[::2, ::2].t())
    check_together(grad_output, input, weight, pair_for(device), splits=2)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.usefixtures("counters")
def test_together_batch_of_layers(splits: int, device: torch.device) -> None:
    shapes = ((3, 70, 66), (3, 70, 20), (3, 66, 20))
    operands = (normal(shape, torch.float32, device) for shape in shapes)
    check_together(*operands, config=pair_for(device), splits=splits)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(("splits", "needed"), [*itertools.product([1, 3], ["11", "01", "10"])])
@pytest.mark.usefixtures("counters")
def test_together_two_layers_side_by_side(
    splits: int, needed: str, precision: str, launched: list[str], device: torch.device
) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    m, n, k = 130, 35, 50
    grad_output, input, weights = (
        normal(shape, torch.float32, device) for shape in ((m, 2 * n), (m, k), (2 * n, k))
    )
    gradients = linear_backward(
        grad_output,
        input if needed[0] == "1" else None,
        weights[:n] if needed[1] == "1" else None,
        True,
        second_weight=weights[n:] if needed[1] == "1" else None,
        precision=precision,
        splits=splits,
    )
    exact = exact_backward(grad_output, input, weights)
    native = native_backward(grad_output, input, weights)
    assert [one is not None for one in gradients] == [
        wanted == "1" for wanted in needed[::-1] + needed[0]
    ]
    for result, *reference in zip(gradients, native, exact, strict=True):
        if result is not None:
            assert_as_exact(result, *reference, scale=sum_scale(grad_output, torch.float32, 0))
    assert len(launched) == 1


@pytest.mark.skipif(not launch.INTERPRETING, reason="a GPU has an order of its own")
@pytest.mark.usefixtures("counters")
def test_together_gives_the_same_bits_whichever_program_comes_last(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    from triton.runtime.interpreter import interpreter_builder

    shapes = ((90, 70), (90, 40), (70, 40))
    one = [normal(shape, torch.float32, device) for shape in shapes]
    two = [normal((2, *shape), torch.float32, device) for shape in shapes]
    order: list[int] = []

    def at(x: int, y: int, z: int) -> None:
        if x == 0:
            programs = interpreter_builder.grid_dim[0]
            order[:] = random.sample(range(programs), programs)
        place(order[x], y, z)

    place = interpreter_builder.set_grid_idx
    for batched, given in ((False, one), (True, two)):
        options = {"batched": batched, "config": UNEQUAL, "splits": 3}
        first = linear_backward(*given, True, **options)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter_builder, "set_grid_idx", at)
            for _ in range(2):
                again = linear_backward(*given, True, **options)
                assert all(map(torch.equal, again, first))


def test_together_takes_two_launches_where_they_are_faster(
    launched: list[str], device: torch.device
) -> None:
    if not launch.INTERPRETING:
        pytest.skip("what is faster there takes more than a test should multiply")
    sides = (2000, 64), (2000, 64), (64, 64)
    check_together(*(normal(shape, torch.float16, device) for shape in sides))
    assert launched == ["linear_backward_weight_kernel", "persistent_forward_kernel"], (
        "many rows go by descriptors, in a kernel that has no pair"
    )


@pytest.mark.parametrize(("dtype", "precision", "pair"), shipped_pairs(), ids=str)
@pytest.mark.usefixtures("counters")
def test_together_configuration(
    dtype: str, precision: str, pair: BackwardConfig, device: torch.device
) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    traits = Traits(getattr(torch, dtype), precision, False, launch.target_of(device))
    if not launch.INTERPRETING and pair not in legal_pairs(traits):
        pytest.skip("not a pair of this GPU")
    m = max(2 * pair.weight.block_m, pair.input.block_m) + 3
    n, k = pair.weight.block_n + 5, max(pair.weight.block_k, pair.input.block_n) + 9
    operands = (normal(shape, getattr(torch, dtype), device) for shape in ((m, n), (m, k), (n, k)))
    check_together(*operands, config=pair, splits=2, precision=precision)
