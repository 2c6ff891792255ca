"""The contract of `fastlinear.Linear`: what can be done with an `nn.Linear` comes to the same.

Each test does one thing with both. That is a comparison of values, errors, warnings, strides and
side effects; how exact values are, other files say. Here: making a layer, and the module."""

import contextlib
import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from contract import Deed, reloaded, runs
from oracle import DTYPES
from side_by_side import assert_same
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastlinear


def test_signature_is_nn_linear_s_and_more_by_keyword() -> None:
    def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(parameter.name, parameter.kind, parameter.default) for parameter in found]

    more = [
        ("activation", inspect.Parameter.KEYWORD_ONLY, None),
        ("accumulate_into_main_grad", inspect.Parameter.KEYWORD_ONLY, False),
    ]
    assert parameters(fastlinear.Linear) == [*parameters(nn.Linear), *more]
    assert parameters(fastlinear.Linear.forward) == parameters(nn.Linear.forward)
    assert issubclass(fastlinear.Linear, nn.Linear)
    assert fastlinear.Linear.__name__ == nn.Linear.__name__


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def made_within(context: contextlib.AbstractContextManager[Any], Linear: Any) -> nn.Linear:
    with context:
        return Linear(5, 3)


def without_values(layer: nn.Linear) -> Any:
    """What is known of a layer whose memory nobody has filled yet."""
    return (
        repr(layer),
        layer.training,
        [
            (name, type(parameter), parameter.shape, parameter.dtype, parameter.device)
            for name, parameter in layer.named_parameters()
        ],
    )


MADE: dict[str, Deed] = {
    "by position": lambda Linear: Linear(5, 3),
    "by position, all": lambda Linear: Linear(5, 3, True, "cpu", torch.float64),
    "by name": lambda Linear: Linear(
        in_features=5, out_features=3, bias=False, device="cpu", dtype=torch.float64
    ),
    "bias 0": lambda Linear: Linear(5, 3, 0),
    "one of each": lambda Linear: Linear(1, 1),
    "no in_features": lambda Linear: Linear(0, 3),
    "no out_features": lambda Linear: Linear(5, 0),
    "no features": lambda Linear: Linear(0, 0),
    "no features, no bias": lambda Linear: Linear(0, 0, False),
    "sizes of NumPy": lambda Linear: Linear(np.int64(5), np.int64(3)),
    "device object": lambda Linear: Linear(5, 3, device=torch.device("cpu")),
    "device meta": lambda Linear: Linear(5, 3, device="meta", dtype=torch.float16),
    "device meta, then empty": lambda Linear: without_values(
        Linear(5, 3, device="meta").to_empty(device="cpu")
    ),
    "skip_init": lambda Linear: without_values(nn.utils.skip_init(Linear, 5, 3, bias=False)),
    "within a device": lambda Linear: made_within(torch.device("meta"), Linear),
    "within a default dtype": lambda Linear: made_within(default_dtype(torch.float64), Linear),
    "within no_grad": lambda Linear: made_within(torch.no_grad(), Linear),
    "within inference_mode": lambda Linear: made_within(torch.inference_mode(), Linear),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_making_a_layer(make: Deed) -> None:
    assert_same(make)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_initial_values_of_a_seed(dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    raises = dtype == torch.float8_e5m2  # torch draws no random numbers of it
    assert_same(lambda Linear: Linear(50, 30, bias, device, dtype), raises)


NOT_MADE: dict[str, Deed] = {
    "no out_features": lambda Linear: Linear(5),
    "too many by position": lambda Linear: Linear(5, 3, True, None, None, "relu"),
    "unknown name": lambda Linear: Linear(5, 3, features=3),
    "negative size": lambda Linear: Linear(-1, 3),
    "fraction": lambda Linear: Linear(5.5, 3),
    "string": lambda Linear: Linear("5", 3),
    "unknown device": lambda Linear: Linear(5, 3, device="nowhere"),
    "integer dtype": lambda Linear: Linear(5, 3, dtype=torch.int64),
    "dtype by name": lambda Linear: Linear(5, 3, dtype="float32"),
    "skip_init of an unknown name": lambda Linear: nn.utils.skip_init(Linear, 5, 3, features=3),
}


@pytest.mark.parametrize("make", NOT_MADE.values(), ids=NOT_MADE)
def test_making_a_layer_fails(make: Deed) -> None:
    assert_same(make, raises=True)


def shared(layer: nn.Linear) -> Any:
    twin = copy.copy(layer)
    return twin, twin.weight is layer.weight, twin.bias is layer.bias


def not_shared(layer: nn.Linear) -> Any:
    twin = copy.deepcopy(layer)
    return twin, twin.weight is layer.weight, twin.weight.data_ptr() == layer.weight.data_ptr()


def through_a_vector(layer: nn.Linear) -> Any:
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(2 * vector, layer.parameters())
    return vector, layer


MODULE: dict[str, Deed] = {
    "repr": repr,
    "extra_repr": lambda layer: layer.extra_repr(),
    "attributes": lambda layer: (layer.in_features, layer.out_features, layer.training),
    "names": lambda layer: (
        [name for name, _ in layer.named_parameters()],
        [name for name, _ in layer.named_buffers()],
        [name for name, _ in layer.named_modules()],
        list(layer.children()),
    ),
    "state_dict": lambda layer: dict(layer.state_dict(prefix="fc.", keep_vars=True)),
    "get_parameter": lambda layer: layer.get_parameter("weight"),
    "eval": lambda layer: layer.eval(),
    "requires_grad_": lambda layer: layer.requires_grad_(False),
    "reset_parameters": lambda layer: layer.reset_parameters() or layer,
    "apply": lambda layer: layer.apply(lambda one: nn.init.zeros_(one.bias)),
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "double": lambda layer: layer.double(),
    "to a dtype": lambda layer: layer.to(torch.float64),
    "to a device": lambda layer: layer.to("meta"),
    "to a tensor": lambda layer: layer.to(torch.ones(1, dtype=torch.float16)),
    "to complex": lambda layer: layer.to(torch.complex64),
    "to_empty": lambda layer: without_values(layer.to_empty(device="meta")),
    "share_memory": lambda layer: layer.cpu().share_memory(),
    "bias to None": lambda layer: setattr(layer, "bias", None) or layer,
    "copy": shared,
    "deepcopy": not_shared,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "saved and loaded": lambda layer: reloaded(layer, weights_only=False),
    "state_dict saved and loaded": lambda layer: dict(
        reloaded(layer.state_dict(), weights_only=True)
    ),
    "parameters_to_vector": through_a_vector,
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("deed", MODULE.values(), ids=MODULE)
def test_module(deed: Deed, bias: bool, device: torch.device) -> None:
    raises = deed is MODULE["apply"] and not bias  # there is no bias to fill
    assert_same(lambda Linear: deed(Linear(5, 3, bias, device)), raises)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dicts_load_both_ways(bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    ours = fastlinear.Linear(5, 3, bias, device, dtype)
    theirs = nn.Linear(5, 3, bias, device, dtype)
    assert not torch.equal(ours.weight, theirs.weight)
    for source, target in ((ours, nn.Linear), (theirs, fastlinear.Linear)):
        loaded = target(5, 3, bias, device, dtype)
        loaded.load_state_dict(source.state_dict(), strict=True)
        assert list(loaded.state_dict()) == list(source.state_dict())
        for name, value in source.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


def fused(layer: nn.Linear) -> nn.Module:
    norm = nn.BatchNorm1d(3, device=layer.weight.device, dtype=layer.weight.dtype)
    return nn.utils.fuse_linear_bn_eval(layer.eval(), norm.eval())


UTILITIES: dict[str, Deed] = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "no longer parametrized": lambda layer: parametrize.remove_parametrizations(
        parametrizations.weight_norm(layer), "weight"
    ),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=4),
    "fuse_linear_bn_eval": fused,
}


@runs
@pytest.mark.parametrize("wrap", UTILITIES.values(), ids=UTILITIES)
def test_utilities_of_torch(wrap: Deed, device: torch.device) -> None:
    def deed(Linear: Any) -> Any:
        layer = wrap(Linear(5, 3, device=device, dtype=torch.float64))
        output = layer(torch.randn(4, 5).to(device, torch.float64))
        output.pow(2).sum().backward()
        return repr(layer), dict(layer.state_dict()), output, list(layer.parameters())

    assert_same(deed)
