"""Derivatives of `fastlinear.linear` through the kernels.

Every order and mode, every mask, every stride.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, FORWARD_KERNELS, assert_as_exact, exact_backward, normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastlinear

pytestmark = pytest.mark.usefixtures("triton_backend")

LEADING = {"1-D": (), "2-D": (4,), "3-D": (2, 2), "one row": (1,), "no rows": (0,)}


def double(*shape: int, device: torch.device, requires_grad: bool = True) -> Tensor:
    return normal(shape, torch.float64, device).requires_grad_(requires_grad)


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(leading: tuple[int, ...], bias: bool, device: torch.device) -> None:
    operands = (double(*leading, 3, device=device), double(2, 3, device=device)) + bias * (
        double(2, device=device),
    )
    assert gradcheck(
        fastlinear.linear,
        operands,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_gradgradcheck(leading: tuple[int, ...], device: torch.device) -> None:
    operands = (
        double(*leading, 3, device=device),
        double(2, 3, device=device),
        double(2, device=device),
    )
    assert gradgradcheck(
        fastlinear.linear,
        operands,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
        fast_mode=True,  # one random projection, which takes a quarter of the time
    )


MASKS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "".join("01"[needed] for needed in mask))
def test_every_mask_of_requires_grad(mask: tuple[bool, bool, bool], device: torch.device) -> None:
    shapes = ((2, 20, 33), (40, 33), (40,))
    ours = [
        normal(shape, torch.float32, device).requires_grad_(needed)
        for shape, needed in zip(shapes, mask, strict=True)
    ]
    theirs = [operand.detach().clone().requires_grad_(operand.requires_grad) for operand in ours]
    output, reference = fastlinear.linear(*ours), F.linear(*theirs)
    assert output.requires_grad == reference.requires_grad
    if not any(mask):
        return
    grad_output = normal((2, 20, 40), torch.float32, device)
    output.backward(grad_output)
    reference.backward(grad_output)
    exact = exact_backward(grad_output, ours[0], ours[1])
    for operand, native, truth in zip(ours, theirs, exact, strict=True):
        assert (operand.grad is None) == (native.grad is None)
        if operand.grad is not None:
            assert_as_exact(operand.grad, native.grad, truth.reshape(operand.shape))


def test_only_wanted_gradients_are_computed(
    launched: list[tuple[str, list[int]]], device: torch.device
) -> None:
    for input_needs, weight_needs, bias_needs in MASKS[1:]:
        operands = [
            normal(shape, torch.float32, device).requires_grad_(needed)
            for shape, needed in zip(
                ((4, 5), (3, 5), (3,)), (input_needs, weight_needs, bias_needs), strict=True
            )
        ]
        output = fastlinear.linear(*operands)
        launched.clear()
        output.sum().backward()
        wanted = {
            (False, False): {()},
            (True, False): {(name,) for name in FORWARD_KERNELS},
            (False, True): {("linear_backward_weight_kernel",)},
            (True, True): {("linear_backward_kernel",)},
        }
        names = tuple(name for name, _ in launched)
        assert names in wanted[input_needs, weight_needs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained weight", "frozen weight"])
def test_module_gradients(
    dtype: torch.dtype, training: bool, frozen: bool, device: torch.device
) -> None:
    layer = fastlinear.Linear(33, 40, dtype=dtype, device=device).train(training)
    layer.weight.requires_grad_(not frozen)
    reference = torch.nn.Linear(33, 40, dtype=dtype, device=device).train(training)
    reference.load_state_dict(layer.state_dict())
    reference.weight.requires_grad_(not frozen)

    input = normal((50, 33), dtype, device).requires_grad_()
    native_input = input.detach().clone().requires_grad_()
    grad_output = normal((50, 40), dtype, device)
    layer(input).backward(grad_output)
    reference(native_input).backward(grad_output)
    exact = exact_backward(grad_output, input, layer.weight)
    assert_as_exact(input.grad, native_input.grad, exact[0], "grad_input")
    assert_as_exact(layer.bias.grad, reference.bias.grad, exact[2], "grad_bias")
    if frozen:
        assert layer.weight.grad is None
    else:
        assert_as_exact(layer.weight.grad, reference.weight.grad, exact[1], "grad_weight")


REDUCTIONS = {
    "sum: stride 0": lambda y: y.sum(),
    "mean over rows": lambda y: y.mean(0).pow(2).sum(),
    "one element": lambda y: y[3, 4],
    "transposed": lambda y: (
        y.t().contiguous() * torch.arange(y.numel(), device=y.device).view(y.shape[::-1])
    ).sum(),
    "every other column": lambda y: y[:, ::2].pow(2).sum(),
}


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_gradients_of_every_stride(reduce, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    operands = [double(*shape, device=device) for shape in ((20, 33), (40, 33), (40,))]
    ours = torch.autograd.grad(reduce(fastlinear.linear(*operands)), operands)
    theirs = torch.autograd.grad(reduce(F.linear(*operands)), operands)
    for gradient, native in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, native)


def test_third_derivative(device: torch.device) -> None:
    input, weight = double(4, 5, device=device), double(3, 5, device=device)

    def third(linear) -> Tensor:  # type: ignore[no-untyped-def]
        (first,) = torch.autograd.grad(linear(input, weight).pow(4).sum(), input, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), weight, create_graph=True)
        return torch.autograd.grad(second.sum(), input)[0]

    torch.testing.assert_close(third(fastlinear.linear), third(F.linear))


def test_dual_tensors_pass_through_a_plain_backward(device: torch.device) -> None:
    import torch.autograd.forward_ad as forward_ad

    input, tangent = double(4, 5, device=device), double(4, 5, device=device, requires_grad=False)
    weight = double(3, 5, device=device)

    def tangent_of_gradient(linear) -> Tensor:  # type: ignore[no-untyped-def]
        with forward_ad.dual_level():
            output = linear(forward_ad.make_dual(input, tangent), weight)
            (gradient,) = torch.autograd.grad(output.pow(2).sum(), weight)
            result = forward_ad.unpack_dual(gradient).tangent
            assert result is not None, "the tangent was lost on the way"
            return result

    torch.testing.assert_close(
        tangent_of_gradient(fastlinear.linear), tangent_of_gradient(F.linear)
    )


def test_forward_over_forward_keeps_the_mixed_derivative(device: torch.device) -> None:
    tensors = [
        double(*shape, device=device, requires_grad=False) for shape in ((4, 5), (3, 5), (3,))
    ]

    def second(linear):  # type: ignore[no-untyped-def]
        first = lambda *a: torch.func.jvp(linear, a, tuple(tensors))[1]  # noqa: E731
        return torch.func.jvp(first, tuple(tensors), tuple(tensors))[1]

    expected = second(F.linear)
    assert expected.abs().max() > 0
    torch.testing.assert_close(second(fastlinear.linear), expected)
