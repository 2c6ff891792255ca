"""Gated MLPs that something changes, copies, traces or scripts after they were converted."""

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mlps import MLP, with_features
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastlinear
from fastlinear import convert, revert


class Adapted(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 1


def adapt(mlp: MLP) -> None:
    mlp.up_proj = Adapted(mlp.up_proj)  # type: ignore[assignment]


def hook(mlp: MLP) -> None:
    mlp.gate_proj.register_forward_hook(lambda module, inputs, output: output + 1)


def hook_activation(mlp: MLP) -> None:
    mlp.act_fn.register_forward_hook(lambda module, inputs, output: output + 1)


def replace_activation(mlp: MLP) -> None:
    mlp.act_fn = nn.ReLU()


def test_a_gated_mlp_has_any_module_for_down_proj() -> None:
    mlp, input = MLP(), torch.randn(4, 5)
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.ReLU())  # type: ignore[assignment]
    before = mlp(input)
    assert convert(mlp).gated == (("", "silu"),)
    torch.testing.assert_close(mlp(input), before)


def one_gate(mlp: MLP) -> None:
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight[:1].detach())


def tie(mlp: MLP) -> None:
    mlp.up_proj = mlp.gate_proj


def one_bias(mlp: MLP) -> None:
    mlp.up_proj.bias = nn.Parameter(torch.ones(7))


CHANGES = [adapt, hook, hook_activation, replace_activation, one_gate, tie, one_bias]


@pytest.mark.parametrize("change", CHANGES)
def test_a_gated_mlp_computes_what_it_has_become(
    change: Callable[[MLP], None], backend: str
) -> None:
    mlp = MLP()
    plain, input = copy.deepcopy(mlp), torch.randn(4, 5)
    assert convert(mlp).gated
    change(mlp)
    change(plain)
    torch.testing.assert_close(mlp(input), plain(input))
    assert not torch.equal(mlp(input), MLP.forward(MLP(), input))
    torch.testing.assert_close(mlp(x=input), plain(x=input))


PATCHED = {
    "nn.Linear": (nn.Linear, "forward"),
    "nn.Linear's call": (nn.Linear, "__call__"),
    "fastlinear.Linear": (fastlinear.Linear, "forward"),
    "the activation": (nn.SiLU, "forward"),
    "the MLP": (MLP, "forward"),
}


@pytest.mark.parametrize(("kind", "name"), PATCHED.values(), ids=PATCHED)
@pytest.mark.parametrize("make", [MLP, lambda: fastlinear.GatedLinear(5, 7)], ids=["MLP", "pair"])
def test_a_gated_pair_runs_what_is_set_on_a_class_later(
    make: Callable[[], nn.Module], kind: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, input, original = make(), torch.randn(4, 5), getattr(kind, name)
    convert(model)
    expected, calls = model(input), []
    twin = pickle.loads(pickle.dumps(model))

    def patched(self: nn.Module, *args: Tensor) -> Tensor:
        calls.append(type(self).__name__)
        return original(self, *args)

    monkeypatch.setattr(kind, name, patched)
    runs = isinstance(model, MLP) or issubclass(kind, nn.Linear)
    for one in (model, twin, pickle.loads(pickle.dumps(model))):
        calls.clear()
        torch.testing.assert_close(one(input), expected)
        assert bool(calls) == runs


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_gated_mlp_copied_is_the_same(duplicate: Callable[[Any], Any], backend: str) -> None:
    mlp, input = MLP(), torch.randn(4, 5)
    before = mlp(input)
    convert(mlp)
    twin = duplicate(mlp)
    assert type(twin) is type(mlp)
    torch.testing.assert_close(twin(x=input), before)
    assert twin.act_fn is vars(twin)["_fastlinear_gate"][0] is not mlp.act_fn
    revert(twin)
    assert type(twin) is MLP
    torch.testing.assert_close(twin(input), before)


class Locked(MLP):
    """Says itself what of it is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.kind = threading.Lock(), "dense"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def train(self, mode: bool = True) -> "Locked":
        raise AssertionError("convert is not to call train()")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_gating_leaves_a_class_its_own_ways() -> None:
    mlp, input = Locked(), torch.randn(4, 5)
    before = mlp(input)
    assert convert(mlp).gated == (("", "silu"),)
    twin = copy.deepcopy(mlp)
    assert not hasattr(twin, "lock")
    assert twin.kind == mlp.kind == "dense"
    torch.testing.assert_close(twin(input), before)
    another = type(mlp)()
    torch.testing.assert_close(another(input), MLP.forward(another, input))
    assert revert(mlp).gated == (("", "silu"),)
    assert type(mlp) is Locked


def test_reverting_leaves_mlps_whose_class_or_forward_has_changed() -> None:
    wrapped, parametrized = MLP(), MLP()
    parametrized.register_parameter("scale", nn.Parameter(torch.ones(1)))
    input = torch.randn(4, 5)
    before = wrapped(input), parametrized(input)
    convert(wrapped)
    convert(parametrized)
    wrapped.forward = functools.partial(wrapped.forward)  # type: ignore[method-assign]
    parametrize.register_parametrization(parametrized, "scale", nn.Identity())
    assert revert(wrapped).gated == revert(parametrized).gated == ()
    torch.testing.assert_close((wrapped(input), parametrized(input)), before)
    torch.testing.assert_close(parametrized.scale, torch.ones(1))
    parametrize.remove_parametrizations(parametrized, "scale")
    assert revert(parametrized).gated == (("", "silu"),)
    assert convert(parametrized).gated == (("", "silu"),)
    assert convert(nn.Sequential(MLP()), filter=None).gated == (("0", "silu"),)


def test_a_gated_mlp_under_symbolic_trace_and_export() -> None:
    model, input = nn.Sequential(MLP()), torch.randn(4, 5)
    before = model(input)
    convert(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(input), before)
    torch.testing.assert_close(torch.fx.symbolic_trace(model[0])(input), before)
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
    program = torch.export.export(model[0], (input,), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(input), before)


def saved_and_loaded(scripted: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


SCRIPTED: dict[str, Callable[[nn.Module], Any]] = {
    "script": torch.jit.script,
    "script, saved and loaded": lambda model: saved_and_loaded(torch.jit.script(model)),
    "script, within a model": lambda model: torch.jit.script(nn.Sequential(model, nn.Identity())),
    "script, frozen": lambda model: torch.jit.freeze(torch.jit.script(model.eval())),
    "trace": lambda model: torch.jit.trace(model, torch.randn(3, 5)),
}


class Annotated(MLP):
    """Has an attribute whose type TorchScript learns from the class alone."""

    names: list[str]

    def __init__(self) -> None:
        super().__init__(nn.GELU())
        self.names = []

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))

    @torch.jit.export
    def named(self) -> list[str]:
        return self.names


SCRIPTABLE: dict[str, Callable[[], nn.Module]] = {
    "MLP": MLP,
    "annotated": Annotated,
    "broadcasting": lambda: with_features(1),
    "pair": lambda: fastlinear.GatedLinear(5, 7),
    "pair without bias": lambda: fastlinear.GatedLinear(5, 7, bias=False, activation="gelu_tanh"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("compiled", SCRIPTED.values(), ids=SCRIPTED)
@pytest.mark.parametrize("make", SCRIPTABLE.values(), ids=SCRIPTABLE)
def test_torchscript(
    make: Callable[[], nn.Module], compiled: Callable[[nn.Module], Any], backend: str
) -> None:
    model, input = make(), torch.randn(4, 5)
    expected = model(input)
    gated = convert(model).gated
    torch.testing.assert_close(compiled(model)(input), expected)
    assert revert(model).gated == gated
