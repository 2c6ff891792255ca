"""torch.nn.utils: what changes a layer's weight, on converted layers; and functional_call."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, stateless
from torch.nn.utils.spectral_norm import remove_spectral_norm, spectral_norm
from torch.nn.utils.weight_norm import remove_weight_norm, weight_norm
from twins import Backend, Results, leaf, values_and_gradients

import fastlinear

# How each is put on a layer and taken off again.
TOOLS: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "parametrizations.weight_norm": (
        parametrizations.weight_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "parametrizations.spectral_norm": (
        parametrizations.spectral_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "weight_norm": (weight_norm, remove_weight_norm),
    "spectral_norm": (spectral_norm, remove_spectral_norm),
    "prune.l1_unstructured": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
        lambda layer: prune.remove(layer, "weight"),
    ),
}

CALLS = {
    "torch.nn.utils.stateless": stateless.functional_call,
    "torch.func": torch.func.functional_call,
}


def two_layers(device: torch.device) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 9)).to(device)


def kinds(model: nn.Module) -> set[type]:
    return {
        parametrize.type_before_parametrizations(layer)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    }


# The two without a parametrization are deprecated, and still there.
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("order", ["before convert", "after convert"])
def test_utils_change_a_converted_layer_as_they_change_a_plain_one(
    tool: str, order: str, backend: Backend, device: torch.device, seed: int
) -> None:
    apply, remove = TOOLS[tool]
    start = two_layers(device)

    def applied(model: nn.Module) -> nn.Module:
        torch.manual_seed(seed)  # spectral_norm starts from random vectors
        for layer in (model[0], model[2]):
            apply(layer)
        return model

    plain, exact = applied(copy.deepcopy(start)), applied(copy.deepcopy(start)).double()
    model = copy.deepcopy(start)
    if order == "before convert":
        applied(model)
        assert fastlinear.convert(model).converted == ("0", "2")
    else:
        assert fastlinear.convert(model).converted == ("0", "2")
        applied(model)

    input, grad_output = torch.randn(7, 20, device=device), torch.randn(7, 9, device=device)

    def results(one: nn.Module) -> Results:
        own = leaf(input, one)
        values = values_and_gradients(one, one(own), grad_output)
        buffers = {name: buffer.clone() for name, buffer in one.named_buffers()}
        return {**values, "gradient of input": own.grad, **buffers}

    def assert_twins() -> None:
        backend.assert_equal(results(model), results(plain), results(exact))

    assert kinds(model) == {fastlinear.Linear}
    assert_twins()
    assert_twins()  # spectral_norm's power iteration goes on from the last

    assert fastlinear.revert(model).converted == ("0", "2")
    assert kinds(model) == {nn.Linear}
    calls = backend.calls
    assert_twins()
    assert backend.calls == calls
    assert fastlinear.convert(model).converted == ("0", "2")
    assert_twins()

    for one in (model, plain, exact):
        remove(one[0])
        remove(one[2])
    assert type(model[0]) is type(model[2]) is fastlinear.Linear
    assert_twins()
    assert fastlinear.revert(model).converted == ("0", "2")
    assert type(model[0]) is type(model[2]) is nn.Linear
    assert vars(model[0]).keys() == vars(plain[0]).keys()
    calls = backend.calls
    assert_twins()
    assert backend.calls == calls


# The one in torch.nn.utils is deprecated for the one in torch.func, and still there.
@pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.stateless.functional_call` is deprecated:FutureWarning"
)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_functional_call_computes_with_the_given_parameters(
    call: Callable[..., Tensor], backend: Backend, device: torch.device
) -> None:
    plain = two_layers(device)
    model = copy.deepcopy(plain)
    fastlinear.convert(model)
    exact = copy.deepcopy(plain).double()
    given = {name: torch.randn_like(parameter) for name, parameter in plain.named_parameters()}
    input, grad_output = torch.randn(7, 20, device=device), torch.randn(7, 9, device=device)

    def results(one: nn.Module) -> Results:
        parameters = {name: leaf(tensor, one) for name, tensor in given.items()}
        own = leaf(input, one)
        output = call(one, parameters, (own,))
        output.backward(grad_output.to(output.dtype))
        assert all(parameter.grad is None for parameter in one.parameters())
        gradients = {name: tensor.grad for name, tensor in parameters.items()}
        return {"output": output, "gradient of input": own.grad, **gradients}

    backend.assert_equal(results(model), results(plain), results(exact))


@pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.stateless.functional_call` is deprecated:FutureWarning"
)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_functional_call_keeps_tied_weights_tied(
    call: Callable[..., Tensor], backend: Backend, device: torch.device
) -> None:
    plain = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).to(device)
    plain[2].weight = plain[0].weight
    model = copy.deepcopy(plain)
    fastlinear.convert(model)
    assert model[2].weight is model[0].weight
    exact = copy.deepcopy(plain).double()
    given, input = torch.randn(12, 12, device=device), torch.randn(7, 12, device=device)

    def results(one: nn.Module) -> Results:
        weight = leaf(given, one)
        output = call(one, {"0.weight": weight}, (input.to(weight.dtype),))
        output.sum().backward()
        return {"output": output, "gradient of weight": weight.grad}

    backend.assert_equal(results(model), results(plain), results(exact))
