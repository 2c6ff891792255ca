"""`convert(model, fold_activations=True)`: which activations layers take over, and what stays."""

import copy
import functools
import itertools
import linecache
import pickle
import random
import textwrap
import time
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastlinear
from fastlinear import convert, revert
from fastlinear.conversion.fold import Folded

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
    """What the forwards below are of."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(5, 5), nn.Linear(5, 5), act or nn.SiLU()
        self.drop, self.mlp = nn.Dropout(0.5), mlp()
        self.blocks = nn.ModuleList([mlp(), mlp()])


NUMBERS = itertools.count()


def written(code: str) -> dict[str, Any]:
    """The functions in `code`, which has its source at hand as a notebook's cells have."""
    file, members = f"<cell {next(NUMBERS)}>", dict[str, Any]()
    linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file
    exec(compile(code, file, "exec"), globals(), members)
    return members


def net(body: str, act: nn.Module | None = None, more: str = "") -> Callable[[], nn.Module]:
    """Makes modules of a class with this in its forward, and more methods."""
    code = "def forward(self, x, mask=None):\n" + textwrap.indent(body, "    ") + "\n" + more
    return lambda: type("Net", (Net,), written(code))(act)


def shared(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), act, nn.Linear(4, 5), act)


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


def in_two_places(index: int) -> nn.Module:
    model = nn.Sequential(mlp(), mlp(nn.Tanh()))
    model[1][index] = model[0][index]
    return model


class Grown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.__first = nn.ModuleList(), nn.Linear(5, 5)
        for _ in range(2):
            self.blocks.append(mlp())
        for module in self.modules():
            module.seen = True

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Private(Grown):
    def __init__(self) -> None:
        super().__init__()
        self.__net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.__net[0](x)


ATOM = "return self.fc2(self.act(self.fc1(x)))"
FC1 = [("fc1", "act", "silu")]
MLP, BLOCKS = ("mlp.0", "mlp.1", "relu"), [(f"blocks.{i}.0", f"blocks.{i}.1", "relu") for i in "01"]
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
    "forward": (net(ATOM), FC1),
    "assigned": (net("x = self.fc1(x)\nx = self.act(x)\nreturn self.fc2(x)"), FC1),
    "returned": (net("h = self.fc1(x)\nreturn self.act(h)"), FC1),
    "residual": (net("return x + self.act(self.fc1(x)) * self.fc2(x)"), FC1),
    "method": (
        net("return self.fc2(self.up(x))", more="def up(self, x): return self.act(self.fc1(x))"),
        FC1,
    ),
    "called twice": (net("return self.act(self.fc1(self.act(self.fc1(x))))"), FC1),
    "shapes": (net("return self.act(self.fc1(x.to(self.fc1.weight.dtype)))"), FC1),
    "one mode around both": (net("with torch.no_grad(): x = self.act(self.fc1(x))\n" + ATOM), FC1),
    "dropout after": (net("return self.drop(self.act(self.fc1(x)))"), FC1),
    "loops": (
        net("for one in self.blocks: x = one(x)\nreturn self.mlp([m(x) for m in self.blocks][0])"),
        [],
    ),
    "indices": (net("return self.blocks[len(self.blocks) - 1](x)"), []),
    "around a Sequential": (net("return self.act(self.mlp(x))"), [("mlp.2", "act", "silu")]),
    "appended": (Grown, BLOCKS),
    "one block twice": (lambda: nn.Sequential(one := mlp(), one), [("0.0", "0.1", "relu")]),
    "shared activation": (
        lambda: shared(nn.ReLU(inplace=True)),
        [("0", "1", "relu"), ("2", "1", "relu")],
    ),
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
    pairs = sorted([*pairs, MLP, *BLOCKS] if isinstance(model, Net) else pairs)
    assert sorted(report.folded) == pairs
    assert report.skipped == ()
    for layer, act, activation in pairs:
        assert model.get_submodule(layer).activation == activation
        assert type(model.get_submodule(act)) is Folded
    assert list(model.state_dict()) == keys
    for training, values in zip((True, False), expected, strict=True):
        torch.testing.assert_close(result(model.train(training), input), values)
    assert sorted(revert(model).folded) == pairs
    assert repr(model) == shown
    assert state(model) == before
    torch.testing.assert_close(result(model, input), expected[1])


SAYS = "the code does not say act(layer(x)) wherever it names the layer"
FUNCTION = "it is a function call, which stays"
HOOKS, ALSO = "it or the layer has hooks", "it is also called on something that cannot apply it"
KEPT: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "residual": (net("h = self.fc1(x)\nreturn h + self.act(h)"), {"fc1": SAYS}),
    "shape": (net("return self.act(h := self.fc1(x)).view(h.shape)"), {"fc1": SAYS}),
    "layer called twice": (net("return self.act(self.fc1(self.fc1(x)))"), {"fc1": SAYS}),
    "kept": (net("self.h = self.fc1(x)\nreturn self.act(self.h)"), {}),
    "kept by two names": (net("h = x = self.fc1(x)\nx = self.act(x)\nreturn x + h"), {}),
    "kept by a function": (
        net("f = lambda: h\nh = self.fc1(x)\nreturn self.act(h), f"),
        {"fc1": SAYS},
    ),
    "finally": (
        net("try:\n    h = self.fc1(x)\n    return self.act(h)\nfinally: self.h = h"),
        {"fc1": SAYS},
    ),
    "global": (net("global h\nh = self.fc1(x)\nreturn self.act(h)"), {"fc1": SAYS}),
    "two names": (net("h = self.fc1(x)\ny = self.act(h)\nreturn y + h"), {"fc1": SAYS}),
    "no_grad": (
        net("h = self.fc1(x)\nwith torch.no_grad(): y = self.act(h)\nreturn y"),
        {"fc1": SAYS},
    ),
    "replaced": (net(ATOM, more="def set(self, act): self.act = act"), {"fc1": ALSO}),
    "activation also on the input": (
        net("return self.act(self.fc2(self.act(self.fc1(self.act(x)))))"),
        dict.fromkeys(["fc1", "fc2"], ALSO),
    ),
    "activation passed on": (net(ATOM + " + self.fc2(x, self.act)"), {"fc1": ALSO}),
    "function": (net("return torch.relu(self.fc1(x))"), {"fc1": FUNCTION}),
    "tensor's method": (net("return self.fc1(x).tanh_()"), {"fc1": FUNCTION}),
    "forward called directly": (
        net("return self.act(self.fc1(self.fc1.forward(x)))"),
        {"fc1": SAYS},
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
    "layer in two places": (lambda: in_two_places(0), {"0.0": SAYS}),
    "activation after another layer too": (
        lambda: nn.Sequential(nn.Linear(5, 5), act := nn.Tanh(), nn.Dropout(), act),
        {"0": ALSO},
    ),
    "torch's own": (lambda: nn.TransformerEncoderLayer(4, 2, activation=nn.ReLU()), {}),
}


@pytest.mark.parametrize(("make", "reasons"), KEPT.values(), ids=KEPT)
def test_what_is_not_folded_is_reported_with_the_reason(
    make: Callable[[], nn.Module], reasons: dict[str, str]
) -> None:
    model = make()
    report = fold(model)
    if isinstance(model, Net):
        assert report.folded == (MLP, *BLOCKS)
    else:
        assert {layer for layer, _, _ in report.folded}.isdisjoint(reasons)
    skipped = {name: why for name, why in report.skipped if "activation" in why}
    assert list(skipped) == list(reasons)
    for name, reason in skipped.items():
        assert reason.startswith(f"activation not folded: {reasons[name]}")


# What stands around decides whether the layer and the activation are called: by chance, too.

FLAGS, FLAG = SimpleNamespace(flag=True), True


def helped(net: Any, hidden: Tensor) -> Tensor:
    return net.act(hidden) if random.random() < 0.5 else hidden


CONDITIONS = {
    "torch.rand": "torch.rand(()) < 0.5",
    "random": "random.random() < 0.5",
    "NumPy": "np.random.rand() < 0.5",
    "time": "time.time() % 2",
    "environment": "__import__('os').environ['A_B'] == '1'",
    "global": "FLAG",
    "attribute of another object": "FLAGS.flag",
    "attribute": "self.flag",
    "training": "self.training",
    "mask": "mask is None",
    "grad mode": "torch.is_grad_enabled()",
}
ATOMIC = {
    "if": "if {0}:\n    x = self.act(self.fc1(x))\nreturn self.fc2(x)",
    "either": "x = self.act(self.fc1(x)) if {0} else x\nreturn self.fc2(x)",
    "while": (
        "while {0} and x.sum() < 9:\n    x = self.fc1(x)\n    x = self.act(x)\n    x = x + 1\n"
        "return x"
    ),
}
DROPPED = {
    "assigned": "x = self.fc1(x)\nif {0}:\n    x = self.act(x)\nreturn self.fc2(x)",
    "left out": "return self.fc2(self.act(self.fc1(x)) if {0} else self.fc1(x))",
    "chosen": "return self.fc2((self.act if {0} else self.drop)(self.fc1(x)))",
    "by its name": "return self.fc2(getattr(self, 'act' if {0} else 'drop')(self.fc1(x)))",
    "by a function": "return (lambda h: self.act(h) if {0} else h)(self.fc1(x))",
    "in a try": (
        "x = self.fc1(x)\ntry:\n    x = self.act(x) if {0} else 1 / 0\n"
        "except ZeroDivisionError: ...\nreturn x"
    ),
}


def outcomes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        input, flag = torch.randn(4, 5), bool(seed % 2)
        monkeypatch.setitem(globals(), "FLAG", flag)
        monkeypatch.setattr(FLAGS, "flag", flag)
        monkeypatch.setattr(time, "time", lambda flag=flag: flag)
        monkeypatch.setenv("A_B", str(int(flag)))
        model.flag = flag
        with torch.set_grad_enabled(flag):
            found.append(model.train(flag)(input, None if flag else input))
    return found


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
@pytest.mark.parametrize("body", (ATOMIC | DROPPED).values(), ids=ATOMIC | DROPPED)
def test_what_decides_around_a_layer_decides_the_same(
    body: str, condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(body.format(condition))()
    expected = outcomes(model, monkeypatch)
    report = fold(model)
    assert (("fc1", "act", "silu") in report.folded) == (body in ATOMIC.values())
    torch.testing.assert_close(outcomes(model, monkeypatch), expected)


ELSEWHERE: dict[str, tuple[str, str]] = {  # what calls parts unseen, and where nothing is folded
    "a loop": ("for one in self.mlp: x = one(x) if random.random() < 2 else x\n" + ATOM, "mlp"),
    "an index": ("return self.mlp[0](x) if random.random() < 2 else self.fc2(x)", "mlp"),
    "a part's method": ("return self.mlp.forward(x)", "mlp"),
    "passed on": ("return [self.mlp][0](x)", "mlp"),
    "in blocks": ("for one in self.blocks: x = one[0](x)\n" + ATOM, "blocks"),
    "items": ("return self.blocks[0][0](x)", "blocks"),
    "a slice": ("for one in self.blocks[:1]: x = one(x)\nreturn x", "blocks"),
    "collected": ("return [one for one in self.blocks][0][0](x)", "blocks"),
    "a method of a list": ("return self.blocks.__getitem__(0)[0](x)", "blocks"),
    "children": ("return [*self.children()][0](x)", ""),
    "a helper": ("return helped(self, self.fc1(x))", ""),
    "getattr": ("return getattr(self, 'fc1')(x)", ""),
    "get_submodule": ("return self.get_submodule('fc1')(x)", ""),
    "super": ("return [*super(Net, self).children()][0](x)", ""),
    "eval": ("return eval('self').fc1(x)", ""),
    "a dict": ("return self._modules['fc1'](x)", ""),
    "a part's data": ("return x + self.mlp.weight if FLAGS is None else self.fc2(x)", "mlp"),
}


@pytest.mark.parametrize(("body", "where"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_code_around_may_call_by_itself_is_not_folded(body: str, where: str) -> None:
    model = net(body, more="def other(self, x): return self.act(self.fc1(x))")()
    input = torch.randn(4, 5)
    random.seed(0)
    expected = model(input)
    folded = {layer.partition(".")[0] for layer, _, _ in fold(model).folded}
    assert folded == ({"fc1", "mlp", "blocks"} - {where} if where else set())
    random.seed(0)
    torch.testing.assert_close(model(input), expected)


def test_code_that_cannot_be_read_folds_nothing() -> None:
    def of(kind: type[nn.Module], **more: Any) -> fastlinear.Report:
        model = kind()
        for name, value in more.items():
            setattr(model, name, value(model))
        return fold(model)

    unseen: dict[str, Any] = {}
    exec("def forward(self, x): return self.act(self.fc1(x))", unseen)
    Good = type("Good", (Net,), written("def forward(self, x): return self.act(self.fc1(x))"))
    another = written("def forward(self, x): return self.fc1(x)")["forward"]
    compiled = {"_compiled_call_impl": lambda model: lambda: model}  # as Module.compile sets it
    assert of(Good).folded == of(Good, **compiled).folded == (*FC1, MLP, *BLOCKS)
    odd = {
        "Odd.forward has no source": of(type("Odd", (Net,), {"forward": unseen["forward"]})),
        "Odd.forward is decorated": of(
            type("Odd", (Good,), {"forward": torch.no_grad()(Good.forward)})
        ),
        "Odd.forward is decorated, or": of(
            type("Odd", (Net,), {"forward": functools.wraps(Good.forward)(another)})
        ),
        "Odd.forward is no plain": of(
            type("Odd", (Good,), {"forward": functools.partialmethod(Good.forward)})
        ),
        "Odd.__getattr__ decides": of(type("Odd", (Good,), {"__getattr__": Net.__getattr__})),
        "Odd runs code of torch.nn": of(type("Odd", (Good, nn.Identity), {})),
        "forward is replaced": of(Good, forward=lambda model: torch.relu),
        "run may have modules": of(Good, run=lambda model: lambda x: model.fc1(x)),
        "parts may have modules": of(Good, parts=lambda model: {"first": [model.fc1]}),
    }
    assert fold(Private()).folded == ()
    for why, report in odd.items():
        assert report.folded == ()
        assert report.skipped[0][1].startswith(f"activation not folded: {why}")


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
        "4 converted, 1 skipped, 1 folded; a faster way is known for 0 here, "
        "fastlinear.tune(model, batch) finds more"
    )
    assert repr(model.net[1]) == "Folded(ReLU())"


def test_folded_models_compile() -> None:
    model = net(ATOM)()
    expected = result(model, input := torch.randn(4, 5))
    assert fold(model).folded == (*FC1, MLP, *BLOCKS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(result(compiled, input), expected)
