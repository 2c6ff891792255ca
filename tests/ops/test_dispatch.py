"""The way from the op to the kernel: nothing that wants a call on the way is left out.

The op goes to the kernel without a second pass through PyTorch's dispatcher where only plain
tensors are around (fastlinear/ops/op.py); here is what else can be around.
"""

import pytest
import torch
import torch.nn.functional as F
from guards import SeenByDispatch
from oracle import normal
from torch import Tensor

import fastlinear
from fastlinear.kernels.backward import grad_weight as backward_weight
from fastlinear.kernels.backward import linear as backward
from fastlinear.kernels.forward import linear as forward
from fastlinear.ops.linear import linear_backward_op, linear_op

pytestmark = pytest.mark.usefixtures("triton_backend")


def operands(device: torch.device, requires_grad: bool) -> list[Tensor]:
    return [
        normal(shape, torch.float64, device).requires_grad_(requires_grad)
        for shape in ((4, 5), (3, 5), (3,))
    ]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
def test_lazily_negated_operands_are_negated(requires_grad: bool, device: torch.device) -> None:
    input, weight, bias = operands(device, requires_grad)
    negated = torch._neg_view(input)
    assert negated.is_neg()
    output = fastlinear.linear(negated, weight, bias)
    torch.testing.assert_close(output, F.linear(-input, weight, bias))
    torch.testing.assert_close(
        fastlinear.linear(input, torch._neg_view(weight), torch._neg_view(bias)),
        F.linear(input, -weight, -bias),
    )
    if requires_grad:
        grad_output = torch._neg_view(normal((4, 3), torch.float64, device))
        ours = torch.autograd.grad(output, (input, weight, bias), grad_output)
        theirs = torch.autograd.grad(
            F.linear(-input, weight, bias), (input, weight, bias), grad_output
        )
        torch.testing.assert_close(ours, theirs)


def test_tensors_of_implied_zeros_are_zeros(device: torch.device) -> None:
    _, weight, bias = operands(device, False)
    zeros = torch._efficientzerotensor((4, 5), dtype=torch.float64, device=device)
    torch.testing.assert_close(fastlinear.linear(zeros, weight, bias), bias.expand(4, 3))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no grad", "grad"])
def test_modes_see_the_ops(requires_grad: bool, device: torch.device) -> None:
    arguments = operands(device, requires_grad)
    with SeenByDispatch() as record:
        output = fastlinear.linear(*arguments)
        assert record.seen.count(linear_op) == 1
        if requires_grad:
            output.sum().backward()
            assert record.seen.count(linear_backward_op) == 1
    assert record.seen.count(linear_op) == 1


def test_functionalized_calls_are_right(device: torch.device) -> None:
    def double_in_place(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden = input.clone()
        hidden.mul_(2)
        return fastlinear.linear(hidden, weight, bias).relu_()

    input, weight, bias = operands(device, False)
    torch.testing.assert_close(
        torch.func.functionalize(double_in_place)(input, weight, bias),
        F.linear(2 * input, weight, bias).relu(),
    )


def test_inference_tensors_give_inference_tensors(device: torch.device) -> None:
    input, weight, bias = operands(device, True)
    with torch.inference_mode():
        output = fastlinear.linear(input, weight, bias)
        again = fastlinear.linear(output @ weight, weight, bias)
    assert output.is_inference()
    assert again.is_inference()
    with torch.no_grad():
        torch.testing.assert_close(again.clone(), F.linear(output.clone() @ weight, weight, bias))


def test_plans_tell_apart_what_a_launch_depends_on(device: torch.device) -> None:
    matrix = torch.randn(96, 64, device=device)
    tensors = {
        "plain": matrix[:32],
        "moved": matrix[32:64],  # the same plan
        "shape": matrix[:31],
        "strides": matrix[::3],
        "transposed": torch.randn(64, 32, device=device).t(),
        "dtype": matrix[:32].double(),
        "address": torch.randn(32 * 64 + 1, device=device)[1:].view(32, 64),
    }
    weight = torch.randn(48, 64, device=device)
    forward.plan_forward.cache_clear()
    for name, input in tensors.items():
        made = forward.plan_forward.cache_info().misses
        operand = weight.double() if name == "dtype" else weight
        torch.testing.assert_close(fastlinear.linear(input, operand), F.linear(input, operand))
        assert forward.plan_forward.cache_info().misses == made + (name != "moved"), name


def test_plans_keep_no_tensor_alive_and_are_bounded(device: torch.device) -> None:
    import gc
    import weakref

    layer = fastlinear.Linear(5, 3, device=device)
    input = torch.randn(4, 5, device=device, requires_grad=True)
    layer(input).sum().backward()
    alive = [weakref.ref(tensor) for tensor in (input, *layer.parameters())]
    del layer, input
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    plans = (
        forward.plan_forward,
        backward.plan_backward,
        backward_weight.plan_backward_weight,
    )
    for plan in plans:
        assert plan.cache_info().maxsize is not None
