"""Gated pairs of layers: values, gradients, what is kept and launched."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gated import Function, many, operands, reference
from oracle import (
    DTYPES,
    assert_as_exact,
    exact_backward,
    fenced,
    matmul,
    normal,
    shipped_configs,
    total,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import fastlinear
from fastlinear.kernels.backward.elementwise import plan_elementwise_backward
from fastlinear.kernels.configs.config import Config
from fastlinear.kernels.forward.gated import gated_linear_forward, plan_gated_forward
from fastlinear.kernels.launching import launch
from fastlinear.ops.elementwise import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("triton_backend")

SHAPES = {  # M, N, K
    "one of each": (1, 1, 1),
    "several blocks, none whole": (70, 50, 45),
    "split sums": (300, 10, 20),
    "no rows": (0, 5, 7),
    "no output features": (5, 0, 7),
    "no input features": (5, 7, 0),
}


def gradients(function: Function, inputs: list[Tensor], grad_output: Tensor) -> Any:
    return torch.autograd.grad(function(*inputs), inputs, grad_output)


# Values and gradients.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gated_values_and_gradients_are_as_exact_as_pytorch_s(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    ours = operands(device, shape, dtype)
    theirs = [one.detach().clone().requires_grad_() for one in ours]
    grad_output = normal(shape[:2], dtype, device)
    output, native = fastlinear.gated_linear(*ours), reference(*theirs)
    input, gate_weight, up_weight, gate_bias, up_bias = (one.detach().double() for one in ours)
    gate = matmul(input, gate_weight.mT) + gate_bias
    up = matmul(input, up_weight.mT) + up_bias
    several = 16.0 if dtype == torch.float64 else 4.0  # roundings: float64's truth is no better
    truth = F.silu(gate) * up
    # How large gate and up get on the way, where their sums cancel: what is rounded is that.
    gate_size = matmul(input.abs(), gate_weight.abs().mT) + gate_bias.abs()
    up_size = matmul(input.abs(), up_weight.abs().mT) + up_bias.abs()
    size = (gate_size * up_size).max().item() if truth.numel() else 0.0
    assert_as_exact(output, native, truth, "output", scale=several * size)
    assert output.is_contiguous()

    sigmoid = torch.sigmoid(gate)
    grad_gate = grad_output.double() * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad_output.double() * gate * sigmoid
    of_gate = exact_backward(grad_gate, input, gate_weight)
    of_up = exact_backward(grad_up, input, up_weight)
    truths = (of_gate[0] + of_up[0], of_gate[1], of_up[1], of_gate[2], of_up[2])
    # The same of every term of each sum; silu's slope is at most 1.1, and its slope's 0.5.
    grad_size = grad_output.double().abs()
    grad_gate_size, grad_up_size = grad_size * up_size * (1 + gate_size), grad_size * gate_size
    sizes = (
        matmul(grad_gate_size, gate_weight.abs()) + matmul(grad_up_size, up_weight.abs()),
        matmul(grad_gate_size.mT, input.abs()),
        matmul(grad_up_size.mT, input.abs()),
        total(grad_gate_size, 0),
        total(grad_up_size, 0),
    )
    names = ("grad_input", "grad_gate_weight", "grad_up_weight", "grad_gate_bias", "grad_up_bias")
    for name, result, native_gradient, truth, size in zip(
        names,
        torch.autograd.grad(output, ours, grad_output),
        torch.autograd.grad(native, theirs, grad_output),
        truths,
        sizes,
        strict=True,
    ):
        # In 16 bits the terms are rounded, not their additions, and they may cancel.
        terms = max(shape[1] if name == "grad_input" else shape[0], 1)
        roundings = several if dtype.itemsize > 2 else terms**-0.5
        scale = size.max().item() if size.numel() else 0.0
        assert_as_exact(result, native_gradient, truth, name, scale=roundings * scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(activation: str, device: torch.device) -> None:
    inputs = operands(device)
    grad_output = normal((4, 3), torch.float64, device)
    ours = gradients(lambda *a: fastlinear.gated_linear(*a, activation), inputs, grad_output)
    theirs = gradients(lambda *a: reference(*a, activation), inputs, grad_output)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        fastlinear.gated_linear(*inputs, activation), reference(*inputs, activation)
    )


@pytest.mark.parametrize(
    ("dtype", "precision", "config"), shipped_configs("gated_forward"), ids=str
)
def test_gated_configuration(
    dtype: str, precision: str, config: Config, device: torch.device
) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    shape = (config.block_m + 1, config.block_n + 1, config.block_k + 1)
    inputs = operands(device, shape, getattr(torch, dtype), "00000")
    output, gate, up = gated_linear_forward(
        *inputs, "silu", True, precision=precision, config=config
    )
    assert gate is not None
    assert up is not None
    input, gate_weight, up_weight, gate_bias, up_bias = inputs
    exact_gate = matmul(input, gate_weight.mT) + gate_bias.double()
    exact_up = matmul(input, up_weight.mT) + up_bias.double()
    assert_as_exact(gate, F.linear(input, gate_weight, gate_bias), exact_gate, "gate")
    assert_as_exact(up, F.linear(input, up_weight, up_bias), exact_up, "up")
    truth = F.silu(exact_gate) * exact_up
    two_factors = 2.0 * truth.abs().max().item()  # a rounding each
    assert_as_exact(output, reference(*inputs), truth, "output", scale=two_factors)


EDGES = [0.0, -0.0, 1e-8, -1e-8, 1.0, -1.0, 88.0, -88.0, 1e4, -1e4]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gated_extreme_gates_neither_overflow_nor_become_nan(
    activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    input = torch.tensor(EDGES, dtype=dtype, device=device).unsqueeze(1).requires_grad_()
    one, zero = torch.ones(1, 1, dtype=dtype, device=device), torch.zeros(1, 1, device=device)
    half = torch.full((1,), 0.5, dtype=dtype, device=device)
    output = fastlinear.gated_linear(input, one, zero.to(dtype), None, half, activation)
    truth = 0.5 * ACTIVATIONS[activation](input.detach().double())
    close = {"rtol": 2e-3, "atol": 1e-3, "check_dtype": False}
    torch.testing.assert_close(output, truth, **close)
    output.sum().backward()
    assert input.grad is not None
    assert input.grad.isfinite().all()


STRIDES: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "transposed": lambda: (many(5, 4).t(), many(5, 3).t(), many(5, 3).t(), many(3), many(3)),
    "weights that lie differently": lambda: (many(4, 5), many(5, 3).t(), many(3, 5)),
    "halves of one weight": lambda: (many(4, 5), *many(6, 5).chunk(2), *many(6).chunk(2)),
    "every other element": lambda: (
        many(8, 10)[::2, ::2],
        many(6, 10)[::2, ::2],
        many(6, 10)[::2, ::2],
        many(6)[::2],
        many(1).expand(3),
    ),
    "rows on two strides": lambda: (many(3, 2, 4, 5).transpose(0, 1), many(3, 5), many(3, 5)),
    "rows on three strides": lambda: (
        many(2, 1, 2, 3, 5).permute(3, 0, 1, 2, 4)[::2],
        many(3, 5),
        many(3, 5),
    ),
    "one row": lambda: (many(5), many(3, 5), many(3, 5), many(3), many(3)),
    "one bias alone": lambda: (many(4, 5), many(3, 5), many(3, 5), many(3)),
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
def test_gated_operands_of_every_stride(
    make: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> None:
    inputs = [fenced(operand.to(device)).requires_grad_() for operand in make()]
    output = reference(*inputs)
    torch.testing.assert_close(fastlinear.gated_linear(*inputs), output)
    grad_output = torch.randn_like(output)
    ours = gradients(fastlinear.gated_linear, inputs, grad_output)
    torch.testing.assert_close(ours, gradients(reference, inputs, grad_output))


REDUCTIONS: dict[str, Function] = {
    "sum: stride 0": lambda y: y.sum(),
    "mean over rows": lambda y: y.mean(0).pow(2).sum(),
    "every other column": lambda y: y[..., ::2].pow(2).sum(),
    "three strides": lambda y: y.view(10, 1, 2, 1, 6).permute(2, 1, 0, 3, 4).pow(2).sum(),
}


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_gated_gradients_of_every_stride(reduce: Function, device: torch.device) -> None:
    inputs = [many(10, 2, 5), many(6, 5), many(6, 5)]
    inputs = [one.to(device).requires_grad_() for one in inputs]
    ours = torch.autograd.grad(reduce(fastlinear.gated_linear(*inputs)), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(reduce(reference(*inputs)), inputs))


MASKS = ["".join(mask) for mask in itertools.product("01", repeat=5)]


@pytest.mark.parametrize("mask", MASKS)
def test_gated_mask_of_requires_grad_saves_no_more_than_pytorch(
    mask: str, device: torch.device
) -> None:
    def step(function: Function, inputs: list[Tensor]) -> int:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = function(*inputs)
        assert output.requires_grad == ("1" in mask)
        if output.requires_grad:
            output.sum().backward()
        # What is saved twice is kept once.
        return sum({one.data_ptr(): one.nbytes for one in saved}.values())

    ours = operands(device, dtype=torch.float32, mask=mask)
    theirs = [one.detach().clone().requires_grad_(one.requires_grad) for one in ours]
    bytes_saved = step(fastlinear.gated_linear, ours), step(reference, theirs)
    if mask[0] == "1" or (set(mask[1:]) & {"1"} and mask[1::2] != "00" != mask[2::2]):
        assert bytes_saved[0] < bytes_saved[1]  # by activation(gate)
    for one, native in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, native.grad)


def test_gated_without_gradients_saves_nothing(device: torch.device) -> None:
    inputs = operands(device)
    with torch.no_grad():
        assert fastlinear.gated_linear(*inputs).grad_fn is None
    with torch.inference_mode():
        output = fastlinear.gated_linear(*inputs)
        assert output.is_inference()
    torch.testing.assert_close(output.clone(), reference(*inputs).detach())


# What is launched.


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    run_kernel = launch.run

    def run(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        run_kernel(kernel, *arguments)

    monkeypatch.setattr(launch, "run", run)
    return names


LAUNCHES = {
    "all, sums in parts": ("111", (300, 10, 20), "linear_backward_kernel"),
    "all": ("111", (4, 3, 5), "linear_backward_kernel"),
    "all, in many waves": ("111", (600, 40, 200), "linear_backward_kernel"),
    "weights alone": ("011", (4, 3, 5), "linear_backward_weight_kernel"),
    "weights, sums in parts": ("011", (300, 10, 20), "linear_backward_weight_kernel"),
    "input alone": ("100", (4, 3, 5), "linear_backward_kernel"),
    "input alone, sums in parts": ("100", (300, 10, 20), "linear_backward_kernel"),
}


@pytest.mark.parametrize(("mask", "shape", "backward"), LAUNCHES.values(), ids=LAUNCHES)
def test_gated_takes_one_launch_and_two(
    mask: str,
    shape: tuple[int, int, int],
    backward: str,
    launched: list[str],
    device: torch.device,
) -> None:
    inputs = operands(device, shape, torch.float32, f"{mask}00")
    output = fastlinear.gated_linear(*inputs)
    assert launched == ["gated_linear_forward_kernel"]
    output.sum().backward()
    assert launched[1:] == ["elementwise_backward_kernel", backward]


FAR = 2**31  # the stride of an operand of two rows or features, whose second is that far off


@pytest.mark.parametrize("far", range(5), ids=["input", "gate", "up", "gate_bias", "up_bias"])
def test_gated_offsets_are_64_bits_wide_where_an_operand_is_far(
    far: int, device: torch.device
) -> None:
    shapes = ((2, 3), (2, 3), (2, 3), (2,), (2,))
    near = [(shape, (3, 1)[-len(shape) :], torch.float32, device, True) for shape in shapes]
    operands = [
        (*one[:1], (FAR, 1)[: len(one[0])], *one[2:]) if index == far else one
        for index, one in enumerate(near)
    ]
    for given, wide in ((near, False), (operands, True)):
        plan = plan_gated_forward(tuple(given), "ieee", "silu", True, None)
        assert plan.kernel.constants["OPTIONS"].wide is wide


def test_gated_gradients_take_64_bits_for_both_side_by_side(device: torch.device) -> None:
    shape = (2**19, 2**11)  # 2**30 elements, and twice as many for both gradients
    one = (shape, (2**11, 1), torch.float32, device, True)
    plan, products, _ = plan_elementwise_backward((one, one, one), "silu")
    assert products.shape == (2**19, 2**12)
    assert not plan.constants["OPTIONS"].wide
    one = ((2**19 + 1, 2**11), *one[1:])
    plan, *_ = plan_elementwise_backward((one, one, one), "silu")
    assert plan.constants["OPTIONS"].wide
