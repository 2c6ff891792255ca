"""Tools that trace a layer or a function: torch.fx, TorchScript, ONNX."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_use import by_pytorch, every_layer
from torch import Tensor, nn

import fastlinear

pytestmark = pytest.mark.usefixtures("backend")


# Tools that trace.


def linear_of(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fastlinear.linear(input, weight[0], bias[0], "gelu")


def batched_of(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fastlinear.batched_linear(input, weight, bias)


def gated_of(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fastlinear.gated_linear(input, weight[0], weight[1], bias[0], None)


@pytest.mark.parametrize("function", [linear_of, batched_of, gated_of])
def test_function_is_traced_by_fx(function: Any, device: torch.device) -> None:
    traced = torch.fx.symbolic_trace(function)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert {fastlinear.linear, fastlinear.batched_linear, fastlinear.gated_linear} & {*called}
    operands = [torch.randn(shape, device=device) for shape in ((2, 5, 4), (2, 3, 4), (2, 3))]
    torch.testing.assert_close(traced(*operands), function(*operands))


torchs_own = "ignore:The TorchScript type system doesn't support"  # of torch.fx's GraphModule


@pytest.mark.filterwarnings(torchs_own)
@pytest.mark.parametrize("function", [linear_of, batched_of, gated_of])
def test_function_is_traced_and_scripted_by_torchscript(
    function: Any, device: torch.device
) -> None:
    operands = [torch.randn(shape, device=device) for shape in ((2, 5, 4), (2, 3, 4), (2, 3))]
    for compiled in (
        torch.jit.script(function),
        torch.jit.trace(function, operands),
        torch.jit.script(torch.fx.symbolic_trace(function)),
    ):
        torch.testing.assert_close(compiled(*operands), function(*operands))


@pytest.mark.filterwarnings(torchs_own)
@every_layer
def test_layer_is_scripted_after_fx(make: Callable[[], nn.Module], device: torch.device) -> None:
    """As those that optimize a model before they script it do."""
    layer = make().to(device).eval()
    input = torch.randn(2, 5, 4, device=device)
    for scripted in (
        torch.jit.script(layer),
        torch.jit.freeze(torch.jit.script(layer)),
        torch.jit.script(torch.fx.symbolic_trace(layer)),
    ):
        torch.testing.assert_close(scripted(input), by_pytorch(layer)(input))


def test_layer_into_main_grad_is_traced_by_fx(device: torch.device) -> None:
    layer = fastlinear.Linear(4, 3, device=device, accumulate_into_main_grad=True)
    layer.weight.main_grad = torch.zeros(3, 4, device=device)
    traced = torch.fx.symbolic_trace(layer)
    traced(torch.ones(5, 4, device=device)).sum().backward()
    assert (layer.weight.main_grad == 5).all()


class Symbol:
    """What only stands for a tensor, and knows PyTorch's functions alone."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any, named: Any = None
    ) -> Any:
        return "F.linear" if function is F.linear else NotImplemented


def test_what_stands_for_a_tensor_gets_what_nn_linear_gives(backend: str) -> None:
    layer = fastlinear.Linear(4, 3)
    if backend == "triton":
        with pytest.raises(TypeError, match="no implementation found"):
            layer(Symbol())
    else:
        assert layer(Symbol()) == nn.Linear(4, 3)(Symbol()) == "F.linear"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the older exporter
@every_layer
def test_export_to_onnx_is_refused_in_a_sentence(
    make: Callable[[], nn.Module], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, input = make().eval(), torch.randn(2, 5, 4)
    said = r"export within `with fastlinear.use_backend\('torch'\):`"
    if backend == "auto":
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        torch.export.export(layer, (input,))  # what torch.onnx.export does first
        return
    with pytest.raises(RuntimeError, match=said):
        torch.onnx.export(layer, (input,), io.BytesIO(), dynamo=False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for strict in (False, True):
        with pytest.raises(Exception, match=said):
            torch.export.export(layer, (input,), strict=strict)
