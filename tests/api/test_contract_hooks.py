"""The contract of `fastlinear.Linear`: hooks, TorchScript, and what `nn.Linear` has not."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import Deed, fresh, reloaded, runs, x
from side_by_side import assert_same
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

import fastlinear
from fastlinear.ops.elementwise import ACTIVATIONS


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
