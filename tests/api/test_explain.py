"""`explain` and `python -m fastlinear info`: what they say is what happens."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import fastlinear
from fastlinear.kernels.launching import launch

INPUTS: dict[str, Callable[[torch.device], Tensor]] = {
    "one row": lambda device: torch.randn(1, 40, device=device),
    "vector": lambda device: torch.randn(40, device=device),
    "split sums": lambda device: torch.randn(2, 300, 40, device=device),
    "transposed": lambda device: torch.randn(40, 33, device=device).t(),
    "sliced": lambda device: torch.randn(64, 83, device=device)[::2, 3:43],
    "copied rows": lambda device: torch.randn(2, 3, 4, 40, device=device).permute(2, 1, 0, 3),
    "two launches": lambda device: torch.randn(500, 400, device=device),
}
CASES = {  # input, what needs a gradient, autocast, activation
    **{name: (name, "both", False, None) for name in INPUTS},
    "activation": ("one row", "both", False, "gelu"),
    "activation, split sums": ("split sums", "both", False, "relu"),
    "activation, two launches": ("two launches", "both", False, "silu"),
    "activation, no gradient": ("one row", "none", False, "gelu"),
    "input's gradient": ("one row", "input", False, None),
    "weight's gradient": ("one row", "weight", False, None),
    "no gradient": ("one row", "none", False, None),
    "autocast": ("transposed", "both", True, None),
    "autocast of a slice": ("sliced", "both", True, None),
}


@pytest.mark.parametrize(("name", "needs", "autocast", "activation"), CASES.values(), ids=CASES)
@pytest.mark.usefixtures("triton_backend")
def test_explained_launches_are_those_that_happen(
    name: str,
    needs: str,
    autocast: bool,
    activation: str | None,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    features = INPUTS[name](device).shape[-1]
    layer = fastlinear.Linear(features, 70, device=device, activation=activation)
    layer.requires_grad_(needs in ("weight", "both"))
    input = INPUTS[name](device).requires_grad_(needs in ("input", "both"))
    launched: list[tuple[str, tuple[int, ...]]] = []
    run = launch.run

    def spy(kernel, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:  # type: ignore[no-untyped-def]
        both = kernel.__name__ == "linear_backward_kernel"
        for tile in ("INPUT_TILE", "WEIGHT_TILE") if both else ("TILE",):
            launched.append((kernel.__name__, plan.constants.get(tile, ())[:3]))
        run(kernel, plan, pointers)

    monkeypatch.setattr(launch, "run", spy)
    context = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    with context:
        said = fastlinear.explain(layer, input)
        assert launched == []
        output = layer(input)
        if output.requires_grad:
            output.backward(torch.randn_like(output))
    assert said.path == "fastlinear.kernels"
    assert said.dtype == str(output.dtype).removeprefix("torch.")
    expected = []
    for product in said.products:
        assert product.kernel is not None
        config = product.config
        blocks = () if config is None else (config.block_m, config.block_n, config.block_k)
        expected.append((product.kernel, blocks))
    # Backward is explained in the order of the operands, and not launched in it.
    assert sorted(launched) == sorted(expected)
    assert [product.name for product in said.products] == (
        ["output"]
        + ["grad_preactivation"] * (activation is not None and needs != "none")
        + ["grad_input"] * (needs in ("input", "both"))
        + ["grad_weight"] * (needs in ("weight", "both"))
    )


@pytest.mark.usefixtures("triton_backend")
def test_explained_work_is_counted(device: torch.device) -> None:
    layer = fastlinear.Linear(40, 70, device=device, dtype=torch.float64)
    input = torch.randn(4, 25, 40, device=device, dtype=torch.float64, requires_grad=True)
    output, grad_input, grad_weight = fastlinear.explain(layer, input).products
    assert {output.operations, grad_input.operations, grad_weight.operations} == {2 * 100 * 40 * 70}
    assert output.bytes == 8 * (100 * 40 + 70 * 40 + 70 + 100 * 70)
    assert grad_input.bytes == 8 * (100 * 70 + 70 * 40 + 100 * 40)
    assert grad_weight.bytes == 8 * (100 * 70 + 100 * 40 + 70 * 40 + 70)
    with torch.no_grad():
        assert len(fastlinear.explain(layer, input).products) == 1


@pytest.mark.parametrize("both", [False, True], ids=["weight's gradient", "both gradients"])
@pytest.mark.usefixtures("triton_backend")
def test_explained_splits_are_those_of_the_launch(both: bool, device: torch.device) -> None:
    layer = fastlinear.Linear(10, 20, device=device)
    said = fastlinear.explain(layer, torch.randn(100_000, 10, device=device, requires_grad=both))
    *_, grad_weight = said.products
    assert grad_weight.splits > 1
    assert f"{grad_weight.splits} splits" in str(said)


@pytest.mark.usefixtures("triton_backend")
def test_explained_products_are_formed_as_in_the_launch(device: torch.device) -> None:
    layer = fastlinear.Linear(512, 7, device=device)
    input = torch.randn(96, 512, device=device, requires_grad=True)
    with fastlinear.use_float32_products("bf16x6"):
        said = fastlinear.explain(layer, input)
        few = fastlinear.explain(layer, input[:3])
    assert [product.precision for product in said.products] == ["bf16x6", "ieee", "ieee"]
    assert [product.precision for product in few.products] == ["ieee"] * 3
    assert str(said).count("bf16x6") == 1
    with fastlinear.use_backend("torch"):
        assert fastlinear.explain(layer, input).products[0].precision is None


def test_explained_path_follows_the_backend(device: torch.device) -> None:
    layer, input = fastlinear.Linear(3, 4, device=device), torch.randn(2, 3, device=device)
    said = fastlinear.explain(layer, input)
    assert (said.backend, said.path) == ("auto", "torch.nn.functional.linear")
    assert "no measurement" in said.reason
    with fastlinear.use_backend("torch"):
        assert fastlinear.explain(layer, input).path == "torch.nn.functional.linear"
    with fastlinear.use_backend("triton"):
        assert fastlinear.explain(layer, input).path == "fastlinear.kernels"
        said = fastlinear.explain(nn.Linear(3, 4, device=device), input)
        assert said.path == "torch.nn.functional.linear"
        assert "fastlinear.convert" in said.reason


def test_explained_refusals_are_what_the_call_raises(device: torch.device) -> None:
    layer, input = (
        fastlinear.Linear(3, 4, bias=False, device=device),
        torch.randn(2, 3, device=device),
    )
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    assert "weight has layout torch.sparse_coo" in fastlinear.explain(layer, input).reason
    with fastlinear.use_backend("triton"):
        said = fastlinear.explain(layer, input)
        with pytest.raises(TypeError, match=r"weight has layout torch\.sparse_coo"):
            layer(input)
    assert said.path is None
    assert said.products == ()
    assert "raises TypeError" in said.reason
    assert "no path" in str(said)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_explain_raises_what_the_layer_raises(backend: str, device: torch.device) -> None:
    layer = fastlinear.Linear(3, 4, device=device)
    for input in (torch.ones(2, 5, device=device), torch.ones(2, 3, device=device).double()):
        with fastlinear.use_backend(backend):
            with pytest.raises(RuntimeError) as raised:
                layer(input)
            with pytest.raises(RuntimeError) as explained:
                fastlinear.explain(layer, input)
        assert str(explained.value) == str(raised.value)


@pytest.mark.usefixtures("triton_backend")
def test_explained_bias_of_one_element_is_that_of_the_call(device: torch.device) -> None:
    layer, input = fastlinear.Linear(3, 4, device=device), torch.randn(2, 3, device=device)
    layer.bias = nn.Parameter(torch.ones(1, device=device))
    layer(input)
    assert fastlinear.explain(layer, input).path == "fastlinear.kernels"


@pytest.mark.usefixtures("triton_backend")
def test_explained_gradients_are_those_that_are_wanted(device: torch.device) -> None:
    layer, input = fastlinear.Linear(3, 4, device=device), torch.randn(2, 3, device=device)
    layer.bias.requires_grad_(False)
    whole = fastlinear.explain(layer, input).products[-1]
    assert (whole.name, whole.bytes) == ("grad_weight", 4 * (2 * 4 + 2 * 3 + 4 * 3))
    layer.bias.requires_grad_(True)
    layer.weight.requires_grad_(False)
    alone = fastlinear.explain(layer, input).products[-1]
    assert (alone.name, alone.kernel, alone.operations) == ("grad_bias", None, 2 * 4)


def test_explain_leaves_parametrizations_as_they_are(device: torch.device) -> None:
    layer = nn.utils.parametrizations.spectral_norm(fastlinear.Linear(3, 4, device=device))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    fastlinear.explain(layer, torch.randn(2, 3, device=device))
    assert layer.training
    assert all(module.training for module in layer.modules())
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.usefixtures("triton_backend")
def test_explain_knows_only_its_own_forward(device: torch.device) -> None:
    layer, input = fastlinear.Linear(3, 4, device=device), torch.randn(2, 3, device=device)
    layer.forward = lambda input: input
    said = fastlinear.explain(layer, input)
    assert said.path is None
    assert "a forward of its own" in said.reason


@pytest.mark.usefixtures("triton_backend")
def test_explain_launches_nothing_on_meta_tensors() -> None:
    layer = fastlinear.Linear(3, 4, device="meta")
    said = fastlinear.explain(layer, torch.empty(2, 3, device="meta"))
    assert "nothing to launch" in said.reason
    assert {product.kernel for product in said.products} == {None}


def test_explain_names_what_it_takes() -> None:
    with pytest.raises(TypeError, match=r"takes an nn.Linear, but layer is ReLU"):
        fastlinear.explain(nn.ReLU(), torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes a Tensor, but input is list"):
        fastlinear.explain(fastlinear.Linear(3, 4), [1.0])  # type: ignore[arg-type]


@pytest.mark.usefixtures("triton_backend")
def test_explanation_reads_as_text_and_as_json(device: torch.device) -> None:
    layer = fastlinear.Linear(40, 70, device=device, activation="relu")
    said = fastlinear.explain(layer, torch.randn(5, 40, device=device))
    assert json.loads(json.dumps(said.as_dict()))["products"][0]["config"]["block_m"] > 0
    text = str(said)
    for part in ("(5, 40)", "(70, 40)", "_kernel, blocks", "28 kop", "relu", "torch 2."):
        assert part in text


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["text", "json"])
def test_info_says_what_runs_here(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastlinear", "info", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stderr == ""
    found = result.stdout
    if arguments:
        assert json.loads(found)["versions"]["torch"] == torch.__version__
    assert torch.__version__ in found
    assert fastlinear.__version__ in found
    assert "launches" not in found
    assert ("interpreter" if launch.INTERPRETING else torch.cuda.get_device_name()) in found


def test_info_without_triton_says_what_to_install() -> None:
    code = "import sys; sys.modules['triton'] = None; from fastlinear.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "info"], capture_output=True, text=True, timeout=120
    )
    assert "pip install 'fastlinear[triton]'" in result.stdout


def test_info_says_that_triton_is_newer_than_is_known_and_kernels_run(device: torch.device) -> None:
    code = f"""
import torch, triton
triton.__version__ = "3.99.0"
import fastlinear
from fastlinear.__main__ import main
main()
layer = fastlinear.Linear(3, 4, device="{device}")
input = torch.randn(2, 3, device="{device}")
with fastlinear.use_backend("torch"):
    expected = layer(input)
with fastlinear.use_backend("triton"):
    torch.testing.assert_close(layer(input), expected)
from fastlinear.kernels.launching import compiled_launch
assert not compiled_launch.DIRECT
"""
    result = subprocess.run(
        [sys.executable, "-c", code, "info"], capture_output=True, text=True, timeout=120
    )
    assert result.stderr == ""
    assert result.returncode == 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("launches")]
    assert "all by Triton" in line
    assert line.endswith("this is 3.99.0")
