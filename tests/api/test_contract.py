"""The contract of `fastlinear.Linear`: what can be done with an `nn.Linear` comes to the same.

Each test does one thing with both. That is a comparison of values, errors, warnings, strides and
side effects; how exact values are, the tests of the kernels say.
"""

import contextlib
import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES
from side_by_side import assert_same
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import fastlinear
from fastlinear.ops.elementwise import ACTIVATIONS

# forward runs; the other tests are about the module alone, which no backend changes
runs = pytest.mark.usefixtures("backend")

Deed = Callable[[Any], Any]


# The layer before its first input.


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


# The layer as a module.


def reloaded(thing: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


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


# Inputs, outputs and gradients.


def forward_and_backward(layer: nn.Module, input: Tensor) -> Any:
    input = input.to(next(layer.parameters())).detach().requires_grad_()
    output = layer(input)
    output.backward(torch.randn(output.shape).to(output))
    return output, input.grad, list(layer.parameters())


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


MASKS = list(itertools.product([False, True], repeat=3))
LEADING = {"1-D": (), "2-D": (4,), "3-D": (2, 3), "no rows": (0,), "no rows, 3-D": (2, 0)}


def masked(
    Linear: Any, mask: tuple[bool, bool, bool], leading: tuple[int, ...], device: torch.device
) -> tuple[nn.Linear, Tensor]:
    """A layer and an input, of which those require gradients that (input, weight, bias) says."""
    layer = Linear(5, 3, device=device)
    layer.weight.requires_grad_(mask[1])
    layer.bias.requires_grad_(mask[2])
    return layer, torch.randn(*leading, 5).to(device).requires_grad_(mask[0])


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


# Errors.


def x(layer: nn.Linear, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape or (4, 5)).to(layer.weight.device, dtype or layer.weight.dtype)


def called_after(layer: nn.Linear, change: Deed) -> Tensor:
    input = x(layer)
    change(layer)
    return layer(input)


def loaded(layer: nn.Linear, **tensors: Tensor) -> Any:
    return layer.load_state_dict(tensors)


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


# Modes.


def inference(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


def fresh(layer: nn.Linear) -> nn.Linear:
    return type(layer)(5, 3, device=layer.weight.device)


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


# Hooks.


class Log:
    """What hooks were called with, in order; the layer itself as its name."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __call__(self, name: str, answer: Any = None) -> Callable[..., Any]:
        def hook(*arguments: Any) -> Any:
            self.events.append((name, self.seen(arguments)))
            return answer(*arguments) if callable(answer) else answer

        return hook

    def seen(self, thing: Any) -> Any:
        """`thing` as it is now: what follows may change it in place."""
        if isinstance(thing, nn.Module):
            return thing._get_name()
        if isinstance(thing, Tensor):
            return thing.detach().clone()
        if isinstance(thing, dict):
            return {name: self.seen(value) for name, value in thing.items()}
        if isinstance(thing, (list, tuple)):
            return [self.seen(value) for value in thing]
        return thing


def with_module_hooks(layer: nn.Linear, input: Tensor) -> Any:
    log = Log()
    layer.register_forward_pre_hook(log("forward_pre"))
    layer.register_forward_pre_hook(
        log("forward_pre, changing", lambda module, args, kwargs: ((args[0] * 2,), kwargs)),
        with_kwargs=True,
    )
    layer.register_forward_pre_hook(log("forward_pre, prepended"), prepend=True)
    layer.register_forward_hook(log("forward", lambda module, args, output: output * 3))
    layer.register_forward_hook(log("forward, with kwargs"), with_kwargs=True, prepend=True)
    layer.register_forward_hook(log("forward, always"), always_call=True)
    layer.register_full_backward_pre_hook(
        log("full_backward_pre", lambda module, grad_output: (grad_output[0] * 2,))
    )
    layer.register_full_backward_hook(log("full_backward"))
    output = layer(input)
    output.sum().backward()
    return log.events, output, input.grad, layer.weight.grad, layer.bias.grad


def with_full_backward_hook_changing(layer: nn.Linear, input: Tensor) -> Any:
    log = Log()
    layer.register_full_backward_hook(
        log(
            "full_backward",
            lambda module, grad_input, grad_output: [
                None if gradient is None else gradient * 2 for gradient in grad_input
            ],
        )
    )
    layer(input).sum().backward()
    return log.events, input.grad, layer.weight.grad


def with_state_dict_hooks(layer: nn.Linear, input: Tensor) -> Any:
    log = Log()
    layer.register_state_dict_pre_hook(log("state_dict_pre"))
    layer.register_state_dict_post_hook(log("state_dict_post"))
    layer._register_state_dict_hook(log("state_dict"))
    layer.register_load_state_dict_pre_hook(log("load_state_dict_pre"))
    layer.register_load_state_dict_post_hook(log("load_state_dict_post"))
    layer.load_state_dict(layer.state_dict())
    return log.events


def with_global_hooks(layer: nn.Linear, input: Tensor) -> Any:
    log = Log()
    register = {
        "forward_pre": global_hooks.register_module_forward_pre_hook,
        "forward": global_hooks.register_module_forward_hook,
        "full_backward_pre": global_hooks.register_module_full_backward_pre_hook,
        "full_backward": global_hooks.register_module_full_backward_hook,
        "registration of a module": global_hooks.register_module_module_registration_hook,
        "registration of a parameter": global_hooks.register_module_parameter_registration_hook,
    }
    handles = [function(log(name)) for name, function in register.items()]
    try:
        layer(input).sum().backward()
        nn.Sequential(fresh(layer))
    finally:
        for handle in handles:
            handle.remove()
    return [
        # Before they are filled, parameters hold whatever the memory held.
        (name, [seen if isinstance(seen, str) else None for seen in arguments])
        if name.startswith("registration")
        else (name, arguments)
        for name, arguments in log.events
    ]


HOOKS = {
    "of the module": with_module_hooks,
    "that change the gradient": with_full_backward_hook_changing,
    "of the state_dict": with_state_dict_hooks,
    "of every module": with_global_hooks,
}


@runs
@pytest.mark.parametrize("needed", [True, False], ids=["input's gradient", "not the input's"])
@pytest.mark.parametrize("deed", HOOKS.values(), ids=HOOKS)
def test_hooks(deed: Callable[..., Any], needed: bool, device: torch.device) -> None:
    def hooked(Linear: Any) -> Any:
        layer = Linear(5, 3, device=device)
        return deed(layer, x(layer).requires_grad_(needed))

    # There is no gradient to change then, and torch says so.
    assert_same(hooked, raises=deed is HOOKS["that change the gradient"] and not needed)


# TorchScript, which torch deprecates and still has.


def scripted(layer: nn.Linear) -> nn.Module:
    return torch.jit.script(layer)


def traced(layer: nn.Linear) -> nn.Module:
    return torch.jit.trace(layer, x(layer))


def saved_and_loaded(module: Any) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


SCRIPTS: dict[str, Deed] = {
    "script": scripted,
    "script, within a model": lambda layer: torch.jit.script(nn.Sequential(layer, nn.ReLU())),
    "script, saved and loaded": lambda layer: saved_and_loaded(scripted(layer)),
    "trace": traced,
    "trace, frozen": lambda layer: torch.jit.freeze(torch.jit.trace(layer.eval(), x(layer))),
    "trace, saved and loaded": lambda layer: saved_and_loaded(traced(layer)),
}


@runs
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("compiled", SCRIPTS.values(), ids=SCRIPTS)
def test_torchscript(compiled: Deed, bias: bool, device: torch.device) -> None:
    def deed(Linear: Any) -> Any:
        module = compiled(Linear(5, 3, bias, device))
        input = torch.randn(4, 5).to(device).requires_grad_()
        output = module(input)
        output.pow(2).sum().backward()
        return output, input, list(module.parameters())

    assert_same(deed)


# Activations, the one thing that nn.Linear does not have.

FUNCTIONS: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "leaky_relu": nn.LeakyReLU(),
    "relu_squared": lambda output: torch.where(output > 0, output * output, 0),
}


def test_activation_names() -> None:
    assert list(FUNCTIONS) == list(ACTIVATIONS)


@runs
@pytest.mark.parametrize("leading", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activation_is_torch_s_function(
    activation: str, leading: tuple[int, ...], device: torch.device
) -> None:
    def deed(Linear: Any) -> Any:
        options = {"activation": activation} if Linear is fastlinear.Linear else {}
        layer = Linear(5, 3, device=device, dtype=torch.float64, **options)
        function = FUNCTIONS[activation] if Linear is nn.Linear else lambda output: output
        input = x(layer, *leading, 5).mul_(3).requires_grad_()
        output = function(layer(input))
        gradients = torch.autograd.grad(
            output.pow(2).sum(), (input, *layer.parameters()), create_graph=True
        )
        second = torch.autograd.grad(gradients[1].pow(2).sum(), (input, layer.weight))
        second = [gradient.contiguous() for gradient in second]
        return output, gradients, second

    assert_same(deed)


@pytest.mark.parametrize(
    "activation",
    ["softmax", "ReLU", "", F.relu, nn.ReLU(), True, 0, ["relu"]],
    ids=["unknown", "upper case", "empty", "function", "module", "True", "0", "list"],
)
def test_activation_of_another_name_says_which_there_are(activation: Any) -> None:
    said = (
        "activation must be None or one of 'relu', 'gelu', 'gelu_tanh', 'silu', 'sigmoid', "
        "'tanh', 'leaky_relu', 'relu_squared', but is "
    )
    with pytest.raises(ValueError, match=said) as from_layer:
        fastlinear.Linear(5, 3, activation=activation)
    with pytest.raises(ValueError, match=said) as from_function:
        fastlinear.linear(torch.ones(4, 5), torch.ones(3, 5), activation=activation)
    assert str(from_layer.value) == str(from_function.value) == said + repr(activation)


def test_activation_stays_with_the_layer() -> None:
    layer = fastlinear.Linear(5, 3, activation="relu")
    said = "Linear(in_features=5, out_features=3, bias=True, activation='relu')"
    skipped = nn.utils.skip_init(fastlinear.Linear, 5, 3, activation="relu")
    for twin in (
        layer,
        copy.copy(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        reloaded(layer, weights_only=False),
        layer.double(),
        skipped,
    ):
        assert repr(twin) == said
        assert list(twin.state_dict()) == ["weight", "bias"]
    assert "activation" not in repr(fastlinear.Linear(5, 3, activation=None))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activation_is_scripted(activation: str | None) -> None:
    layer, input = fastlinear.Linear(5, 3, activation=activation), torch.randn(4, 5)
    output = F.linear(input, layer.weight, layer.bias)
    expected = output if activation is None else ACTIVATIONS[activation](output)
    torch.testing.assert_close(torch.jit.script(layer)(input), expected)


@pytest.mark.parametrize("activation", ["swish", nn.ReLU(), F.relu], ids=["name", "module", "call"])
def test_activation_is_checked_when_it_is_set(activation: object) -> None:
    layer = fastlinear.Linear(3, 4, activation="relu")
    with pytest.raises(ValueError, match="activation must be None or one of 'relu'"):
        layer.activation = activation
    assert layer.activation == "relu"
