"""accelerate: its hooks replace a layer's forward on the instance."""

import copy

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from twins import Backend, in_float64

import fastlinear


class Double(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def two_layers(device: torch.device) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 9)).to(device)


def test_hook_on_a_converted_layer_runs(backend: Backend, device: torch.device) -> None:
    plain = two_layers(device)
    model, exact = copy.deepcopy(plain), in_float64(plain)
    fastlinear.convert(model)
    input = torch.randn(7, 20, device=device)
    results = []
    for one in (model, plain, exact):
        add_hook_to_module(one[0], Double())
        results.append({"output": one(input.to(one[0].weight.dtype))})
    backend.assert_equal(*results)

    assert fastlinear.revert(model).skipped == (
        ("0", "its forward was replaced since it was converted"),
    )
    assert type(model[0]) is fastlinear.Linear
    backend.assert_equal({"output": model(input)}, *results[1:])

    # The hook gone, the layer keeps what it had for forward, on the instance.
    for one in (model, plain, exact):
        remove_hook_from_module(one[0])
    backend.assert_equal(
        *({"output": one(input.to(one[0].weight.dtype))} for one in (model, plain, exact))
    )


def test_layer_with_a_hook_is_left_alone(device: torch.device) -> None:
    model = two_layers(device)
    add_hook_to_module(model[0], Double())
    input = torch.randn(7, 20, device=device)
    expected = model(input)
    report = fastlinear.convert(model)
    assert report.converted == ("1",)
    assert report.skipped == (
        ("0", "its forward is replaced on the instance, and would not be fastlinear's"),
    )
    assert torch.equal(model(input), expected)
