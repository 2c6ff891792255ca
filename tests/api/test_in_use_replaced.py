"""Attributes and methods of a layer that are replaced, and subclasses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_use import called
from side_by_side import assert_same
from torch import Tensor, nn

import fastlinear
from fastlinear.ops.elementwise import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("backend")


def with_tensors_in_dict(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    weight = torch.randn(3, 4, device=device, requires_grad=True)
    bias = torch.randn(3, device=device, requires_grad=True)
    layer.__dict__["weight"], layer.__dict__["bias"] = weight * 2, bias.exp()
    return called(layer, device), weight.grad, bias.grad


def with_a_weight_in_dict_only(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    weight = layer.weight
    del layer.weight
    layer.__dict__["weight"] = weight.detach() + 1
    return called(layer, device)


def with_a_property(Linear: Any, device: torch.device) -> Any:
    class Normalized(Linear):  # type: ignore[misc]
        @property
        def weight(self) -> Tensor:
            return F.normalize(self._parameters["weight"])

        @weight.setter
        def weight(self, value: Tensor) -> None:
            self.register_parameter("weight", value)

        @weight.deleter
        def weight(self) -> None:
            del self._parameters["weight"]

    layer = Normalized.__new__(Normalized)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = 4, 3
    layer._parameters["weight"] = nn.Parameter(torch.randn(3, 4, device=device))
    layer._parameters["bias"] = nn.Parameter(torch.randn(3, device=device))
    return called(layer, device)


def with_a_property_on_the_class(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    Linear.bias = property(lambda self: self._parameters["bias"] * 3)
    try:
        return called(layer, device)
    finally:
        del Linear.bias


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def with_the_result_of_a_function(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    weight = layer.weight
    layer.__dict__["weight"] = Double.apply(weight)
    return called(layer, device), weight.grad


def with_a_bias_taken_away(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    layer.__dict__["bias"] = None
    return called(layer, device)


def with_a_buffer_for_a_weight(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return called(layer, device)


def with_a_forward_of_its_own(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    layer.forward = lambda input: type(layer).forward(layer, input) + 1
    return called(layer, device)


REPLACED: dict[str, Callable[[Any, torch.device], Any]] = {
    one.__name__: one
    for one in (
        with_tensors_in_dict,
        with_a_weight_in_dict_only,
        with_a_property,
        with_a_property_on_the_class,
        with_the_result_of_a_function,
        with_a_bias_taken_away,
        with_a_buffer_for_a_weight,
        with_a_forward_of_its_own,
    )
}


@pytest.mark.parametrize("deed", REPLACED.values(), ids=REPLACED)
def test_attribute_counts(deed: Callable[[Any, torch.device], Any], device: torch.device) -> None:
    assert_same(lambda Linear: deed(Linear, device))


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Has `nn.Linear.forward` add 1, as loaders of LoRA have it add theirs; whom it was for."""
    forward, layers = nn.Linear.forward, []

    def plus_1(self: nn.Linear, input: Tensor) -> Tensor:
        layers.append(type(self))
        return forward(self, input) + 1

    monkeypatch.setattr(nn.Linear, "forward", plus_1)
    return layers


def test_patched_forward_runs(patched: list[type], device: torch.device) -> None:
    assert_same(lambda Linear: called(Linear(4, 3).to(device), device))
    assert patched == [nn.Linear, fastlinear.Linear]
    input = torch.randn(5, 4, device=device)
    for activation in ("relu", "gelu"):  # which comes last
        layer = fastlinear.Linear(4, 3, device=device, activation=activation)
        expected = ACTIVATIONS[activation](F.linear(input, layer.weight, layer.bias) + 1)
        torch.testing.assert_close(layer(input), expected)
    gated = fastlinear.GatedLinear(4, 3).to(device)
    gate, up = (F.linear(input, one.weight, one.bias) + 1 for one in gated.children())
    torch.testing.assert_close(gated(input), F.silu(gate) * up)


def test_patched_call_runs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    call, seen = nn.Linear.__call__, []

    def noted(self: nn.Linear, input: Tensor) -> Tensor:
        seen.append(self)
        return call(self, input)

    gated = fastlinear.GatedLinear(4, 3).to(device)
    monkeypatch.setattr(nn.Linear, "__call__", noted, raising=False)
    gated(torch.randn(5, 4, device=device))
    assert seen == [gated.gate_proj, gated.up_proj]


def test_patched_forward_runs_no_more_once_it_is_undone(device: torch.device) -> None:
    layer, input = fastlinear.Linear(4, 3, device=device), torch.randn(5, 4, device=device)
    output = layer(input)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, input: input)
        assert layer(input) is input
    assert torch.equal(layer(input), output)


def test_patched_forward_takes_no_main_grad(patched: list[type], device: torch.device) -> None:
    layer = fastlinear.Linear(4, 3, device=device, accumulate_into_main_grad=True)
    with pytest.raises(RuntimeError, match="has been replaced on the class"):
        layer(torch.randn(5, 4, device=device))


# Subclasses with an activation of their own.


def dense(Linear: Any, first: bool) -> Any:
    class Dense(Linear):  # type: ignore[misc]
        def __init__(self, activation: Any) -> None:
            if first and not isinstance(activation, nn.Module):
                self.activation = activation
            super().__init__(4, 3)
            self.activation = activation

        def forward(self, input: Tensor) -> Tensor:
            act = self.activation
            output = super().forward(input)
            return act(output) if callable(act) else getattr(F, act)(output)

    return Dense


@pytest.mark.parametrize("first", [False, True], ids=["set after", "set before"])
@pytest.mark.parametrize(
    "activation", ["gelu", "hardtanh", F.gelu, nn.GELU(), nn.Softplus()], ids=str
)
def test_subclass_keeps_its_own_activation(
    activation: Any, first: bool, device: torch.device
) -> None:
    def deed(Linear: Any) -> Any:
        layer = dense(Linear, first)(activation).to(device)
        twin = copy.deepcopy(layer)
        assert repr(twin) == repr(layer)
        assert type(twin.activation) is type(activation)
        return called(twin, device), list(layer.state_dict())

    assert_same(deed)


def test_subclass_may_give_its_activation_to_the_constructor(device: torch.device) -> None:
    class Layer(fastlinear.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3, activation="relu")

    layer, input = Layer().to(device), torch.randn(5, 4, device=device)
    assert layer.activation == "relu"
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias).relu())
    layer.activation = "tanh"
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias).tanh())
    with pytest.raises(ValueError, match="activation must be None or one of"):
        layer.activation = F.relu


def test_activation_of_a_pickle_from_before() -> None:
    """Its place was the attribute `activation`."""
    layer = fastlinear.Linear(4, 3, activation="relu")
    before = copy.copy(layer)
    vars(before)["activation"] = vars(before).pop("_fastlinear_activation")
    loaded = pickle.loads(pickle.dumps(before))
    assert repr(loaded) == repr(layer)
    assert vars(loaded).keys() == vars(layer).keys()
