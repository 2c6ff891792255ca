"""`fastlinear.convert` and `revert`: which layers change, what stays, what is reported."""

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastlinear
from fastlinear import convert, revert

runs = pytest.mark.usefixtures("backend")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))


def kinds(model: nn.Module) -> dict[str, str]:
    """Where each layer's class is from."""
    return {
        name: type(layer).__mro__[parametrize.is_parametrized(layer)].__module__.partition(".")[0]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


def result(model: nn.Module, input: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    model.zero_grad()
    input = input.detach().requires_grad_()
    output = model(input)
    output.pow(2).sum().backward()
    return [output, input.grad, *(parameter.grad for parameter in model.parameters())]


def assert_runs_as_before(model: nn.Module, device: torch.device) -> None:
    """Converts `model`, and fails unless it then computes what it did, by the backend at hand."""
    model = model.to(device, torch.float64)
    input = torch.randn(4, 5, dtype=torch.float64).to(device)
    before = result(model, input)
    assert convert(model).converted
    torch.testing.assert_close(result(model, input), before)
    assert revert(model).converted
    torch.testing.assert_close(result(model, input), before)


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


class Subclass(nn.Linear):
    """Means something else by its forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


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


# What is left alone, and why.


def with_forward_replaced() -> nn.Module:
    layer = nn.Linear(5, 3)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


def with_forward_kept() -> nn.Module:
    """As libraries do that wrap a layer's forward and keep the old one beside it."""
    layer = nn.Linear(5, 3)
    layer.old_forward = layer.forward
    layer.forward = layer.old_forward  # type: ignore[method-assign]
    return layer


SKIPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (lambda: Subclass(5, 3), "is a Subclass, not exactly nn.Linear"),
    "a parametrized subclass": (
        lambda: parametrizations.weight_norm(Subclass(5, 3)),
        "is a Subclass, not exactly nn.Linear",
    ),
    "a subclass of torch": (
        lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(5, 3),
        "is a NonDynamicallyQuantizableLinear, not exactly nn.Linear",
    ),
    "a lazy layer": (
        lambda: nn.LazyLinear(3),
        "is a LazyLinear that has not seen an input: run it once first",
    ),
    "fastlinear's own": (lambda: fastlinear.Linear(5, 3), "is a fastlinear.Linear already"),
    "fastlinear's own, parametrized": (
        lambda: parametrizations.weight_norm(fastlinear.Linear(5, 3)),
        "is a fastlinear.Linear already",
    ),
    "forward replaced": (
        with_forward_replaced,
        "its forward is replaced on the instance, and would not be fastlinear's",
    ),
    "forward wrapped": (
        with_forward_kept,
        "its forward is replaced on the instance, and would not be fastlinear's",
    ),
}


@pytest.mark.parametrize(("make", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_what_is_left_alone_is_reported_with_the_reason(
    make: Callable[[], nn.Module], reason: str
) -> None:
    model = nn.Sequential(OrderedDict(odd=make(), plain=nn.Linear(3, 3)))
    kind, attributes = type(model.odd), dict(vars(model.odd))
    report = convert(model)
    assert report == fastlinear.Report(("plain",), (("odd", reason),))
    assert type(model.odd) is kind
    assert vars(model.odd) == attributes
    assert type(model.plain) is fastlinear.Linear


NO_LINEAR = {
    "no layer at all": nn.Identity,
    "a container": nn.ModuleList,
    "other layers": lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Bilinear(2, 2, 2), nn.LSTM(2, 2)),
}


@pytest.mark.parametrize("make", NO_LINEAR.values(), ids=NO_LINEAR)
def test_models_without_linear_layers(make: Callable[[], nn.Module]) -> None:
    for change in (convert, revert):
        report = change(make())
        assert report == fastlinear.Report((), ())
        assert str(report) == "0 converted, 0 skipped"


@runs
def test_lazy_layers_convert_once_they_have_seen_an_input(device: torch.device) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3)).to(device)
    assert convert(model).converted == ()
    model(torch.randn(4, 5).to(device))  # neither was changed: both still learn their sizes
    assert convert(model).converted == ("0", "2")
    revert(model)
    assert_runs_as_before(model, device)


@runs
def test_attention_keeps_its_projection(device: torch.device) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = model.to(device, torch.float64)
    input = torch.randn(2, 4, 8, dtype=torch.float64).to(device)
    expected = result(model, input)
    report = convert(model)
    assert report.converted == ("linear1", "linear2")
    assert [name for name, _ in report.skipped] == ["self_attn.out_proj"]
    torch.testing.assert_close(result(model, input), expected)
    # Without gradients torch takes a path of its own, which reads the layers' weights.
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input), expected[0])


# The filter.


def test_filter_is_asked_once_for_each_layer_that_would_be_converted() -> None:
    layers = {
        "head": nn.Linear(5, 4),
        "odd": Subclass(4, 4),
        "done": fastlinear.Linear(4, 4),
        "tail": nn.Linear(4, 3),
    }
    model = nn.Sequential(OrderedDict(layers))
    asked: list[tuple[str, type[nn.Module]]] = []

    def large(name: str, layer: nn.Linear) -> bool:
        assert layer is model.get_submodule(name)
        asked.append((name, type(model.head)))
        return layer.in_features > 4

    report = convert(model, filter=large)
    # Still nn.Linear when the tail is asked for: nothing changes before the last answer.
    assert asked == [("head", nn.Linear), ("tail", nn.Linear)]
    assert report.converted == ("head",)
    assert dict(report.skipped)["tail"] == "filter returned False"
    assert type(model.tail) is nn.Linear


@pytest.mark.parametrize(("answer", "converted"), [(1, 1), ("yes", 1), (0, 0), (None, 0), ("", 0)])
def test_filter_may_return_anything(answer: object, converted: int) -> None:
    assert len(convert(nn.Linear(5, 3), filter=lambda name, layer: answer).converted) == converted


def test_filter_that_raises_leaves_the_model_as_it_was() -> None:
    model = mlp()

    def picky(name: str, layer: nn.Linear) -> bool:
        if name == "2":
            raise ZeroDivisionError(name)
        return True

    with pytest.raises(ZeroDivisionError):
        convert(model, filter=picky)
    assert set(kinds(model).values()) == {"torch"}
    assert revert(model) == fastlinear.Report((), ())


def test_filter_is_passed_by_name_alone() -> None:
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        convert(mlp(), lambda name, layer: True)  # type: ignore[misc]


# Parametrized and pruned layers.

WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(5, 3)),
    "weight and bias": lambda: parametrizations.weight_norm(
        parametrizations.weight_norm(nn.Linear(5, 3)), "bias"
    ),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(5, 3)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(5, 3), "weight", amount=4),
}


@runs
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_layers_convert(make: Callable[[], nn.Module], device: torch.device) -> None:
    model = make()
    kind = type(model)
    assert_runs_as_before(model, device)
    convert(model)
    assert isinstance(model, fastlinear.Linear)
    assert type(model).__name__ == kind.__name__
    revert(model)
    assert not isinstance(model, fastlinear.Linear)
    assert type(model).__name__ == kind.__name__


def test_a_copy_of_a_parametrized_layer_keeps_its_class() -> None:
    original = parametrizations.weight_norm(nn.Linear(5, 3))
    twin = copy.deepcopy(original)
    assert type(twin) is type(original), "torch shares the class; without that this tests nothing"
    convert(original)
    assert not isinstance(twin, fastlinear.Linear)
    converted_twin = copy.deepcopy(original)
    revert(original)
    assert isinstance(converted_twin, fastlinear.Linear)
    assert not isinstance(original, fastlinear.Linear)
    revert(converted_twin)
    assert not isinstance(converted_twin, fastlinear.Linear)


@runs
def test_parametrizing_after_converting(device: torch.device) -> None:
    model = nn.Linear(5, 3).to(device)
    input = torch.randn(4, 5).to(device)
    expected = model(input)
    convert(model)
    parametrizations.weight_norm(model)
    assert isinstance(model, fastlinear.Linear)
    torch.testing.assert_close(model(input), expected)
    assert revert(model).converted == ("",)
    assert not isinstance(model, fastlinear.Linear)
    torch.testing.assert_close(model(input), expected)
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is nn.Linear
    torch.testing.assert_close(model(input), expected)


@runs
def test_removing_a_parametrization_after_converting(device: torch.device) -> None:
    model = parametrizations.weight_norm(nn.Linear(5, 3)).to(device)
    input = torch.randn(4, 5).to(device)
    expected = model(input)
    convert(model)
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is fastlinear.Linear
    torch.testing.assert_close(model(input), expected)
    revert(model)
    assert type(model) is nn.Linear


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


# What people do to PyTorch's names and classes.


@pytest.mark.parametrize("replacement", [fastlinear.Linear, Subclass])
def test_the_name_may_mean_another_class(
    replacement: type[nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs = nn.Linear
    others = replacement(4, 3), nn.TransformerEncoderLayer(4, 2)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), *others)
    input = torch.randn(2, 5)
    monkeypatch.setattr(nn, "Linear", replacement)
    monkeypatch.setattr(nn, "ReLU", nn.Tanh)
    report = convert(model, fold_activations=True)
    assert report.converted == ("0", "3.linear1", "3.linear2")
    assert report.folded == (("0", "1", "relu"),)
    assert type(model[0]) is fastlinear.Linear
    explained = fastlinear.explain(torchs(5, 4), input)
    assert explained.reason == "the layer is no fastlinear.Linear (see fastlinear.convert)"
    assert fastlinear.BatchedLinear.from_linears([torchs(5, 4)]).in_features == 5
    assert revert(model).converted == report.converted
    assert type(model[0]) is torchs
    assert dict(convert(replacement(5, 3)).skipped)[""] == (
        "is a fastlinear.Linear already"
        if replacement is fastlinear.Linear
        else "is a Subclass, not exactly nn.Linear"
    )


def test_a_class_of_the_same_name_is_told_from_pytorchs() -> None:
    other = type("Linear", (nn.Linear,), {"__module__": "lora"})
    assert dict(convert(other(5, 3)).skipped)[""] == "is a lora.Linear, not exactly nn.Linear"


def test_fastlinear_imported_under_another_name_extends_pytorchs() -> None:
    program = """if True:
        import torch
        torchs = torch.nn.Linear
        class Patched(torchs):
            pass
        torch.nn.Linear, torch.nn.ReLU = Patched, torch.nn.Tanh
        import fastlinear
        assert fastlinear.Linear.__bases__ == (torchs,)
        assert fastlinear.convert(torchs(5, 3)).converted
        torchs.forward = lambda self, input: input
        assert fastlinear.convert(torchs(5, 3)).skipped
    """
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("fold", [False, True])
def test_a_forward_set_on_the_class_runs(fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), fastlinear.Linear(4, 4), nn.ReLU())
    input = torch.randn(2, 5)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, input: input.mean() + self.weight[:, 0])
        expected = model[0](input)
        report = convert(model, fold_activations=fold)
        why = "nn.Linear.forward is replaced on the class, and fastlinear's would run instead"
        assert report == fastlinear.Report(
            (), (("0", why), ("2", "is a fastlinear.Linear already"))
        )
        torch.testing.assert_close(model[0](input), expected)
        for layer in (nn.Linear(5, 4), fastlinear.Linear(5, 4)):
            explained = fastlinear.explain(layer, input)
            assert (explained.path, explained.products) == (None, ())
            assert explained.reason.startswith("nn.Linear.forward is replaced")
    assert convert(model).converted == ("0",)
    monkeypatch.setattr(fastlinear.Linear, "forward", lambda self, input: input)
    assert fastlinear.explain(model[0], input).path is None
    assert fastlinear.explain(nn.Linear(5, 4), input).path is not None


def test_a_call_set_on_the_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    convert(model)
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, input: input + 1)
    input = torch.randn(4, 5)
    torch.testing.assert_close(model(input), (input + 1).relu() + 1)


# Layers that were made as fastlinear.Linear, for tools that ask for exactly nn.Linear.


def test_layers_made_as_fastlinear_are_reverted_on_request() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = fastlinear.GatedLinear(5, 4)
            self.made = fastlinear.Linear(4, 4)
            self.norm = parametrizations.weight_norm(fastlinear.Linear(4, 4))
            self.unset = fastlinear.Linear(4, 4, activation="relu")
            self.unset.activation, self.unset.accumulate_into_main_grad = None, False
            self.plain = nn.Linear(4, 4)

        def forward(self, input: Tensor) -> Tensor:
            return self.plain(self.unset(self.norm(self.made(self.pair(input)))))

    model, input = Model(), torch.randn(3, 5)
    names = ("pair.gate_proj", "pair.up_proj", "made", "norm", "unset", "plain")
    expected = result(model, input)
    convert(model)
    assert revert(model).converted == ("plain",)
    assert revert(model, made=True) == fastlinear.Report(names[:5], ())
    assert set(kinds(model).values()) == {"torch"}
    assert set(vars(model.unset)) == set(vars(nn.Linear(4, 4)))
    torch.testing.assert_close(result(model, input), expected)
    assert convert(model) == fastlinear.Report(names, ())
    torch.testing.assert_close(result(model, input), expected)
    assert revert(model).converted == names


def with_a_forward() -> nn.Module:
    layer = fastlinear.Linear(5, 3)
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


MADE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (
        lambda: fastlinear.Linear(5, 3, activation="relu"),
        "has an activation, which an nn.Linear does not apply",
    ),
    "main_grad": (
        lambda: fastlinear.Linear(5, 3, accumulate_into_main_grad=True),
        "accumulates into main_grad, which an nn.Linear does not",
    ),
    "forward": (with_a_forward, "its forward was replaced"),
    "subclass": (
        lambda: type("Own", (fastlinear.Linear,), {})(5, 3),
        "is a Own, not fastlinear.Linear",
    ),
}


@pytest.mark.parametrize(("make", "reason"), MADE.values(), ids=MADE)
def test_layers_made_for_more_are_not_reverted(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make())
    kind = type(model[0])
    assert revert(model, made=True) == fastlinear.Report((), (("0", reason),))
    assert type(model[0]) is kind


def test_folded_layers_made_as_fastlinear_are_reverted_on_request() -> None:
    model = nn.Sequential(fastlinear.Linear(5, 4), nn.ReLU())
    convert(model, fold_activations=True)
    report = revert(model, made=True)
    assert (report.converted, report.folded) == (("0",), (("0", "1", "relu"),))
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU]
    assert set(vars(model[0])) == set(vars(nn.Linear(5, 4)))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization", "ignore:.*quantize")
def test_reverted_layers_are_quantized() -> None:
    model = nn.Sequential(fastlinear.GatedLinear(5, 4), nn.ReLU(), fastlinear.Linear(4, 3))
    input = torch.randn(2, 5)
    expected = model(input)
    assert revert(model, made=True).skipped == ()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    found = [type(module).__module__ for module in quantized.modules()]
    assert found.count("torch.ao.nn.quantized.dynamic.modules.linear") == 3
    torch.testing.assert_close(quantized(input), expected, rtol=0.1, atol=0.1)


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
