"""`fastlinear.batched_linear`: B independent layers in one call, and their gradients.

The reference is `torch.baddbmm`, or `torch.bmm` without a bias."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from batched import Function, assert_alike, operands, reference, through_the_kernels, with_gradients
from oracle import (
    DTYPES,
    FORWARD_KERNELS,
    assert_as_exact,
    exact_backward,
    exact_forward,
    fenced,
    native_backward,
    native_forward,
    normal,
    sum_scale,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import fastlinear

pytestmark = pytest.mark.usefixtures("backend")


# (B, M, N, K), with the reason for each.
SHAPES = {
    "one of each": (1, 1, 1, 1),
    "one layer": (1, 33, 31, 32),
    "several blocks, none whole": (3, 40, 35, 50),
    "more layers than rows": (17, 2, 5, 7),
    "one datapoint": (4, 1, 40, 33),
    "one feature in, one out": (16, 33, 1, 1),
    "no layers": (0, 4, 5, 7),
    "no rows": (3, 0, 5, 7),
    "no output features": (3, 4, 0, 7),
    "no input features": (3, 4, 5, 0),
    "nothing at all": (0, 0, 0, 0),
}


# The function: values, strides, gradients.


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_as_exact_as_pytorch_s(
    shape: tuple[int, int, int, int], dtype: torch.dtype, bias: bool, device: torch.device
) -> None:
    inputs = operands(device, shape, dtype)[: 2 + bias]
    grad_output = normal((*shape[:2], shape[2]), dtype, device)
    output, gradients = with_gradients(fastlinear.batched_linear, inputs, grad_output)
    input, weight, *biases = inputs
    one_bias = biases[0] if biases else None
    native = native_forward(input, weight, one_bias)
    assert_as_exact(output, native, exact_forward(input, weight, one_bias), "output")
    assert output.is_contiguous()
    wide = grad_output.detach().double()
    terms = {
        "grad_weight": wide.unsqueeze(-1) * input.detach().double().unsqueeze(-2),
        "grad_bias": wide,
    }
    for name, gradient, theirs, exact in zip(
        ["grad_input", "grad_weight", "grad_bias"],
        gradients,
        native_backward(grad_output, input, weight),
        exact_backward(grad_output, input, weight),
        strict=False,
    ):
        scale = sum_scale(terms[name], dtype, 1) if name in terms else 0.0
        assert_as_exact(gradient, theirs, exact, name, scale=scale)


def many(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# Of operands (2, 4, 5), (2, 3, 5), (2, 3).
STRIDES: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
    "one input to every layer": lambda: (many(4, 5).expand(2, -1, -1), many(2, 3, 5), many(2, 3)),
    "one layer to every input": lambda: (
        many(2, 4, 5),
        many(3, 5).expand(2, -1, -1),
        many(3).expand(2, -1),
    ),
    "one row, one number": lambda: (
        many(2, 1, 5).expand(-1, 4, -1),
        many(2, 3, 5),
        many(2, 1).expand(-1, 3),
    ),
    "transposed": lambda: (many(2, 5, 4).mT, many(2, 5, 3).mT, many(3, 2).t()),
    "layers last": lambda: (
        many(4, 5, 2).permute(2, 0, 1),
        many(3, 5, 2).permute(2, 0, 1),
        many(3, 2).t(),
    ),
    "layers between": lambda: (
        many(4, 2, 5).transpose(0, 1),
        many(3, 2, 5).transpose(0, 1),
        many(2, 3),
    ),
    "every other element": lambda: (
        many(4, 8, 10)[::2, ::2, ::2],
        many(4, 6, 10)[::2, ::2, ::2],
        many(4, 6)[::2, ::2],
    ),
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
def test_operands_of_every_stride(
    make: Callable[[], tuple[Tensor, Tensor, Tensor]], device: torch.device
) -> None:
    inputs = [fenced(operand.to(device)).requires_grad_() for operand in make()]
    for operand, made in zip(inputs, make(), strict=True):
        assert operand.stride() == made.stride()
    assert_alike(inputs)
    assert_alike(inputs[:2])


REDUCTIONS: dict[str, Function] = {
    "sum: stride 0": lambda output: output.sum(),
    "sum over layers": lambda output: output.sum(0).pow(2).sum(),
    "sum over rows": lambda output: output.sum(1).pow(2).sum(),
    "one element": lambda output: output[1, 2, 0],
    "transposed": lambda output: (output.mT.contiguous() * many(2, 3, 4).to(output)).sum(),
    "every other column": lambda output: output[..., ::2].pow(2).sum(),
}


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_gradients_of_every_stride(reduce: Function, seed: int, device: torch.device) -> None:
    inputs = operands(device)
    gradients = []
    for function in (fastlinear.batched_linear, reference):
        torch.manual_seed(seed)
        gradients.append(torch.autograd.grad(reduce(function(*inputs)), inputs))
    torch.testing.assert_close(*gradients)


@through_the_kernels
def test_kernels_take_all_layers_at_once_and_operands_as_they_lie(
    launched: list[tuple[str, list[int]]], device: torch.device
) -> None:
    input = normal((4, 5), torch.float32, device).requires_grad_()
    weight = normal((7, 5, 3), torch.float32, device).requires_grad_()
    bias = normal((3, 7), torch.float32, device).t().requires_grad_()
    grad_output = normal((4, 3), torch.float32, device).expand(7, -1, -1)
    output = fastlinear.batched_linear(input.expand(7, -1, -1), weight.mT, bias)
    assert len(launched) == 1
    assert launched[0][0] in FORWARD_KERNELS
    assert launched[0][1][:3] == [input.data_ptr(), weight.data_ptr(), bias.data_ptr()]
    output.backward(grad_output)
    assert [name for name, _ in launched[1:]] == ["linear_backward_kernel"]
    assert launched[1][1][:3] == [grad_output.data_ptr(), input.data_ptr(), weight.data_ptr()]


BIASES = {"of one layer": (1, 3), "of one number a layer": (2, 1), "of one number": (1, 1)}


@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_bias_broadcasts_as_in_baddbmm(shape: tuple[int, int], device: torch.device) -> None:
    input, weight, _ = operands(device)
    assert_alike([input, weight, normal(shape, torch.float64, device).requires_grad_()])


CHECKED = {
    "two layers": ((2, 1, 1, 2), True),
    "two layers without bias": ((2, 1, 2, 1), False),
    "no layers": ((0, 2, 2, 2), True),
    "no rows": ((2, 0, 2, 2), True),
}


@through_the_kernels
@pytest.mark.parametrize(("shape", "bias"), CHECKED.values(), ids=CHECKED)
def test_gradcheck_and_gradgradcheck(
    shape: tuple[int, int, int, int], bias: bool, device: torch.device
) -> None:
    inputs = tuple(operands(device, shape)[: 2 + bias])
    assert gradcheck(
        fastlinear.batched_linear,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )
    # Of second derivatives one random projection, which takes a third of the time.
    assert gradgradcheck(
        fastlinear.batched_linear,
        inputs,
        check_fwd_over_rev=True,
        check_batched_grad=True,
        fast_mode=True,
    )


def test_second_derivatives_through_expanded_operands(device: torch.device) -> None:
    def second(function: Function) -> tuple[Tensor, ...]:
        output = function(input.expand(3, -1, -1), weight, bias.expand(3, -1))
        first = torch.autograd.grad(output.pow(3).sum(), (input, weight), create_graph=True)
        return torch.autograd.grad(sum(one.pow(2).sum() for one in first), (input, weight, bias))

    input = normal((4, 5), torch.float64, device).requires_grad_()
    weight = normal((3, 2, 5), torch.float64, device).requires_grad_()
    bias = normal((2,), torch.float64, device).requires_grad_()
    torch.testing.assert_close(second(fastlinear.batched_linear), second(reference))


MASKS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("autocast", [False, True], ids=["as it is", "autocast"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "".join("01"[needed] for needed in mask))
def test_every_mask_of_requires_grad_saves_no_more_than_baddbmm(
    mask: tuple[bool, bool, bool], autocast: bool, bias: bool, device: torch.device
) -> None:
    def step(function: Function, inputs: list[Tensor]) -> tuple[bool, list[int], list[bool]]:
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel() * tensor.element_size())
            return tensor

        with (
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            output = function(*inputs)
        if output.requires_grad:
            output.sum().backward()
        return output.requires_grad, saved, [one.grad is not None for one in inputs]

    inputs = [
        one.detach().requires_grad_(needed)
        for one, needed in zip(operands(device, dtype=torch.float32), mask, strict=True)
    ][: 2 + bias]
    twins = [one.detach().clone().requires_grad_(one.requires_grad) for one in inputs]
    ours, theirs = step(fastlinear.batched_linear, inputs), step(reference, twins)
    assert (ours[0], ours[2]) == (theirs[0], theirs[2])
    assert len(ours[1]) == len(theirs[1])
    assert sum(ours[1]) <= sum(theirs[1])
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {}
    torch.testing.assert_close(
        [one.grad for one in inputs if one.grad is not None],
        [one.grad for one in twins if one.grad is not None],
        **tolerance,
    )


def test_what_is_not_saved_may_change_in_place(device: torch.device) -> None:
    input, weight, bias = operands(device)
    output = fastlinear.batched_linear(input.detach(), weight, bias)
    with torch.no_grad():
        weight.zero_()
        bias.zero_()
    output.mul_(2).relu_().sum().backward()
    assert weight.grad is not None
    output = fastlinear.batched_linear(input, weight, bias)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_inference_mode_gives_inference_tensors(device: torch.device) -> None:
    inputs = operands(device)
    with torch.inference_mode():
        output = fastlinear.batched_linear(*inputs)
        assert output.is_inference()
        torch.testing.assert_close(output.relu_(), reference(*inputs).relu())


@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_activation_follows_the_product(activation: str | None, device: torch.device) -> None:
    functions = {"relu": F.relu, "gelu": F.gelu, None: lambda output: output}
    inputs = operands(device)
    grad_output = torch.randn_like(reference(*inputs))
    ours, theirs = (
        with_gradients(function, inputs, grad_output)
        for function in (
            lambda *a: fastlinear.batched_linear(*a, activation=activation),
            lambda *a: functions[activation](reference(*a)),
        )
    )
    torch.testing.assert_close(ours, theirs)


def test_activation_of_another_name_says_which_there_are(device: torch.device) -> None:
    said = "activation must be None or one of 'relu', .* but is 'softmax'"
    with pytest.raises(ValueError, match=said):
        fastlinear.batched_linear(*operands(device), activation="softmax")
    with pytest.raises(ValueError, match=said):
        fastlinear.BatchedLinear(2, 5, 3, activation="softmax")
