"""`fastlinear.convert` and `revert`: which layers change, what stays, what copies are."""

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from converting import Subclass, assert_runs_as_before, kinds, mlp, result, runs
from torch import Tensor, nn

import fastlinear
from fastlinear import convert, revert


class Nested(nn.Module):
    """Linear layers at several depths and in several containers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        up = nn.ModuleDict({"up": nn.Linear(4, 8), "norm": nn.LayerNorm(8)})
        self.blocks = nn.ModuleList([up, nn.Sequential(OrderedDict(down=nn.Linear(8, 3)))])

    def forward(self, input: Tensor) -> Tensor:
        up = self.blocks[0]
        return self.blocks[1](up["norm"](up["up"](self.first(input))))


class Tied(nn.Module):
    """One module under two names, and one Parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(5, 5)
        self.other = nn.Linear(5, 5, bias=False)
        self.other.weight = self.first.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.other(self.again(self.first(input)))


# What is converted, and how it computes then.

MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "the model itself": (lambda: nn.Linear(5, 3), [""]),
    "without bias": (lambda: nn.Linear(5, 3, bias=False), [""]),
    "in a row": (mlp, ["0", "2"]),
    "nested": (Nested, ["first", "blocks.0.up", "blocks.1.down"]),
    "tied": (Tied, ["first", "other"]),
}


@runs
@pytest.mark.parametrize(("make", "names"), MODELS.values(), ids=MODELS)
def test_convert_and_revert(
    make: Callable[[], nn.Module], names: list[str], device: torch.device
) -> None:
    model = make()
    before = kinds(model)
    assert list(before) == names
    assert set(before.values()) == {"torch"}
    report = convert(model)
    assert report == fastlinear.Report(tuple(names), ())
    assert kinds(model) == dict.fromkeys(names, "fastlinear")
    report = revert(model)
    assert report == fastlinear.Report(tuple(names), ())
    assert kinds(model) == before
    assert repr(model) == repr(make())
    assert_runs_as_before(model, device)


def test_converted_layers_take_the_kernels(triton_backend: None, device: torch.device) -> None:
    model = mlp().to(device)
    input = torch.randn(4, 5).to(device)
    convert(model)
    assert model(input).grad_fn.name() == "LinearFunctionBackward"
    with pytest.raises(TypeError, match="backend 'triton' takes"):
        model[0](input.to_sparse())
    revert(model)
    assert model(input).grad_fn.name() == "MmBackward0"


def identities(model: nn.Module) -> list[tuple[int, dict[str, int]]]:
    return [
        (id(layer), {name: id(value) for name, value in vars(layer).items()})
        for layer in model.modules()
    ]


def test_converting_keeps_every_object() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model[1].eval().weight.requires_grad_(False)
    model[0].note = "kept"
    before = identities(model)
    parameters = {name: id(value) for name, value in model.named_parameters()}
    convert(model)
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert [layer.training for layer in model] == [True, False]
    assert model[0].note == "kept"
    revert(model)
    assert identities(model) == before


def test_tied_layers_stay_tied() -> None:
    model = Tied()
    convert(model)
    assert model.again is model.first
    assert model.other.weight is model.first.weight
    assert len(list(model.parameters())) == 2
    twin = copy.deepcopy(model)
    assert twin.other.weight is twin.first.weight
    assert twin.first.weight is not model.first.weight


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
}


@runs
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_made_before_stays_valid(
    make: Callable[[Any], Any], device: torch.device
) -> None:
    converted = mlp().to(device, torch.float64)
    plain = copy.deepcopy(converted)
    optimizers = [make(model.parameters()) for model in (converted, plain)]
    input, target = (torch.randn(4, size).to(device, torch.float64) for size in (5, 3))
    for step in range(4):
        if step in (1, 3):  # in the midst of training, with the optimizer's state at hand
            (convert if step == 1 else revert)(converted)
        for model, optimizer in zip((converted, plain), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(model(input), target).backward()
            optimizer.step()
        torch.testing.assert_close(dict(converted.state_dict()), dict(plain.state_dict()))


@runs
def test_hooks_stay(device: torch.device) -> None:
    model = mlp().to(device)
    calls: list[str] = []
    layer = model[0]
    layer.register_forward_pre_hook(lambda module, arguments: calls.append("forward_pre"))
    layer.register_forward_hook(lambda module, arguments, output: calls.append("forward"))
    layer.register_full_backward_hook(lambda *arguments: calls.append("full_backward"))
    layer.register_state_dict_post_hook(lambda *arguments: calls.append("state_dict"))
    layer.weight.register_hook(lambda gradient: calls.append("gradient"))
    expected = ["forward_pre", "forward", "full_backward", "gradient", "state_dict"]
    for change in (convert, revert):
        change(model)
        calls.clear()
        model(torch.randn(4, 5).to(device).requires_grad_()).sum().backward()
        model.state_dict()
        assert sorted(calls) == sorted(expected)
        assert calls[:2] == expected[:2]


def test_state_dicts_load_both_ways() -> None:
    converted, plain = mlp(), mlp()
    convert(converted)
    plain.load_state_dict(converted.state_dict(), strict=True)
    torch.testing.assert_close(dict(plain.state_dict()), dict(converted.state_dict()))
    fresh = mlp()
    converted.load_state_dict(fresh.state_dict(), strict=True)
    torch.testing.assert_close(dict(converted.state_dict()), dict(fresh.state_dict()))


# Copies, and converting again.


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "saved and loaded": saved_and_loaded,
}


@runs
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_a_converted_model(
    duplicate: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    model = mlp().to(device)
    convert(model)
    twin = duplicate(model)
    assert set(kinds(twin).values()) == {"fastlinear"}
    input = torch.randn(4, 5).to(device)
    torch.testing.assert_close(result(twin, input), result(model, input))
    assert revert(twin).converted == ("0", "2")
    assert set(kinds(twin).values()) == {"torch"}
    assert set(kinds(model).values()) == {"fastlinear"}
    assert revert(model).converted == ("0", "2")


def test_converting_twice_changes_nothing_more() -> None:
    model = mlp()
    convert(model)
    reason = "is a fastlinear.Linear already"
    assert convert(model) == fastlinear.Report((), (("0", reason), ("2", reason)))
    assert revert(model).converted == ("0", "2")
    assert revert(model) == fastlinear.Report((), ())
    assert convert(model).converted == ("0", "2")


def test_a_part_can_be_converted_and_reverted() -> None:
    model = Nested()
    assert convert(model.blocks).converted == ("0.up", "1.down")
    assert kinds(model)["first"] == "torch"
    assert convert(model).converted == ("first",)
    assert revert(model.first).converted == ("",)
    assert revert(model).converted == ("blocks.0.up", "blocks.1.down")


def test_layers_made_as_fastlinear_are_not_reverted() -> None:
    model = nn.Sequential(fastlinear.Linear(5, 4, activation="relu"), nn.Linear(4, 3))
    convert(model)
    report = revert(model)
    reason = "was made as fastlinear.Linear, not converted"
    assert report == fastlinear.Report(("1",), (("0", reason),))
    assert type(model[0]) is fastlinear.Linear
    assert type(model[1]) is nn.Linear
    assert model[0].activation == "relu"


def test_a_layer_of_another_class_since_is_not_reverted() -> None:
    model = mlp()
    convert(model)
    model[0].__class__ = Subclass
    report = revert(model)
    reason = "has become a Subclass since it was converted"
    assert report == fastlinear.Report(("2",), (("0", reason),))
    assert type(model[0]) is Subclass


# The report, and wrong arguments.


def test_report_prints_a_table() -> None:
    report = fastlinear.Report(("", "blocks.0.up"), (("head", "is a Head, not exactly nn.Linear"),))
    assert str(report) == (
        "(model)      converted\n"
        "blocks.0.up  converted\n"
        "head         skipped: is a Head, not exactly nn.Linear\n"
        "2 converted, 1 skipped"
    )
    assert str(convert(nn.Linear(5, 3))) == (
        "(model)  converted\n1 converted, 0 skipped; a faster way is known for 0 here, "
        "fastlinear.tune(model, batch) finds more"
    )
    assert str(convert(nn.Sequential(Subclass(5, 3)))) == (
        "0  skipped: is a Subclass, not exactly nn.Linear\n0 converted, 1 skipped"
    )


def test_weight_that_is_computed_is_not_asked_for() -> None:
    """Spectral norm's takes a step of its iteration each time, in training."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)).train()
    before = {name: value.clone() for name, value in layer.named_buffers()}
    convert(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


def test_report_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot assign to field 'converted'"):
        convert(mlp()).converted = ()  # type: ignore[misc]


NOT_MODULES = {
    "None": (None, "NoneType"),
    "class": (nn.Linear, "type"),
    "function": (F.linear, "builtin_function_or_method"),
    "list": ([nn.Linear(5, 3)], "list"),
    "state_dict": (nn.Linear(5, 3).state_dict(), "OrderedDict"),
}


@pytest.mark.parametrize("change", [convert, revert], ids=["convert", "revert"])
@pytest.mark.parametrize(("thing", "kind"), NOT_MODULES.values(), ids=NOT_MODULES)
def test_what_is_no_module_is_refused(change: Callable[..., Any], thing: object, kind: str) -> None:
    said = rf"{change.__name__}\(\) takes an nn.Module, but model is {kind}$"
    with pytest.raises(TypeError, match=said):
        change(thing)


@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.ReLU()], ids=["name", "call", "module"])
def test_convert_leaves_alone_what_has_an_activation_of_its_own(activation: object) -> None:
    layer = nn.Linear(3, 4)
    layer.activation = activation
    report = fastlinear.convert(layer)
    assert report.converted == ()
    assert "has an attribute of its own called activation" in report.skipped[0][1]
    assert type(layer) is nn.Linear


def test_revert_leaves_alone_what_has_got_an_activation() -> None:
    layer = nn.Linear(3, 4)
    fastlinear.convert(layer)
    layer.activation = "relu"
    assert "has got an activation" in fastlinear.revert(layer).skipped[0][1]
    assert layer.activation == "relu"
