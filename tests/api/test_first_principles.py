"""The ideas that a linear layer implements, each as a test, through the kernels."""

import pytest
import torch
from torch import Tensor

import fastlinear
from fastlinear.kernels.launching import launch

pytestmark = pytest.mark.usefixtures("triton_backend")


def test_a_neuron_multiplies_and_adds(device: torch.device) -> None:
    input, weight, bias = (torch.tensor(value, device=device) for value in ([3.5], [[2.0]], [0.5]))
    assert fastlinear.linear(input, weight).item() == 7
    assert fastlinear.linear(input, weight, bias).item() == 7.5


def test_a_layer_is_a_matrix_product(device: torch.device) -> None:
    weight = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], device=device)
    bias = torch.tensor([10.0, 20, 30], device=device)
    datapoint = torch.tensor([1.0, 0, -1], device=device)
    # Each output is one row of weights times the datapoint: 1 - 3, 4 - 6, 7 - 9.
    assert fastlinear.linear(datapoint, weight, bias).tolist() == [8, 18, 28]


def test_a_gradient_predicts_what_a_nudge_does(device: torch.device) -> None:
    input, target = (torch.randn(8, size, dtype=torch.float64, device=device) for size in (5, 3))
    weight = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)

    def loss(weight: Tensor) -> Tensor:
        return (fastlinear.linear(input, weight) - target).pow(2).mean()

    loss(weight).backward()
    epsilon = 1e-6
    nudged = weight.detach().clone()
    nudged[1, 2] += epsilon
    change = (loss(nudged) - loss(weight)).item() / epsilon
    assert change == pytest.approx(weight.grad[1, 2].item(), rel=1e-4, abs=1e-6)


def test_a_batch_s_gradient_is_the_average_of_its_datapoints_gradients(
    device: torch.device,
) -> None:
    layer = fastlinear.Linear(5, 3, dtype=torch.float64, device=device)
    inputs, targets = (torch.randn(16, size, dtype=torch.float64, device=device) for size in (5, 3))

    def gradients(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        loss = (layer(inputs) - targets).pow(2).sum(-1).mean()
        return list(torch.autograd.grad(loss, list(layer.parameters())))

    alone = [gradients(input, target) for input, target in zip(inputs, targets, strict=True)]
    averages = [torch.stack(gradient).mean(0) for gradient in zip(*alone, strict=True)]
    torch.testing.assert_close(gradients(inputs, targets), averages)


def test_datapoints_as_columns_need_no_copy(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    columns = torch.randn(5, 16, device=device)  # one datapoint a column
    weight = torch.randn(3, 5, device=device)
    rows = columns.t().contiguous()

    read: list[int | None] = []
    allocated: list[tuple[int, ...]] = []
    run = launch.run

    def spy_run(kernel: object, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:
        read.extend(None if tensor is None else tensor.data_ptr() for tensor in pointers[:3])
        run(kernel, plan, pointers)

    def spy_allocate(like: Tensor, output: launch.Operand) -> Tensor:
        allocated.append(output.shape)
        return like.new_empty(output.shape)

    expected = fastlinear.linear(rows, weight)
    monkeypatch.setattr(launch, "run", spy_run)
    monkeypatch.setattr(launch, "allocate", spy_allocate)
    count = "allocation.all.allocated"
    before = torch.cuda.memory_stats(device)[count] if device.type == "cuda" else 0
    output = fastlinear.linear(columns.t(), weight)
    if device.type == "cuda":  # the interpreter itself copies operands to where it can reach them
        assert torch.cuda.memory_stats(device)[count] - before == 1
    assert torch.equal(output, expected)
    assert read == [columns.data_ptr(), weight.data_ptr(), None], (
        "it reads something else than what was given"
    )
    assert allocated == [(16, 3)], "something besides the output was allocated"


def test_two_layers_are_one_function_after_another(device: torch.device) -> None:
    first = fastlinear.Linear(5, 4, dtype=torch.float64, device=device)
    second = fastlinear.Linear(4, 3, dtype=torch.float64, device=device)
    input = torch.randn(16, 5, dtype=torch.float64, device=device)
    stacked = torch.nn.Sequential(first, second)(input)
    # Without a bend between them, two layers are one whose weight is the product.
    weight, bias = second.weight @ first.weight, second.weight @ first.bias + second.bias
    torch.testing.assert_close(stacked, fastlinear.linear(input, weight, bias))

    # The chain rule: what the second layer hands down is the first one's grad_output.
    hidden = first(input)
    grad_hidden = torch.ones(16, 3, dtype=torch.float64, device=device) @ second.weight
    stacked.sum().backward()
    expected = torch.autograd.grad(hidden, first.weight, grad_hidden)[0]
    torch.testing.assert_close(first.weight.grad, expected)
