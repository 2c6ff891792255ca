"""The backward kernels against float64.

Each gradient, split sums, shapes, dtypes, strides, configurations.
"""

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
    sum_scale,
)
from torch import Tensor

from fastlinear.kernels import launch
from fastlinear.kernels.backward import linear_backward_input, linear_backward_weight
from fastlinear.kernels.configs import Config
from fastlinear.kernels.tiles import legal_configs


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

    exact = exact_backward(grad_output, input, weight)
    native = native_backward(grad_output, input, weight)
    for name, *results in zip(
        ("grad_input", "grad_weight", "grad_bias"),
        (grad_input, grad_weight, grad_bias),
        native,
        exact,
        strict=True,
    ):
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
    if not launch.INTERPRETING and config not in legal_configs(
        "backward_weight", getattr(torch, dtype), precision, False, launch.target_of(device)
    ):
        pytest.skip("not a configuration of this GPU")
    m, n, k = 2 * config.block_m + 3, config.block_n + 5, config.block_k + 9
    operands = (normal(shape, getattr(torch, dtype), device) for shape in ((m, n), (m, k), (n, k)))
    check(*operands, config=config, precision=precision)
