"""The contract of `fastlinear.Linear`: values, strides, gradients and errors of `nn.Linear`."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from contract import LEADING, MASKS, Deed, forward_and_backward, loaded, masked, runs, x
from oracle import DTYPES
from side_by_side import assert_same
from torch import Tensor, nn

INPUTS: dict[str, Callable[[], Tensor]] = {
    "1-D": lambda: torch.randn(5),
    "2-D": lambda: torch.randn(4, 5),
    "3-D": lambda: torch.randn(2, 4, 5),
    "5-D": lambda: torch.randn(2, 1, 3, 2, 5),
    "one row": lambda: torch.randn(1, 5),
    "no rows": lambda: torch.randn(0, 5),
    "no rows, 3-D": lambda: torch.randn(2, 0, 5),
    "transposed": lambda: torch.randn(5, 4).t(),
    "permuted": lambda: torch.randn(4, 2, 5).transpose(0, 1),
    "rows expanded": lambda: torch.randn(5).expand(4, 5),
    "rows expanded, 3-D": lambda: torch.randn(4, 5).expand(2, 4, 5),
    "columns expanded": lambda: torch.randn(4, 1).expand(4, 5),
    "one number expanded": lambda: torch.randn(()).expand(2, 4, 5),
    "channels_last": lambda: torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last),
    "channels of channels_last": lambda: (
        torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    ),
    "every other row and column": lambda: torch.randn(8, 10)[::2, ::2],
    "every other element, 1-D": lambda: torch.randn(10)[::2],
}


@runs
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_output_and_its_strides(
    make: Callable[[], Tensor], bias: bool, device: torch.device
) -> None:
    def deed(Linear: Any) -> Any:
        layer = Linear(5, 3, bias, device)
        input = make().to(device)
        with torch.no_grad():
            without_gradients = layer(input)
        output = layer(input)
        assert output.is_contiguous()
        assert without_gradients.is_contiguous()
        return without_gradients, output, forward_and_backward(layer, input)

    assert_same(deed)


@runs
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("features", [(0, 3), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)], ids=str)
def test_no_features(
    leading: tuple[int, ...], features: tuple[int, int], bias: bool, device: torch.device
) -> None:
    def deed(Linear: Any) -> Any:
        layer = Linear(*features, bias, device)
        return forward_and_backward(layer, torch.randn(*leading, features[0])), layer

    assert_same(deed)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    assert_same(
        lambda Linear: forward_and_backward(Linear(5, 3, True, device, dtype), torch.randn(4, 5))
    )


@runs
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "".join("01"[needed] for needed in mask))
def test_changes_in_place_after_the_forward(
    mask: tuple[bool, bool, bool], leading: tuple[int, ...], device: torch.device
) -> None:
    """What is not saved for the backward may change; what is saved, autograd watches."""

    def deed(Linear: Any) -> Any:
        outcomes = []
        for changed in ("input", "weight", "bias", "output"):
            layer, input = masked(Linear, mask, leading, device)
            output = layer(input)
            operands = {"input": input, "output": output, **dict(layer.named_parameters())}
            with torch.no_grad():
                operands[changed].mul_(2)
            try:
                if output.requires_grad:
                    output.sum().backward()
            except RuntimeError as error:
                # What follows names the tensor that was saved: nn.Linear saves another view of it.
                outcomes.append(str(error).partition(":")[0])
            outcomes.append((output, input, layer.weight, layer.bias))
        return outcomes

    assert_same(deed)


@runs
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize(
    "change",
    [
        lambda output: output.relu_(),
        lambda output: output.add_(1).mul_(output.detach().clone()),
        lambda output: output.transpose_(0, -1),
        lambda output: output[..., :2].zero_() + output[..., :2],
        lambda output: output.detach().zero_() + output,
        lambda output: output.copy_(torch.ones_like(output)),
    ],
    ids=["relu_", "add_ and mul_", "transpose_", "part", "detached", "copy_"],
)
def test_output_may_change_in_place(
    change: Deed, leading: tuple[int, ...], device: torch.device
) -> None:
    def deed(Linear: Any) -> Any:
        layer, input = masked(Linear, (True, True, True), leading, device)
        output = change(layer(input))
        output.sum().backward()
        return output, input, layer

    assert_same(deed)


def called_after(layer: nn.Linear, change: Deed) -> Tensor:
    input = x(layer)
    change(layer)
    return layer(input)


def twice(layer: nn.Linear) -> None:
    output = layer(x(layer)).sum()
    output.backward()
    output.backward()


ERRORS: dict[str, Deed] = {
    "wrong in_features": lambda layer: layer(x(layer, 4, 6)),
    "wrong in_features, 1-D": lambda layer: layer(x(layer, 6)),
    "wrong in_features, 3-D": lambda layer: layer(x(layer, 2, 4, 6)),
    "no in_features": lambda layer: layer(x(layer, 4, 0)),
    "transposed": lambda layer: layer(x(layer, 5, 4)),
    "0-D": lambda layer: layer(x(layer).sum()),
    "float64": lambda layer: layer(x(layer, dtype=torch.float64)),
    "float16": lambda layer: layer(x(layer, dtype=torch.float16)),
    "int64": lambda layer: layer(x(layer, dtype=torch.int64)),
    "bool": lambda layer: layer(x(layer, dtype=torch.bool)),
    "complex64": lambda layer: layer(x(layer, dtype=torch.complex64)),
    "meta": lambda layer: layer(x(layer).to("meta")),
    "None": lambda layer: layer(None),
    "list": lambda layer: layer([1.0]),
    "number": lambda layer: layer(1.0),
    "array": lambda layer: layer(np.ones((4, 5), np.float32)),
    "no input": lambda layer: layer(),
    "two inputs": lambda layer: layer(x(layer), x(layer)),
    "unknown name": lambda layer: layer(inputs=x(layer)),
    "weight None": lambda layer: called_after(layer, lambda one: setattr(one, "weight", None)),
    "weight deleted": lambda layer: called_after(layer, lambda one: delattr(one, "weight")),
    "weight a tensor": lambda layer: setattr(layer, "weight", torch.ones(3, 5)),
    "weight 3-D": lambda layer: called_after(
        layer, lambda one: setattr(one, "weight", nn.Parameter(x(one, 2, 3, 5)))
    ),
    "weight float64": lambda layer: called_after(
        layer, lambda one: setattr(one, "weight", nn.Parameter(one.weight.double()))
    ),
    "bias float64": lambda layer: called_after(
        layer, lambda one: setattr(one, "bias", nn.Parameter(one.bias.double()))
    ),
    "bias too long": lambda layer: called_after(
        layer, lambda one: setattr(one, "bias", nn.Parameter(x(one, 4)))
    ),
    "no such attribute": lambda layer: layer.weights,
    "to an integer dtype": lambda layer: layer.to(torch.int64),
    "load without bias": lambda layer: loaded(layer, weight=torch.ones(3, 5)),
    "load an unknown name": lambda layer: loaded(
        layer, weight=torch.ones(3, 5), bias=torch.ones(3), activation=torch.ones(1)
    ),
    "load another size": lambda layer: loaded(layer, weight=torch.ones(3, 6), bias=torch.ones(3)),
    "to a device from meta": lambda layer: layer.to("meta").to("cpu"),
    "backward of no scalar": lambda layer: layer(x(layer)).backward(),
    "backward of another shape": lambda layer: layer(x(layer)).backward(x(layer)),
    "backward twice": twice,
    "backward of a frozen layer": lambda layer: (
        layer.requires_grad_(False)(x(layer)).sum().backward()
    ),
    "gradient of what was not used": lambda layer: torch.autograd.grad(
        layer(x(layer)).sum(), x(layer).requires_grad_()
    ),
    "output frozen": lambda layer: layer(x(layer)).requires_grad_(False),
    "output as an array": lambda layer: layer(x(layer)).numpy(),
    "output copied": lambda layer: copy.deepcopy(layer(x(layer))),
    "weight changed under autograd": lambda layer: layer.weight.add_(1),
}


# What nn.Linear raises for its bias alone.
ERRORS_OF_BIAS = ("meta", "bias float64", "load without bias")


@runs
@pytest.mark.parametrize(
    ("deed", "bias"),
    [
        pytest.param(deed, bias, id=f"{name}, {'bias' if bias else 'no bias'}")
        for name, deed in ERRORS.items()
        for bias in (True, False)
        if bias or name not in ERRORS_OF_BIAS
    ],
)
def test_errors(deed: Deed, bias: bool, device: torch.device) -> None:
    assert_same(lambda Linear: deed(Linear(5, 3, bias, device)), raises=True)
