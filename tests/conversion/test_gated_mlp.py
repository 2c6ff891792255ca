"""`convert` and gated MLPs: which it finds, and that they compute what they did."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mlps import MLP, with_features
from torch import Tensor, nn

import fastlinear
from fastlinear import convert, revert
from fastlinear.kernels.launching import launch


class Swapped(MLP):
    def forward(self, x: Tensor) -> Tensor:
        """The factors the other way round."""
        down_proj = self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))
        return down_proj


class GELUTanh(nn.Module):
    """An activation of a library's own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


FOUND = {
    "as Llama": (MLP(), "silu"),
    "factors swapped": (Swapped(), "silu"),
    "gelu": (MLP(nn.GELU()), "gelu"),
    "gelu_tanh": (MLP(nn.GELU("tanh")), "gelu_tanh"),
    "relu in place": (MLP(nn.ReLU(inplace=True)), "relu"),
    "tanh": (MLP(nn.Tanh()), "tanh"),
}


def results(model: nn.Module, input: Tensor) -> list[Any]:
    model.zero_grad()
    input = input.detach().requires_grad_()
    output = model(input)
    output.pow(2).sum().backward()
    return [output, input.grad, *(one.grad for one in model.parameters())]


@pytest.fixture
def gated_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    run_kernel = launch.run

    def run(kernel: Any, *arguments: Any) -> None:
        if kernel.fn.__name__ == "gated_linear_forward_kernel":
            names.append(kernel.fn.__name__)
        run_kernel(kernel, *arguments)

    monkeypatch.setattr(launch, "run", run)
    return names


@pytest.mark.parametrize(("mlp", "activation"), FOUND.values(), ids=FOUND)
def test_convert_gates_mlps_and_revert_undoes_it(
    mlp: MLP,
    activation: str,
    backend: str,
    gated_launches: list[str],
    device: torch.device,
) -> None:
    model = nn.Sequential(nn.Linear(5, 5), mlp).to(device, torch.float64)
    kind, keys, parameters = type(mlp), list(model.state_dict()), list(model.parameters())
    input = torch.randn(4, 5, dtype=torch.float64, device=device)
    before = results(model, input)
    report = convert(model)
    assert report.gated == (("1", activation),)
    assert f"gated pair with {activation}" in str(report)
    torch.testing.assert_close(results(model, input), before)
    assert len(gated_launches) == (backend == "triton")
    assert isinstance(mlp, kind)
    assert mlp.width() == 7
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    assert revert(model).skipped == ()
    assert type(mlp) is kind
    assert not [name for name in vars(mlp) if "fastlinear" in name]
    torch.testing.assert_close(results(model, input), before)
    assert len(gated_launches) == (backend == "triton")


class Dropping(MLP):
    """Something between, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(x))
        if self.training:
            gate = gate * 2
        return self.down_proj(gate * self.up_proj(x))


class Residual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x)) + gate.sum()


class ByValue(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class UpFirst(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Added(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Optional(MLP):
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Keeping(MLP):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Decorated(MLP):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ParticularOfSubclasses(MLP):
    def __init_subclass__(cls, *, why: str) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OfNoSource(MLP):
    forward = eval(
        "lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
    )


def with_hook(mlp: MLP) -> MLP:
    mlp.act_fn.register_forward_hook(lambda module, inputs, output: output)
    return mlp


def with_forward(mlp: MLP) -> MLP:
    mlp.forward = lambda x: x  # type: ignore[method-assign]
    return mlp


LEFT = {
    "training differs": Dropping(),
    "evaluation differs": Dropping().eval(),
    "gate read twice": Residual(),
    "ways by value": ByValue(),
    "gate and up exchanged": UpFirst(),
    "sum": Added(),
    "optional argument": Optional(),
    "sets an attribute": Keeping(),
    "decorated": Decorated(),
    "no subclass without a reason": ParticularOfSubclasses(),
    "no source": OfNoSource(),
    "another activation": MLP(nn.Softplus()),
    "an activation of its own": MLP(GELUTanh()),
    "leaky with another slope": MLP(nn.LeakyReLU(0.2)),
    "hook on act_fn": with_hook(MLP()),
    "forward of its own": with_forward(MLP()),
    "one gate for all features": with_features(1),
    "one feature for all gates": with_features(7, 1),
}


@pytest.mark.parametrize("mlp", LEFT.values(), ids=LEFT)
def test_convert_leaves_what_is_no_gated_mlp(mlp: MLP) -> None:
    kind, input = type(mlp), torch.randn(4, 5)
    before, modes = mlp(input), [part.training for part in mlp.modules()]
    report = convert(mlp)
    assert report.gated == ()
    assert report.converted == ("gate_proj", "up_proj", "down_proj")
    assert type(mlp) is kind
    assert [part.training for part in mlp.modules()] == modes
    torch.testing.assert_close(mlp(input), before)


def test_convert_gates_no_mlp_whose_layers_the_filter_left() -> None:
    report = convert(MLP(), filter=lambda name, layer: name != "up_proj")
    assert report.gated == ()


def test_gating_keeps_what_is_shown() -> None:
    mlp = MLP()
    shown, name = repr(mlp), type(mlp).__qualname__
    convert(mlp)
    assert (repr(mlp), type(mlp).__qualname__) == (shown, name)


def test_a_gated_mlp_reverted_in_part_computes_the_same(backend: str) -> None:
    mlp, input = MLP(), torch.randn(4, 5)
    before = mlp(input)
    convert(mlp)
    revert(mlp.up_proj)
    torch.testing.assert_close(mlp(input), before)
    convert(mlp)
    torch.testing.assert_close(mlp(input), before)


def test_folding_leaves_gated_pairs_and_what_they_share(backend: str) -> None:
    class Block(nn.Module):
        """An MLP whose activation another layer has as well, and a pair of fastlinear's own."""

        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.first = MLP(), nn.Linear(5, 5)
            self.own = fastlinear.GatedLinear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(self.mlp(self.mlp.act_fn(self.first(x))))

    block, input = Block(), torch.randn(4, 5)
    before = block(input)
    report = convert(block, fold_activations=True)
    assert report.gated == (("mlp", "silu"),)
    assert report.folded == ()
    assert {name for name, _ in report.skipped} == {"own.gate_proj", "own.up_proj"}
    torch.testing.assert_close(block(input), before)
    block.mlp.up_proj.register_forward_hook(lambda module, inputs, output: output)
    torch.testing.assert_close(block(input), before)
    assert revert(block).gated == report.gated
    torch.testing.assert_close(block(input), before)


def test_converting_twice_gates_once() -> None:
    mlp = MLP()
    assert convert(mlp).gated == (("", "silu"),)
    assert convert(mlp).gated == ()
    assert revert(mlp).converted == ("gate_proj", "up_proj", "down_proj")
    assert type(mlp) is MLP


def test_a_gated_mlp_compiles_whole(backend: str) -> None:
    torch._dynamo.reset()
    mlp, input = MLP(), torch.randn(4, 5)
    before = mlp(input)
    convert(mlp)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), before)


def test_a_gated_pair_of_an_activation_that_is_unknown_stays(device: torch.device) -> None:
    mlp = MLP(nn.GELU(approximate="none"))
    mlp.act_fn.approximate = "other"  # type: ignore[union-attr]
    assert convert(mlp).gated == ()


def test_gated_linear_stands_in_a_model_of_its_own(backend: str, device: torch.device) -> None:
    class Block(fastlinear.GatedLinear):
        """Llama's MLP, written with GatedLinear: its checkpoints load."""

        def __init__(self) -> None:
            super().__init__(5, 7, bias=False)
            self.down_proj = nn.Linear(7, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(super().forward(x))

    plain, block = MLP(), Block()
    block.load_state_dict(plain.state_dict())
    input = torch.randn(4, 5, device=device)
    torch.testing.assert_close(block.to(device)(input), plain.to(device)(input))
