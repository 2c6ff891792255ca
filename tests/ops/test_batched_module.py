"""`BatchedLinear`, next to as many `nn.Linear` as it has layers."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batched import made, members, one_by_one
from oracle import (
    normal,
)
from torch import Tensor, nn

import fastlinear

pytestmark = pytest.mark.usefixtures("backend")

of_the_module_alone = pytest.mark.parametrize("backend", ["auto"], indirect=True)


def parameters_of(linears: list[Any], name: str) -> list[Tensor]:
    return [getattr(layer, name) for layer in linears]


FEATURES = {"some": (50, 30), "one": (1, 1), "no in": (0, 3), "no out": (5, 0), "none": (0, 0)}


@of_the_module_alone
@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_initial_values_are_those_of_layers_made_one_after_another(
    features: tuple[int, int], dtype: torch.dtype, bias: bool, layers: int, device: torch.device
) -> None:
    options = {"bias": bias, "device": device, "dtype": dtype}
    batch, given, random = made(lambda: fastlinear.BatchedLinear(layers, *features, **options))
    linears, their_warnings, their_random = made(
        lambda: [nn.Linear(*features, **options) for _ in range(layers)]
    )
    assert given == their_warnings
    assert torch.equal(random, their_random)
    assert batch.weight.shape == (layers, features[1], features[0])
    assert batch.weight.dtype == dtype
    assert all(map(torch.equal, batch.weight, parameters_of(linears, "weight")))
    if bias:
        assert batch.bias.shape == (layers, features[1])
        assert all(map(torch.equal, batch.bias, parameters_of(linears, "bias")))
    else:
        assert batch.bias is None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_from_linears_and_back_gives_the_same(bias: bool, device: torch.device) -> None:
    linears = [nn.Linear(5, 3, bias, device, torch.float64) for _ in range(4)]
    batch = fastlinear.BatchedLinear.from_linears(iter(linears))
    input = normal((4, 6, 5), torch.float64, device)
    torch.testing.assert_close(batch(input), one_by_one(linears)(input))
    back = batch.to_linears()
    assert [type(layer) for layer in back] == [fastlinear.Linear] * 4
    for layer, original in zip(back, linears, strict=True):
        assert repr(layer) == repr(original)
        assert list(layer.state_dict()) == list(original.state_dict())
        assert all(map(torch.equal, layer.parameters(), original.parameters()))
        assert all(one.is_leaf and one.requires_grad for one in layer.parameters())
    with torch.no_grad():  # copies: neither module sees what the other does
        linears[0].weight.zero_()
        batch.weight[1].zero_()
    assert batch.weight[0].any()
    assert back[1].weight.any()
    assert linears[1].weight.any()


def test_from_linears_keeps_what_the_layers_have_in_common(device: torch.device) -> None:
    linears = [
        fastlinear.Linear(5, 3, device=device, dtype=torch.bfloat16, activation="silu").eval()
        for _ in range(2)
    ]
    for layer in linears:
        layer.weight.requires_grad_(False)
    random = torch.get_rng_state()
    batch = fastlinear.BatchedLinear.from_linears(linears)
    assert torch.equal(torch.get_rng_state(), random)
    for module in (batch, *batch.to_linears()):
        assert module.activation == "silu"
        assert not module.training
        assert module.weight.dtype == torch.bfloat16
        assert module.weight.device == linears[0].weight.device
        assert (module.weight.requires_grad, module.bias.requires_grad) == (False, True)


def frozen(layer: nn.Linear) -> nn.Linear:
    layer.weight.requires_grad_(False)
    return layer


UNLIKE: dict[str, tuple[Callable[[], list[Any]], type[Exception], str]] = {
    "none": (list, ValueError, "one or more layers, but linears has none"),
    "no layer": (
        lambda: [nn.Linear(5, 3), nn.Bilinear(5, 3, 2)],
        TypeError,
        "nn.Linear, but layer 1 is Bilinear",
    ),
    "shapes": (
        lambda: [nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 5)],
        ValueError,
        r"the shape of weight of layer 0 is \(3, 5\) and of layer 2 \(5, 3\)",
    ),
    "bias": (
        lambda: [nn.Linear(5, 3), nn.Linear(5, 3, bias=False)],
        ValueError,
        r"the shape of bias of layer 0 is \(3,\) and of layer 1 None",
    ),
    "dtypes": (
        lambda: [nn.Linear(5, 3), nn.Linear(5, 3).half()],
        ValueError,
        "the dtype of weight of layer 0 is torch.float32 and of layer 1 torch.float16",
    ),
    "devices": (
        lambda: [nn.Linear(5, 3), nn.Linear(5, 3, device="meta")],
        ValueError,
        "the device of weight of layer 0 is cpu and of layer 1 meta",
    ),
    "frozen": (
        lambda: [nn.Linear(5, 3), frozen(nn.Linear(5, 3))],
        ValueError,
        "requires_grad of weight of layer 0 is True and of layer 1 False",
    ),
    "activations": (
        lambda: [nn.Linear(5, 3), fastlinear.Linear(5, 3, activation="relu")],
        ValueError,
        "the activation of layer 0 is None and of layer 1 relu",
    ),
}


@of_the_module_alone
@pytest.mark.parametrize(("make", "kind", "said"), UNLIKE.values(), ids=UNLIKE)
def test_from_linears_says_in_what_layers_differ(
    make: Callable[[], list[Any]], kind: type[Exception], said: str
) -> None:
    with pytest.raises(
        kind, match=rf"^from_linears\(\) takes (layers that are alike, but )?{said}$"
    ):
        fastlinear.BatchedLinear.from_linears(make())


def reloaded(thing: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: reloaded(module, weights_only=False),
}


@of_the_module_alone
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_the_same_module(
    copied: Callable[[Any], Any], bias: bool, device: torch.device
) -> None:
    batch = fastlinear.BatchedLinear(2, 5, 3, bias, device, activation="relu")
    twin = copied(batch)
    assert repr(twin) == repr(batch)
    assert repr(batch) == (
        "BatchedLinear(num_linears=2, in_features=5, out_features=3, "
        f"bias={bias}, activation='relu')"
    )
    assert list(twin.state_dict()) == ["weight", "bias"][: 1 + bias]
    input = normal((2, 4, 5), torch.float32, device)
    assert torch.equal(twin(input), batch(input))
    assert (twin.weight is batch.weight) == (copied is copy.copy)


@of_the_module_alone
def test_state_dict_loads(device: torch.device) -> None:
    batch, other = (fastlinear.BatchedLinear(2, 5, 3, device=device) for _ in range(2))
    assert not torch.equal(batch.weight, other.weight)
    other.load_state_dict(reloaded(batch.state_dict(), weights_only=True), strict=True)
    assert all(map(torch.equal, batch.parameters(), other.parameters()))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        fastlinear.BatchedLinear(3, 5, 3, device=device).load_state_dict(batch.state_dict())


@of_the_module_alone
def test_meta_then_empty_then_reset_is_as_made(device: torch.device) -> None:
    expected, _, random = made(lambda: fastlinear.BatchedLinear(2, 5, 3, device=device))
    skipped, _, untouched = made(
        lambda: nn.utils.skip_init(fastlinear.BatchedLinear, 2, 5, 3, device=device)
    )
    empty = fastlinear.BatchedLinear(2, 5, 3, device="meta")
    assert empty.weight.is_meta
    assert empty(torch.empty(2, 4, 5, device="meta")).shape == (2, 4, 3)
    for module in (skipped, empty.to_empty(device=device)):
        _, _, drawn = made(module.reset_parameters)
        assert torch.equal(drawn, random)
        assert all(map(torch.equal, module.parameters(), expected.parameters()))
        assert all(one.requires_grad for one in module.parameters())
    assert not torch.equal(untouched, random)


def test_an_ensemble_trains_as_its_members(device: torch.device) -> None:
    batch, linears = members(device)
    data = normal((8, 5), torch.float64, device)
    target = normal((3, 8, 2), torch.float64, device)
    ours = torch.optim.Adam(batch.parameters())
    theirs = torch.optim.Adam([one for layer in linears for one in layer.parameters()])
    for _ in range(3):
        ours.zero_grad()
        (batch(data.expand(3, -1, -1)) - target).square().sum().backward()
        ours.step()
        theirs.zero_grad()
        (one_by_one(linears)(data.expand(3, -1, -1)) - target).square().sum().backward()
        theirs.step()
    torch.testing.assert_close(
        [batch.weight.detach(), batch.bias.detach()],
        [torch.stack(parameters_of(linears, name)).detach() for name in ("weight", "bias")],
    )


def test_batched_activation_is_checked_when_it_is_set() -> None:
    layer = fastlinear.BatchedLinear(2, 3, 4, activation="relu")
    with pytest.raises(ValueError, match="activation must be None or one of 'relu'"):
        layer.activation = nn.ReLU()
    assert layer.activation == "relu"


@of_the_module_alone
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_batched_module_is_scripted(bias: bool, activation: str | None, backend: str) -> None:
    layer = fastlinear.BatchedLinear(3, 5, 7, bias, activation=activation).eval()
    input = torch.randn(3, 4, 5)
    scripted, file = torch.jit.script(layer), io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for compiled in (scripted, torch.jit.load(file), torch.jit.freeze(scripted)):
        torch.testing.assert_close(compiled(input), layer(input))
