"""The forward kernel against float64: values, shapes, dtypes, strides, configurations."""

import pytest
import torch
from oracle import (
    DTYPES,
    SHAPES,
    assert_as_exact,
    exact_forward,
    fenced,
    native_forward,
    normal,
    shipped_configs,
    smallest_config,
)
from torch import Tensor

from fastlinear.kernels.configs.config import Config, Kind, Traits
from fastlinear.kernels.configs.tiles import legal_configs
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.forward.linear import linear_forward, plan_forward
from fastlinear.kernels.launching import launch


@pytest.fixture(params=forward.KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every kind of kernel, whatever the chooser would take for the shape."""
    return request.param


def check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: Kind = "tiled",
    config: Config | None = None,
    precision: str = "ieee",
) -> None:
    config = config or smallest_config(kind, input, weight, precision)
    output = linear_forward(input, weight, bias, config=config, precision=precision)
    assert output.is_contiguous()
    assert_as_exact(
        output, native_forward(input, weight, bias), exact_forward(input, weight, bias), "output"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_matches_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: Kind, device: torch.device
) -> None:
    m, n, k = shape
    if kind == "gemv":
        m = min(m, 70)  # hundreds of rows, four a program, take seconds to interpret
    check(*(normal(size, dtype, device) for size in ((m, k), (n, k), (n,))), kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_without_bias(dtype: torch.dtype, kind: Kind, device: torch.device) -> None:
    check(normal((40, 48), dtype, device), normal((35, 48), dtype, device), None, kind)


def test_forward_adds_bias_before_rounding(kind: Kind, device: torch.device) -> None:
    # 1 + 2**-9 rounds to 1 in bfloat16: were the product rounded first,
    # the bias of -1 would leave 0.
    input = torch.tensor([[1 + 2**-7, 2**-9]], dtype=torch.bfloat16, device=device)
    weight = torch.tensor([[1, 1]], dtype=torch.bfloat16, device=device)
    bias = torch.tensor([-1 - 2**-7], dtype=torch.bfloat16, device=device)
    config = smallest_config(kind, input, weight, "ieee")
    assert linear_forward(input, weight, bias, config=config).item() == 2**-9


STRIDED_INPUTS = {
    "columns": lambda d: normal((40, 50), torch.float32, d).t(),
    "every other column": lambda d: normal((50, 80), torch.float32, d)[:, ::2],
    "every other row": lambda d: normal((100, 40), torch.float32, d)[::2],
    "an inner slice": lambda d: normal((60, 90), torch.float32, d)[5:55, 20:60],
    "one row for all": lambda d: normal((1, 40), torch.float32, d).expand(50, 40),
    "one feature for all": lambda d: normal((50, 1), torch.float32, d).expand(50, 40),
    "one number for all": lambda d: normal((1, 1), torch.float32, d).expand(50, 40),
    "one datapoint": lambda d: normal((40,), torch.float32, d),
    "leading dimensions": lambda d: normal((2, 5, 5, 40), torch.float32, d),
    "sequence first": lambda d: normal((5, 10, 40), torch.float32, d).transpose(0, 1),
    "image, channels last": lambda d: normal((3, 40, 4, 4), torch.float32, d).permute(0, 2, 3, 1),
    "three strides, copied": lambda d: normal((3, 4, 5, 40), torch.float32, d).permute(2, 1, 0, 3),
    "leading dimensions of one": lambda d: normal((1, 7, 1, 40), torch.float32, d),
    "expanded leading dimension": lambda d: normal((7, 40), torch.float32, d).expand(3, 7, 40),
}


@pytest.mark.parametrize("layout", STRIDED_INPUTS.values(), ids=STRIDED_INPUTS)
def test_forward_takes_strided_input(layout, kind: Kind, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    check(
        fenced(layout(device)),
        normal((35, 40), torch.float32, device),
        normal((35,), torch.float32, device),
        kind,
    )


STRIDED_WEIGHTS = {
    "transposed": lambda d: normal((40, 35), torch.float32, d).t(),
    "every third row": lambda d: normal((105, 40), torch.float32, d)[::3],
    "every other column": lambda d: normal((35, 80), torch.float32, d)[:, ::2],
    "one row for all": lambda d: normal((1, 40), torch.float32, d).expand(35, 40),
}


@pytest.mark.parametrize("layout", STRIDED_WEIGHTS.values(), ids=STRIDED_WEIGHTS)
def test_forward_takes_strided_weight_and_bias(layout, kind: Kind, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    bias = normal((70,), torch.float32, device)[::2]
    check(normal((50, 40), torch.float32, device), fenced(layout(device)), bias, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_batch_of_layers(dtype: torch.dtype, kind: Kind, device: torch.device) -> None:
    check(
        normal((3, 37, 20), dtype, device),
        normal((3, 41, 20), dtype, device),
        normal((3, 41), dtype, device),
        kind,
    )


@pytest.mark.parametrize("shared", ["input", "weight", "bias"])
def test_forward_batch_of_stride_zero(shared: str, kind: Kind, device: torch.device) -> None:
    operands = {"input": (3, 37, 20), "weight": (3, 41, 20), "bias": (3, 41)}
    tensors = {name: normal(shape, torch.float32, device) for name, shape in operands.items()}
    tensors[shared] = normal(operands[shared][1:], torch.float32, device).expand(operands[shared])
    check(**tensors, kind=kind)


def test_forward_tf32_rounds_operands_to_nearest(device: torch.device) -> None:
    input, weight = normal((40, 64), torch.float32, device), normal((30, 64), torch.float32, device)
    output = linear_forward(input, weight, precision="tf32")

    def rounded(tensor: Tensor) -> Tensor:  # to 10 bits of mantissa
        mantissa, exponent = torch.frexp(tensor.double())
        # Ties away from zero, as the GPU's own conversion; torch.round takes them to even.
        return (mantissa.abs() * 2**11 + 0.5).floor() / 2**11 * mantissa.sign() * 2.0**exponent

    exact = rounded(input) @ rounded(weight).T
    # 64 additions, each of which the tensor cores may truncate.
    budget = 64 * 2.0**-23 * (input.double().abs() @ weight.double().abs().T)
    assert ((output - exact).abs() <= budget).all()
    unrounded = exact_forward(input, weight, None)
    assert ((output - unrounded).abs() > budget).any(), "these inputs do not tell TF32 from float32"


# Infinity times the zeros that pad a tile is a NaN in columns that are not stored;
# numpy warns of it.
@pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_forward_passes_nan_and_infinity_on(
    value: float, precision: str, kind: Kind, device: torch.device
) -> None:
    input = normal((40, 64), torch.float32, device)
    input[3, 5] = value
    weight = normal((30, 64), torch.float32, device).abs()
    config = smallest_config(kind, input, weight, precision)
    output = linear_forward(input, weight, precision=precision, config=config)
    expected = torch.full((30,), value, device=device)
    torch.testing.assert_close(output[3], expected, equal_nan=True)
    assert output[:3].isfinite().all()
    assert output[4:].isfinite().all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1], ids=["CUDA's own", "negative"])
def test_forward_passes_a_nan_of_full_mantissa_on_in_tf32(bits: int, device: torch.device) -> None:
    input = normal((4, 16), torch.float32, device)
    input.view(torch.int32)[1, 2] = bits
    assert linear_forward(input, input, precision="tf32")[1].isnan().all()


@pytest.mark.parametrize(("dtype", "precision", "config"), shipped_configs("forward"), ids=str)
def test_forward_configuration(
    dtype: str, precision: str, config: Config, device: torch.device
) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    traits = Traits(getattr(torch, dtype), precision, False, launch.target_of(device))
    if not launch.INTERPRETING and config not in legal_configs("forward", traits):
        pytest.skip("not a configuration of this GPU")
    m, n, k = config.block_m + 9, config.block_n + 5, 2 * config.block_k + 3
    operands = (normal(shape, getattr(torch, dtype), device) for shape in ((m, k), (n, k), (n,)))
    check(*operands, config=config, precision=precision)


def test_forward_offsets_past_32_bits(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip(
            "takes 4 GiB of memory to hold such a tensor; the flag itself is tested in test_launch"
        )
    rows = 2**31 // 1024 + 200
    storage = torch.empty(rows, 1024, dtype=torch.float16, device=device)
    input, weight = storage[:, :16], normal((40, 16), torch.float16, device)
    input.normal_()
    output = linear_forward(input, weight)[-100:]
    assert_as_exact(
        output,
        native_forward(input[-100:], weight, None),
        exact_forward(input[-100:], weight, None),
    )


FAR = 2**31  # as the stride of the last of two rows

FAR_OPERANDS = {
    "none": ((5, 1), (5, 1), (1,), False),
    "input": ((FAR, 1), (5, 1), (1,), True),
    "weight": ((5, 1), (FAR, 1), (1,), True),
    "bias": ((5, 1), (5, 1), (FAR,), True),
}


@pytest.mark.parametrize(
    ("stride_input", "stride_weight", "stride_bias", "expected"),
    FAR_OPERANDS.values(),
    ids=FAR_OPERANDS,
)
def test_forward_chooses_offsets_by_every_operand(
    stride_input: tuple[int, ...],
    stride_weight: tuple[int, ...],
    stride_bias: tuple[int, ...],
    expected: bool,
    device: torch.device,
) -> None:
    def fields(shape: tuple[int, ...], strides: tuple[int, ...]) -> launch.Operand:
        return launch.Operand(shape, strides, torch.float32, device, True)

    plan = plan_forward(
        (
            fields((2, 5), stride_input),
            fields((2, 5), stride_weight),
            fields((2,), stride_bias),
        ),
        "ieee",
        None,
        False,
        None,
    )
    assert plan.launch.launch.constants["OPTIONS"].wide is expected


def test_forward_chooses_offsets_by_the_output(device: torch.device) -> None:
    def fields(*shape: int) -> launch.Operand:
        return launch.Operand(shape, (0,) * len(shape), torch.float32, device, True)

    plan = plan_forward((fields(2**16, 1), fields(2**16, 1), None), "ieee", None, False, None)
    assert plan.launch.launch.constants["OPTIONS"].wide
