"""`convert(model, fold_activations=True)`: which activations layers take over, and what stays."""

import contextlib
import copy
import operator
import os
import pickle
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastlinear
from fastlinear import convert, revert
from fastlinear.fold import Folded

runs = pytest.mark.usefixtures("backend")


def fold(model: nn.Module, **options: Any) -> fastlinear.Report:
    return convert(model, fold_activations=True, **options)


def result(model: nn.Module, input: Tensor) -> list[Tensor]:
    """The output and every gradient; the same numbers are dropped every time."""
    model.zero_grad()
    torch.manual_seed(0)
    input = input.detach().requires_grad_()
    output = model(input)
    output.pow(2).sum().backward()
    return [output, input.grad, *(parameter.grad for parameter in model.parameters())]


def state(model: nn.Module) -> list[tuple[int, str, list[str]]]:
    """Each module, its class and attributes; a parametrized one's class is always a new one."""
    return [(id(module), type(module).__name__, [*vars(module)]) for module in model.modules()]


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 5), act or nn.ReLU(), nn.Linear(5, 5, bias=False))


class Net(nn.Module):
    """Calls `way` as its forward: what is below are the ways."""

    def __init__(self, way: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(5, 5), nn.Linear(5, 5), act or nn.SiLU()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(5))
        self.way = way

    def forward(self, input: Tensor, mask: Any = None) -> Tensor:
        return self.way(self, input, mask)


class Untraceable(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, input: Tensor) -> Tensor:
        for part in self.parts:
            input = part(input if input.sum() > 0 else 2 * input)
        return input


def net(way: Callable[..., Tensor], act: nn.Module | None = None) -> Callable[[], nn.Module]:
    return lambda: Net(way, act)


def shared(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), act, nn.Linear(4, 5), act)


def no_grad(net: Net, input: Tensor, mask: Any) -> Tensor:
    hidden = net.fc1(input)
    with torch.no_grad():
        gate = net.act(hidden)
    return gate * net.fc2(input)


def keeps(net: Net, input: Tensor, mask: Any) -> Tensor:
    net.hidden = net.fc1(input)
    return net.fc2(net.act(net.hidden))


def early(net: Net, input: Tensor, mask: Any) -> Tensor:
    hidden = net.fc1(input)
    return hidden if mask is None else net.act(hidden)


def hooked(index: int, register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = mlp()
        getattr(model[index], register)(lambda *arguments: None)
        return model

    return make


def container_with_a_hook() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5)), nn.ReLU())
    model[0].register_forward_hook(lambda *arguments: None)
    return model


def with_a_forward(index: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = mlp()
        model[index].forward = model[index].forward
        return model

    return make


def in_two_parts(index: int) -> nn.Module:
    model = Untraceable(mlp(), mlp())
    model.parts[1][index] = model.parts[0][index]
    return model


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.act = nn.ModuleList(blocks), nn.Tanh()

    def forward(self, input: Tensor) -> Tensor:
        for block in self.blocks:
            input = self.act(block(input))
        return input


def within_no_grad(net: Net, input: Tensor, mask: Any) -> Tensor:
    with torch.no_grad():
        input = net.act(net.fc1(input))
    return net.fc2(input)


FC1 = [("fc1", "act", "silu")]
STACKED = [
    (f"blocks.{block}.{layer}", act or f"blocks.{block}.1", "tanh" if act else "relu")
    for block in (0, 1)
    for layer, act in ((0, ""), (2, "act"))
]
FOLDED: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str, str]]]] = {
    "Sequential": (mlp, [("0", "1", "relu")]),
    "in place": (lambda: mlp(nn.ReLU(inplace=True)), [("0", "1", "relu")]),
    "gelu": (lambda: mlp(nn.GELU()), [("0", "1", "gelu")]),
    "gelu_tanh": (lambda: mlp(nn.GELU("tanh")), [("0", "1", "gelu_tanh")]),
    "sigmoid": (lambda: mlp(nn.Sigmoid()), [("0", "1", "sigmoid")]),
    "tanh": (lambda: mlp(nn.Tanh()), [("0", "1", "tanh")]),
    "leaky_relu": (lambda: mlp(nn.LeakyReLU(inplace=True)), [("0", "1", "leaky_relu")]),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 5)), nn.Sequential(nn.Tanh(), mlp())),
        [("0.0", "1.0", "tanh"), ("1.1.0", "1.1.1", "relu")],
    ),
    "forward": (net(lambda net, x, mask: net.fc2(net.act(net.fc1(x)))), FC1),
    "residual": (net(lambda net, x, mask: x + net.act(net.fc1(x)) * net.fc2(x)), FC1),
    "buffer": (net(lambda net, x, mask: net.act(net.fc1(x * net.scale[: x.size(1)]))), FC1),
    "optional": (net(lambda net, x, mask: net.act(net.fc1(x if mask is None else mask))), FC1),
    "called twice": (net(lambda net, x, mask: net.act(net.fc1(net.act(net.fc1(x))))), FC1),
    "shared activation": (
        lambda: shared(nn.ReLU(inplace=True)),
        [("0", "1", "relu"), ("2", "1", "relu")],
    ),
    "in an untraceable model": (lambda: Untraceable(mlp()), [("parts.0.0", "parts.0.1", "relu")]),
    "one block twice": (
        lambda: Untraceable(block := mlp(), block),
        [("parts.0.0", "parts.0.1", "relu")],
    ),
    "a loop over its modules": (lambda: Stack(mlp(), mlp()), STACKED),
    "one mode around both": (net(within_no_grad), FC1),
    "dropout after": (net(lambda net, x, mask: net.drop(net.act(net.fc1(x)))), FC1),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 5)), nn.ReLU()),
        [("0", "1", "relu")],
    ),
    "pruned": (  # by a hook that sees the input alone
        lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(5, 5), "weight", 4), nn.ReLU()),
        [("0", "1", "relu")],
    ),
    "fastlinear's own": (
        lambda: nn.Sequential(fastlinear.Linear(5, 5), nn.ReLU()),
        [("0", "1", "relu")],
    ),
}


@runs
@pytest.mark.parametrize(("make", "pairs"), FOLDED.values(), ids=FOLDED)
def test_folded_models_compute_what_they_did(
    make: Callable[[], nn.Module], pairs: list[tuple[str, str, str]], device: torch.device
) -> None:
    model = make().to(device, torch.float64)
    input = torch.randn(4, 5, dtype=torch.float64).to(device)
    expected = [result(model.train(training), input) for training in (True, False)]
    shown, before, keys = repr(model), state(model), list(model.state_dict())
    report = fold(model)
    assert report.folded == tuple(pairs)
    assert report.skipped == ()
    for layer, act, activation in pairs:
        assert model.get_submodule(layer).activation == activation
        assert type(model.get_submodule(act)) is Folded
    assert list(model.state_dict()) == keys
    for training, values in zip((True, False), expected, strict=True):
        torch.testing.assert_close(result(model.train(training), input), values)
    report = revert(model)
    assert report.folded == tuple(pairs)
    assert repr(model) == shown
    assert state(model) == before
    torch.testing.assert_close(result(model, input), expected[1])


READER, FUNCTION = "the layer's output has another reader", "it is a function call, which stays"
HOOKS, APART = "it or the layer has hooks", "it or the layer is in several modules that are traced"
KEPT: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "residual": (
        net(lambda net, x, mask: (h := net.fc1(x)) + net.act(h)),
        {"fc1": READER},
    ),
    "output": (net(lambda net, x, mask: (h := net.fc1(x), net.act(h))), {"fc1": READER}),
    "shape": (net(lambda net, x, mask: net.act(h := net.fc1(x)).view(h.shape)), {"fc1": READER}),
    "layer called twice": (
        net(lambda net, x, mask: net.act(net.fc1(net.fc1(x)))),
        {"fc1": READER},
    ),
    "mask": (net(early), {"fc1": READER}),
    "kept": (net(keeps), {"fc1": "the forward keeps the layer's output"}),
    "no_grad": (net(no_grad), {"fc1": "one of it and the layer is called under no_grad"}),
    "activation also on the input": (
        net(lambda net, x, mask: net.act(net.fc2(net.act(net.fc1(net.act(x)))))),
        dict.fromkeys(["fc1", "fc2"], "it also follows something that cannot apply it"),
    ),
    "function": (net(lambda net, x, mask: F.relu(net.fc1(x))), {"fc1": FUNCTION}),
    "method": (net(lambda net, x, mask: net.fc1(x).tanh_()), {"fc1": FUNCTION}),
    "forward called directly": (
        net(lambda net, x, mask: net.act(net.fc1(net.fc1.forward(x)))),
        dict.fromkeys(["fc1", "fc2"], "torch.fx cannot trace Net (RuntimeError)"),
    ),
    "untraceable": (
        net(lambda net, x, mask: net.act(net.fc1(x)) if x.sum() > 0 else x),
        dict.fromkeys(["fc1", "fc2"], "torch.fx cannot trace Net (TraceError)"),
    ),
    "slope": (lambda: mlp(nn.LeakyReLU(0.2)), {"0": "its slope is 0.2, and leaky_relu's is 0.01"}),
    "forward of the activation": (with_a_forward(1), {"0": HOOKS}),
    **{
        f"{register}, {('layer', 'activation')[index]}": (hooked(index, register), {"0": HOOKS})
        for index, register in (
            (0, "register_forward_hook"),
            (0, "register_full_backward_hook"),
            (0, "register_full_backward_pre_hook"),
            (1, "register_forward_hook"),
            (1, "register_forward_pre_hook"),
        )
    },
    "hook around the layer": (container_with_a_hook, {}),
    "another module between": (lambda: nn.Sequential(nn.Linear(5, 5), nn.Dropout(), nn.ReLU()), {}),
    "layer in two parts": (lambda: in_two_parts(0), {"parts.0.0": APART}),
    "activation in two parts": (
        lambda: in_two_parts(1),
        dict.fromkeys(["parts.0.0", "parts.1.0"], APART),
    ),
    "activation of an untraceable model": (
        lambda: Untraceable(act := nn.ReLU(), mlp(act)),
        {"parts.1.0": APART},
    ),
}


@pytest.mark.parametrize(("make", "reasons"), KEPT.values(), ids=KEPT)
def test_what_is_not_folded_is_reported_with_the_reason(
    make: Callable[[], nn.Module], reasons: dict[str, str]
) -> None:
    model = make()
    report = fold(model)
    assert report.folded == ()
    assert not any(isinstance(module, Folded) for module in model.modules())
    assert [name for name, _ in report.skipped] == list(reasons)
    for name, reason in report.skipped:
        assert reason.startswith(f"activation not folded: {reasons[name]}")


# What a trace does not show: that a forward may go another way the next time.

FLAG, FLAGS, ORDER = True, SimpleNamespace(flag=True, none=None, order=(1, 2)), [1, 2]


def helped(net: Net, hidden: Tensor) -> Tensor:
    return net.act(hidden) if random.random() < 2 else hidden


def dropped(net: Net, x: Tensor, mask: Any) -> Tensor:
    hidden = net.fc1(x)
    if torch.rand(()) < 0.5:
        hidden = net.act(hidden)
    return net.fc2(hidden)


def counted(net: Net, x: Tensor, mask: Any) -> Tensor:
    net.count = net.count + 1
    return net.fc2(net.act(net.fc1(x)) if net.count % 2 else net.fc1(x))


def tried(net: Net, x: Tensor, mask: Any) -> Tensor:
    hidden = net.fc1(x)
    try:
        _ = 1 / round(random.random() + 1)
        return net.act(hidden)
    except ZeroDivisionError:
        return hidden


def suppressed(net: Net, x: Tensor, mask: Any) -> Tensor:
    hidden = net.fc1(x)
    with contextlib.suppress(ZeroDivisionError):
        _ = 1 / round(random.random() + 1)
        hidden = net.act(hidden)
    return hidden


def looped(net: Net, x: Tensor, mask: Any) -> Tensor:
    for _ in range(FLAG):
        x = net.act(net.fc1(x))
    return x


def iterated(net: Net, x: Tensor, mask: Any) -> Tensor:
    for _ in FLAGS.order:
        x = net.act(net.fc1(x))
    return x


def stopped(net: Net, x: Tensor, mask: Any) -> Tensor:
    x = net.fc1(x)
    while time.time() < 0:
        x = net.act(x)
    return net.act(x)


def asked(net: Net, x: Tensor, mask: Any, setting: Any = None) -> Tensor:
    return net.act(net.fc1(x)) if setting is None else net.fc1(x)


def assigned(net: Net, x: Tensor, mask: Any) -> Tensor:
    mask = FLAGS.none
    return net.act(net.fc1(x)) if mask is None else net.fc1(x)


DECIDE: dict[str, Callable[..., Any]] = {
    "torch.rand": dropped,
    "random": lambda net, x, mask: net.act(net.fc1(x)) if random.random() < 2 else net.fc1(x),
    "NumPy": lambda net, x, mask: net.act(net.fc1(x)) if np.random.rand() < 2 else net.fc1(x),
    "time": lambda net, x, mask: net.act(net.fc1(x)) if time.time() else net.fc1(x),
    "environment": lambda net, x, mask: net.fc1(x) if "A B" in os.environ else net.act(net.fc1(x)),
    "global": lambda net, x, mask: net.act(net.fc1(x)) if FLAG else net.fc1(x),
    "attribute of another object": (
        lambda net, x, mask: net.act(net.fc1(x)) if FLAGS.flag else net.fc1(x)
    ),
    "attribute": lambda net, x, mask: net.act(net.fc1(x)) if net.count == 0 else net.fc1(x),
    "attribute that changes": counted,
    "training": lambda net, x, mask: net.act(net.fc1(x)) if net.training else net.fc1(x),
    "dropout in training": (
        lambda net, x, mask: net.act(net.drop(net.fc1(x)) if net.training else net.fc1(x))
    ),
    "class": lambda net, x, mask: net.act(net.fc1(x)) if type(net.act) is nn.SiLU else net.fc1(x),
    "dtype": lambda net, x, mask: net.act(net.fc1(x)) if net.kind == torch.float32 else net.fc1(x),
    "grad mode": (
        lambda net, x, mask: net.act(net.fc1(x)) if torch.is_grad_enabled() else net.fc1(x)
    ),
    "and": lambda net, x, mask: net.fc2(FLAGS.flag and net.act(net.fc1(x))),
    "function within": lambda net, x, mask: helped(net, net.fc1(x)),
    "function around": lambda net, x, mask: net.fc2((lambda h: helped(net, h))(net.fc1(x))),
    "exception": tried,
    "exception suppressed": suppressed,
    "range": looped,
    "range of an attribute": (
        lambda net, x, mask: [x := net.act(net.fc1(x)) for _ in range(net.count + 1)][-1]
    ),
    "another object's list": iterated,
    "while": stopped,
    "index": lambda net, x, mask: (net.drop, net.act)[random.random() < 2](net.fc1(x)),
    "index of a global": lambda net, x, mask: {1: net.act, 2: net.drop}[ORDER[0]](net.fc1(x)),
    "pop": lambda net, x, mask: [net.drop, net.act].pop(round(random.random()))(net.fc1(x)),
    "itemgetter": lambda net, x, mask: operator.itemgetter(FLAG)((net.drop, net.act))(net.fc1(x)),
    "choice": lambda net, x, mask: random.choice((net.act, net.act))(net.fc1(x)),
    "getattr": lambda net, x, mask: getattr(net, os.environ.get("A B", "act"))(net.fc1(x)),
    "get_submodule": (
        lambda net, x, mask: net.get_submodule(os.environ.get("A B", "act"))(net.fc1(x))
    ),
    "next": lambda net, x, mask: next(iter((net.act, net.drop)))(net.fc1(x)),
    "attribute that is None": lambda net, x, mask: asked(net, x, mask, net.setting),
    "another's attribute that is None": assigned,
}


@pytest.mark.parametrize("way", DECIDE.values(), ids=DECIDE)
def test_a_forward_that_may_go_another_way_is_not_folded(way: Callable[..., Any]) -> None:
    model = Net(way)
    model.count, model.kind, model.setting = 0, torch.float32, None
    report = fold(model)
    assert report.folded == ()
    assert {layer for layer, _ in report.skipped} == {"fc1", "fc2"}
    assert {why.partition(" (")[0] for _, why in report.skipped} == {
        "activation not folded: torch.fx cannot trace Net"
    }


class Around(nn.Module):
    """Goes several ways, and so is not traced, around parts that would be."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.net = mlp(), Net(lambda net, x, mask: net.fc2(net.act(net.fc1(x))))
        self.blocks = nn.ModuleList([mlp(), mlp()])

    def run(self, layers: Any, x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x) if random.random() < 2 else x
        return x


class Over(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.mlp, x)


class Indexed(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp[0](x) if random.random() < 2 else self.mlp(x)


class Inside(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.net.fc1(x) if random.random() < 2 else self.net(x)


class Children(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.run([*self.net.children()][:2], x)


class Rows(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x[:, None])[:, 0] if random.random() < 2 else x


class InBlocks(Around):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block[0](x) if random.random() < 2 else block(x)
        return x


class Whole(Around):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if random.random() < 2 else x
        return self.mlp(self.net(x))


LOOKED_INTO = {
    Over: {"net.fc1"},
    Indexed: {"net.fc1"},
    Inside: {"mlp.0", "blocks.0.0", "blocks.1.0"},
    Children: set[str](),
    Rows: {"mlp.0", "net.fc1", "blocks.0.0", "blocks.1.0"},
    InBlocks: {"net.fc1"},
    Whole: {"mlp.0", "net.fc1", "blocks.0.0", "blocks.1.0"},
}


@pytest.mark.parametrize(("kind", "folded"), LOOKED_INTO.items())
def test_what_code_around_may_call_by_itself_is_not_folded(
    kind: type[Around], folded: set[str]
) -> None:
    model, input = kind(), torch.randn(4, 5)
    expected = model(input)
    report = fold(model)
    assert {layer for layer, _, _ in report.folded} == folded
    assert all("may call it" in why for _, why in report.skipped)
    torch.testing.assert_close(model(input), expected)


def test_filter_is_asked_for_what_would_be_folded() -> None:
    model = nn.Sequential(fastlinear.Linear(5, 5), nn.ReLU(), mlp(), fastlinear.Linear(5, 5))
    asked: list[str] = []
    report = fold(model, filter=lambda name, layer: asked.append(name) or name == "2.0")
    assert asked == ["0", "2.0", "2.2", "3"]
    assert report.folded == (("2.0", "2.1", "relu"),)
    assert report.skipped == tuple((name, "filter returned False") for name in ("0", "2.2", "3"))
    asked.clear()
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        fold(model, filter=lambda name, layer: 1 / (name != "3"))
    assert state(model) == before


def test_tracing_changes_nothing() -> None:
    def busy(net: Net, input: Tensor, mask: Any) -> Tensor:
        net.scale.add_(1)
        net.count += 1
        net.seen.append(random.random())
        net.last = torch.rand(3)
        return net.act(net.fc1(input))

    model = Net(busy).eval()
    model.fc1.train()
    model.count, model.seen = torch.zeros(()), []
    before, flags = state(model), [module.training for module in model.modules()]
    generators = torch.get_rng_state(), random.getstate()
    assert fold(model).folded == tuple(FC1)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    revert(model)
    assert [module.training for module in model.modules()] == flags
    assert state(model) == before
    assert model.count == 0
    assert model.seen == []
    assert torch.equal(model.scale, torch.ones(5))


def test_state_dicts_load_both_ways() -> None:
    folded, plain = mlp(), mlp()
    fold(folded)
    plain.load_state_dict(folded.state_dict(), strict=True)
    input = torch.randn(4, 5)
    torch.testing.assert_close(result(folded, input), result(plain, input))
    folded.load_state_dict(mlp().state_dict(), strict=True)
    assert not torch.equal(folded(input), plain(input))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_folded_models_revert(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(fastlinear.Linear(5, 5), nn.Tanh(), shared(nn.LeakyReLU(inplace=True)))
    input = torch.randn(4, 5)
    shown, expected = repr(model), result(model, input)
    report = fold(model)
    twin = duplicate(model)
    torch.testing.assert_close(result(twin, input), expected)
    report = revert(twin)
    assert report.converted == ("2.0", "2.2")
    assert [pair[2] for pair in report.folded] == ["tanh", "leaky_relu", "leaky_relu"]
    assert repr(twin) == shown
    assert [type(module) for module in twin[:2]] == [fastlinear.Linear, nn.Tanh]
    assert twin[0].activation is None
    assert [type(module) for module in twin[2]] == 2 * [nn.Linear, nn.LeakyReLU]
    torch.testing.assert_close(result(twin, input), expected)
    torch.testing.assert_close(result(model, input), expected)


PARTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "layer": lambda model: model[0],
    "activation": lambda model: model[1],
    "half": lambda model: model[:2],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_is_not_reverted_without_the_rest(part: Callable[[nn.Module], nn.Module]) -> None:
    model = shared(nn.ReLU())
    fold(model)
    before = state(model)
    report = revert(part(model))
    assert report.converted == report.folded == ()
    assert {reason for _, reason in report.skipped} <= {
        "its activation is not here, or is folded into other layers that cannot be reverted",
        "was folded into layers that are not here, or cannot be reverted",
    }
    assert report.skipped
    assert state(model) == before
    assert len(revert(model).folded) == 2


def test_a_layer_that_has_changed_keeps_the_others_folded() -> None:
    model = shared(nn.ReLU())
    expected = model(input := torch.randn(4, 5))
    fold(model)
    model[2].forward = model[2].forward
    assert [name for name, _ in revert(model).skipped] == ["0", "1", "2"]
    torch.testing.assert_close(model(input), expected)
    del model[2].forward
    model[0].activation = "tanh"
    assert "has got an activation" in dict(revert(model).skipped)["0"]
    model[0].activation = "relu"
    assert len(revert(model).folded) == 2
    assert [type(module) for module in model] == 2 * [nn.Linear, nn.ReLU]


def test_converting_twice() -> None:
    model = mlp()
    convert(model)
    report = fold(model)
    assert report == fastlinear.Report(
        (), (("2", "is a fastlinear.Linear already"),), folded=(("0", "1", "relu"),)
    )
    again = tuple((name, "is a fastlinear.Linear already") for name in ("0", "2"))
    assert convert(model) == fold(model) == fastlinear.Report((), again)
    assert len(revert(model).folded) == 1
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Tanh())
    expected = model(input := torch.randn(4, 5))
    fold(model)
    assert fold(model).folded == ()
    torch.testing.assert_close(model(input), expected)


def test_report_prints_what_was_folded() -> None:
    model = nn.Sequential(OrderedDict(net=mlp(), head=mlp(nn.LeakyReLU(0.2))))
    assert str(fold(model)) == (
        "net.0   converted\nnet.2   converted\nhead.0  converted\nhead.2  converted\n"
        "net.0   folded: relu of net.1\n"
        "head.0  skipped: activation not folded: its slope is 0.2, and leaky_relu's is 0.01\n"
        "4 converted, 1 skipped, 1 folded"
    )
    assert repr(model.net[1]) == "Folded(ReLU())"


def test_folded_models_compile() -> None:
    model = Net(lambda net, x, mask: net.fc2(net.act(net.fc1(x))))
    expected = result(model, input := torch.randn(4, 5))
    assert fold(model).folded == tuple(FC1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(result(compiled, input), expected)
