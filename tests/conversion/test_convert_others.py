"""`fastlinear.convert` where others change layers too: parametrizations, patches, quantizers."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from converting import Subclass, assert_runs_as_before, kinds, mlp, result, runs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastlinear
from fastlinear import convert, revert

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
