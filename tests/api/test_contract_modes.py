"""The contract of `fastlinear.Linear`: inference, modes of autograd, what is saved for backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import LEADING, MASKS, Deed, forward_and_backward, fresh, masked, runs, x
from side_by_side import assert_same
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastlinear


def inference(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


INFERENCE: dict[str, Deed] = {
    "output": lambda layer: inference(lambda: layer(x(layer))),
    "output, 3-D": lambda layer: inference(lambda: layer(x(layer, 2, 4, 5))),
    "output in place": lambda layer: inference(lambda: layer(x(layer)).relu_()),
    "input within": lambda layer: inference(lambda: layer(inference(lambda: x(layer)))),
    "input of a frozen layer": lambda layer: layer.requires_grad_(False)(
        inference(lambda: x(layer))
    ),
    "input of a frozen weight": lambda layer: (
        layer.weight.requires_grad_(False),
        layer(inference(lambda: x(layer))),
    ),
    "input within no_grad": lambda layer: torch.no_grad()(layer)(inference(lambda: x(layer))),
    "layer within": lambda layer: inference(lambda: fresh(layer)(x(layer))),
}

INFERENCE_ERRORS: dict[str, Deed] = {
    "output in place outside": lambda layer: inference(lambda: layer(x(layer))).relu_(),
    "output used with gradients": lambda layer: inference(lambda: layer(x(layer))) * layer.bias,
    "input with gradients": lambda layer: layer(inference(lambda: x(layer))),
    "layer with gradients": lambda layer: inference(lambda: fresh(layer))(
        x(layer).requires_grad_()
    ),
    "gradients within": lambda layer: inference(lambda: layer(x(layer)).sum().backward()),
}


@runs
@pytest.mark.parametrize("deed", INFERENCE.values(), ids=INFERENCE)
def test_inference_mode(deed: Deed, device: torch.device) -> None:
    assert_same(lambda Linear: deed(Linear(5, 3, device=device)))


@runs
@pytest.mark.parametrize("deed", INFERENCE_ERRORS.values(), ids=INFERENCE_ERRORS)
def test_inference_mode_errors(deed: Deed, device: torch.device) -> None:
    assert_same(lambda Linear: deed(Linear(5, 3, device=device)), raises=True)


def with_anomaly_detection(layer: nn.Linear) -> Any:
    with torch.autograd.detect_anomaly():
        return forward_and_backward(layer, torch.randn(4, 5))


def with_hook_on_output(layer: nn.Linear) -> Any:
    input = x(layer).requires_grad_()
    output = layer(input)
    output.retain_grad()
    output.register_hook(lambda gradient: 2 * gradient)
    output.sum().backward()
    return output.grad, input, layer


def with_hooks_on_parameters(layer: nn.Linear) -> Any:
    seen = []
    for name, parameter in layer.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.append((name, gradient)))
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: seen.append((name, parameter.grad))
        )
    layer(x(layer)).sum().backward()
    return sorted(seen, key=lambda event: event[0]), layer


def with_checkpoint(layer: nn.Linear, use_reentrant: bool) -> Any:
    input = x(layer).requires_grad_()
    output = checkpoint(layer, input, use_reentrant=use_reentrant)
    output.sum().backward()
    return output, input, layer


def with_saved_on_cpu(layer: nn.Linear) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return forward_and_backward(layer, torch.randn(4, 5))


def with_mutation_allowed(layer: nn.Linear) -> Any:
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        input = x(layer).requires_grad_()
        output = layer(input)
        with torch.no_grad():
            input.zero_()
            layer.weight.zero_()
        output.sum().backward()
        return input.grad, layer


def with_functional_call(layer: nn.Linear) -> Any:
    values = {name: value.detach() * 2 for name, value in layer.named_parameters()}
    return torch.func.functional_call(layer, values, (x(layer),))


def with_retained_graph(layer: nn.Linear) -> Any:
    output = layer(x(layer)).sum()
    output.backward(retain_graph=True)
    output.backward()
    return layer


AUTOGRAD: dict[str, Deed] = {
    "anomaly detection": with_anomaly_detection,
    "hook on the output": with_hook_on_output,
    "hooks on parameters": with_hooks_on_parameters,
    "checkpoint": lambda layer: with_checkpoint(layer, use_reentrant=False),
    "reentrant checkpoint": lambda layer: with_checkpoint(layer, use_reentrant=True),
    "save_on_cpu": with_saved_on_cpu,
    "saved tensors may change": with_mutation_allowed,
    "functional_call": with_functional_call,
    "retain_graph": with_retained_graph,
    "gradient in another dtype": lambda layer: (
        layer(x(layer)).backward(torch.ones(4, 3, device=layer.weight.device).double()),
        layer,
    ),
}


@runs
@pytest.mark.parametrize("deed", AUTOGRAD.values(), ids=AUTOGRAD)
def test_modes_of_autograd(deed: Deed, device: torch.device) -> None:
    assert_same(lambda Linear: deed(Linear(5, 3, device=device)))


@pytest.mark.parametrize(
    ("backend", "name"),
    [("auto", "AddmmBackward0"), ("triton", "LinearFunctionBackward")],
    indirect=["backend"],
    ids=["auto", "triton"],
)
@pytest.mark.parametrize("leading", [(4,), (2, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_anomaly_detection_names_the_layer(
    backend: str, name: str, leading: tuple[int, ...], device: torch.device
) -> None:
    layer = fastlinear.Linear(5, 3, device=device)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    with torch.no_grad():
        layer.weight[1, 2] = float("nan")

    def backward() -> None:
        with torch.autograd.detect_anomaly():
            output = layer(torch.randn(*leading, 5).to(device).requires_grad_())
            output.nan_to_num().sum().backward()

    with (
        pytest.warns(UserWarning, match="Anomaly Detection has been enabled"),
        pytest.warns(UserWarning, match=f"Error detected in {name}"),
        pytest.raises(RuntimeError, match=f"Function '{name}' returned nan values in its"),
    ):
        backward()


@runs
@pytest.mark.parametrize("autocast", [False, True], ids=["as it is", "autocast"])
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
def test_saves_no_more_than_nn_linear(
    leading: tuple[int, ...], autocast: bool, device: torch.device
) -> None:
    """As many tensors as hooks see, of no more bytes: that is what offloading them would move."""

    def saved(Linear: Any, mask: tuple[bool, bool, bool], bias: bool) -> tuple[list[int], int]:
        layer, input = masked(Linear, mask, leading, device)
        if not bias:
            layer.bias = None
        packed: list[int] = []
        unpacked: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor.numel() * tensor.element_size())
            return tensor

        with (
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast),
            saved_tensors_hooks(pack, lambda tensor: unpacked.append(tensor) or tensor),
        ):
            output = layer(input)
        if output.requires_grad:
            output.float().sum().backward()
        return packed, len(unpacked)

    for mask in MASKS:
        for bias in (True, False):
            packed, unpacked = saved(fastlinear.Linear, mask, bias)
            native, native_unpacked = saved(nn.Linear, mask, bias)
            assert len(packed) == len(native), mask
            assert unpacked == native_unpacked, mask
            assert sum(packed) <= sum(native), mask
