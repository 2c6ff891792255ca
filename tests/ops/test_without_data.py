"""Tensors without data, and what watches ops: counters, modes, the profiler."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Function, Ops, twins
from oracle import normal
from torch import nn

import fastlinear

pytestmark = pytest.mark.usefixtures("triton_backend")


# Tensors without data, and what watches ops


def test_fake_tensors_have_the_shapes_of_nn_linear(device: torch.device) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        layer = fastlinear.Linear(3, 2, dtype=torch.bfloat16, device=device)
        input = torch.empty(7, 4, 3, dtype=torch.bfloat16, device=device, requires_grad=True)
        output = layer(input)
        assert isinstance(output, FakeTensor)
        reference = F.linear(input, layer.weight, layer.bias)
        gradients = torch.autograd.grad(output.sum(), (input, *layer.parameters()))
        for ours, theirs in zip(
            (output, *gradients), (reference, input, *layer.parameters()), strict=True
        ):
            assert (ours.shape, ours.dtype, ours.device) == (
                theirs.shape,
                theirs.dtype,
                theirs.device,
            )
        assert output.stride() == reference.stride()


def test_meta_tensors_have_the_shapes_of_nn_linear() -> None:
    layer = fastlinear.Linear(3, 2, device="meta")
    input = torch.empty(7, 4, 3, device="meta", requires_grad=True)
    output = layer(input)
    output.sum().backward()
    assert (output.device.type, output.shape, output.stride()) == ("meta", (7, 4, 2), (8, 2, 1))
    for tensor in (input, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.is_meta
        assert tensor.grad.shape == tensor.shape


def test_flop_counter_counts_each_module_as_nn_linear(device: torch.device) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def count(model: nn.Module) -> dict[str, int]:
        with FlopCounterMode(display=False) as counter:
            model(input).sum().backward()
        return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    input = normal((4, 3), torch.float64, device)
    ours, theirs = map(count, twins(device))
    assert ours == theirs
    assert ours["Sequential.0"] == 2 * 2 * 4 * 3 * 5  # its input needs no gradient
    assert ours["Sequential.2"] == 3 * 2 * 4 * 5 * 2


def test_dispatch_mode_sees_each_op_once(device: torch.device) -> None:
    layer = fastlinear.Linear(3, 2, dtype=torch.float64, device=device)
    input = normal((4, 3), torch.float64, device)
    with Ops() as ops:
        output = layer(input)
        assert [op for op in ops.called if "linear" in op] == ["fastlinear.linear.default"]
        output.sum().backward()
    assert [op for op in ops.called if "linear" in op] == [
        "fastlinear.linear.default",
        "fastlinear.linear_backward.default",
    ]


def test_profiler_shows_each_op_once(device: torch.device) -> None:
    from torch.profiler import ProfilerActivity, profile

    layer = fastlinear.Linear(3, 2, dtype=torch.float64, device=device)
    input = normal((4, 3), torch.float64, device)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        layer(input).sum().backward()
        with torch.no_grad():
            layer(input)

    def is_within_itself(event: Any) -> bool:
        parent = event.cpu_parent
        while parent is not None and parent.name != event.name:
            parent = parent.cpu_parent
        return parent is not None

    # With a gradient the op is called again below autograd.
    names = [event.name for event in profiler.events() if not is_within_itself(event)]
    assert names.count("fastlinear::linear") == 2
    assert names.count("fastlinear::linear_backward") == 1


def test_benchmark_timer_times_the_kernels(kernels_ran: Function, device: torch.device) -> None:
    from torch.utils.benchmark import Timer

    layer = fastlinear.Linear(3, 2, device=device)
    input = normal((4, 3), torch.float32, device)
    timed = Timer("layer(input)", globals={"layer": layer, "input": input}).timeit(2)
    assert timed.mean > 0
    assert kernels_ran()
