"""`GatedLinear`, and what a gated pair does not take."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gated import Function, operands, reference
from oracle import (
    normal,
)
from torch import Tensor, nn

import fastlinear
from fastlinear.ops.gated import gated_linear_op

pytestmark = pytest.mark.usefixtures("triton_backend")


# What cannot be taken.


def test_gated_activation_is_one_of_those_that_there_are(device: torch.device) -> None:
    said = r"activation must be one of 'relu', .* but is 'softmax'"
    inputs = operands(device)
    with pytest.raises(ValueError, match=said):
        fastlinear.gated_linear(*inputs, "softmax")
    with pytest.raises(ValueError, match=said):
        fastlinear.GatedLinear(5, 3, activation="softmax")
    with pytest.raises(ValueError, match="but is None"):
        fastlinear.GatedLinear(5, 3).activation = None
    with pytest.raises(ValueError, match=said):
        gated_linear_op(*inputs, "softmax")


def W(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD = {
    "gate's in_features": (W(2, 5), W(3, 4), W(3, 5)),
    "up's in_features": (W(2, 5), W(3, 5), W(3, 4)),
    "gate_bias": (W(2, 5), W(3, 5), W(3, 5), W(4)),
    "up's dtype": (W(2, 5), W(3, 5), W(3, 5, dtype=torch.float64)),
    "no tensor": (None, W(3, 5), W(3, 5)),
    "3-D weight": (W(2, 5), W(1, 3, 5), W(1, 3, 5)),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_gated_bad_arguments_raise_what_pytorch_raises(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((RuntimeError, TypeError)) as expected:
        reference(*arguments)
    for backend in ("auto", "triton"):
        with fastlinear.use_backend(backend), pytest.raises(expected.type) as raised:
            fastlinear.gated_linear(*arguments)
        assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("features", [(3, 1), (3, 4)], ids=["one would broadcast", "others"])
def test_gated_weights_of_other_features_are_named(backend: str, features: tuple[int, int]) -> None:
    gate, up = (W(size, 5) for size in features)
    said = rf"same out_features, but gate_weight is \(3, 5\) and up_weight \({features[1]}, 5\)"
    with fastlinear.use_backend(backend), pytest.raises(RuntimeError, match=said):
        fastlinear.gated_linear(W(2, 5), gate, up)


def test_gated_complex_is_pytorch_s_alone(device: torch.device) -> None:
    inputs = [W(*shape, dtype=torch.complex64).to(device) for shape in ((2, 5), (3, 5), (3, 5))]
    with pytest.raises(TypeError, match=r"takes float16, .* but input is .*complex"):
        fastlinear.gated_linear(*inputs, activation="sigmoid")
    with fastlinear.use_backend("auto"):
        output = fastlinear.gated_linear(*inputs, activation="sigmoid")
    torch.testing.assert_close(output, reference(*inputs, activation="sigmoid"))


def test_gated_bias_of_one_number_is_expanded(device: torch.device) -> None:
    input, gate, up, _, up_bias = operands(device)
    one = normal((1,), torch.float64, device)
    torch.testing.assert_close(
        fastlinear.gated_linear(input, gate, up, one, up_bias),
        reference(input, gate, up, one, up_bias),
    )


# The module.


class PlainPair(nn.Module):
    """A gated pair as models write it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(5, 3, bias=bias)
        self.up_proj = nn.Linear(5, 3, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(self.gate_proj(input)) * self.up_proj(input)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gated_module_is_the_pair_that_models_write(bias: bool, seed: int) -> None:
    plain = PlainPair(bias)
    torch.manual_seed(seed)
    ours = fastlinear.GatedLinear(5, 3, bias=bias)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    input = torch.randn(4, 5)
    torch.testing.assert_close(ours(input), plain(input))


def test_gated_module_starts_as_two_layers_made_one_after_another(seed: int) -> None:
    torch.manual_seed(seed)
    plain = PlainPair()
    torch.manual_seed(seed)
    ours = fastlinear.GatedLinear(5, 3)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gated_module_says_what_it_is() -> None:
    layer = fastlinear.GatedLinear(5, 3, bias=False, activation="gelu", device="meta")
    assert str(layer) == (
        "GatedLinear(\n"
        "  activation='gelu'\n"
        "  (gate_proj): Linear(in_features=5, out_features=3, bias=False)\n"
        "  (up_proj): Linear(in_features=5, out_features=3, bias=False)\n"
        ")"
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_gated_module_copied_is_the_same(duplicate: Function) -> None:
    layer = fastlinear.GatedLinear(5, 3, activation="gelu")
    twin, input = duplicate(layer), torch.randn(4, 5)
    assert torch.equal(twin(input), layer(input))
    assert twin.activation == "gelu"


class Adapted(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + 1


def with_hook(layer: fastlinear.GatedLinear) -> None:
    layer.up_proj.register_forward_hook(lambda module, inputs, output: output + 1)


def with_adapter(layer: fastlinear.GatedLinear) -> None:
    layer.up_proj = Adapted(layer.up_proj)


def with_forward(layer: fastlinear.GatedLinear) -> None:
    plain = layer.up_proj.forward
    layer.up_proj.forward = lambda input: plain(input) + 1  # type: ignore[method-assign]


def with_parametrization(layer: fastlinear.GatedLinear) -> None:
    class Plus(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return bias + 1

    nn.utils.parametrize.register_parametrization(layer.up_proj, "bias", Plus())


@pytest.mark.parametrize("change", [with_hook, with_adapter, with_forward, with_parametrization])
def test_gated_module_calls_what_its_layers_have_become(change: Function) -> None:
    layer = fastlinear.GatedLinear(5, 3)
    input = torch.randn(4, 5)
    expected = F.silu(layer.gate_proj(input)) * (layer.up_proj(input) + 1)
    change(layer)
    torch.testing.assert_close(layer(input), expected)


def test_gated_module_of_layers_with_activations_applies_them() -> None:
    layer = fastlinear.GatedLinear(5, 3)
    layer.up_proj.activation = "relu"
    input = torch.randn(4, 5)
    expected = F.silu(layer.gate_proj(input)) * layer.up_proj(input)
    torch.testing.assert_close(layer(input), expected)
    assert (layer(input) == 0).any() or (layer.up_proj(input) > 0).all()


def test_gated_module_under_symbolic_trace_is_one_call() -> None:
    layer = fastlinear.GatedLinear(5, 3)
    traced = torch.fx.symbolic_trace(layer)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [fastlinear.gated_linear]
    input = torch.randn(4, 5)
    assert torch.equal(traced(input), layer(input))
