"""`fastlinear.convert`: what is left alone and why, and what the filter has to say."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from converting import Subclass, assert_runs_as_before, kinds, mlp, result, runs
from torch import nn
from torch.nn.utils import parametrizations

import fastlinear
from fastlinear import convert, revert


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
