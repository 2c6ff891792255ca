"""nn.TransformerEncoder, its layer and its attention: which layers are converted, and results."""

import copy

import pytest
import torch
from torch import Tensor, nn
from twins import Backend, Results, in_float64, leaf, values_and_gradients

import fastlinear

NOT_CONVERTED = "is a NonDynamicallyQuantizableLinear, not exactly nn.Linear"
ENCODERS = {
    "normalized after": {"batch_first": True},
    "normalized before": {"batch_first": True, "norm_first": True, "activation": "gelu"},
    "sequence first": {"batch_first": False},
}


def encoder_layer(dropout: float = 0.0, **options) -> nn.TransformerEncoderLayer:  # type: ignore[no-untyped-def]
    return nn.TransformerEncoderLayer(16, 2, 40, dropout=dropout, **options)


def encoder(layer: nn.TransformerEncoderLayer, device: torch.device) -> nn.TransformerEncoder:
    # Nested tensors come with the fast path, which takes layers of these options only.
    nested = layer.self_attn.batch_first and not layer.norm_first
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).to(device)


def padding(device: torch.device) -> Tensor:
    """For 3 sequences of 5: the last ends after two."""
    mask = torch.zeros(3, 5, dtype=torch.bool, device=device)
    mask[2, 2:] = True
    return mask


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluated"])
@pytest.mark.parametrize("options", ENCODERS.values(), ids=ENCODERS)
def test_encoder_values_and_gradients(
    options: dict[str, bool], training: bool, backend: Backend, device: torch.device
) -> None:
    plain = encoder(encoder_layer(**options), device).train(training)
    model, exact = copy.deepcopy(plain), in_float64(plain)
    report = fastlinear.convert(model)
    assert report.converted == tuple(
        f"layers.{index}.linear{which}" for index in (0, 1) for which in (1, 2)
    )
    assert report.skipped == tuple(
        (f"layers.{index}.self_attn.out_proj", NOT_CONVERTED) for index in (0, 1)
    )

    shape = (3, 5, 16) if options["batch_first"] else (5, 3, 16)
    input, grad_output = (torch.randn(shape, device=device) for _ in range(2))

    def results(one: nn.Module) -> Results:
        own = leaf(input, one)
        output = one(own, src_key_padding_mask=padding(device))
        return {**values_and_gradients(one, output, grad_output), "gradient of input": own.grad}

    backend.assert_equal(results(model), results(plain), results(exact))
    assert backend.calls == (len(report.converted) if backend.name == "triton" else 0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluated"])
def test_encoder_layer_values_and_gradients(
    training: bool, backend: Backend, device: torch.device
) -> None:
    plain = encoder_layer(batch_first=True).to(device).train(training)
    model, exact = copy.deepcopy(plain), in_float64(plain)
    report = fastlinear.convert(model)
    assert report.converted == ("linear1", "linear2")
    assert report.skipped == (("self_attn.out_proj", NOT_CONVERTED),)
    input, grad_output = (torch.randn(3, 5, 16, device=device) for _ in range(2))

    def results(one: nn.Module) -> Results:
        own = leaf(input, one)
        return {**values_and_gradients(one, one(own), grad_output), "gradient of input": own.grad}

    backend.assert_equal(results(model), results(plain), results(exact))
    assert backend.calls == (2 if backend.name == "triton" else 0)


def test_encoder_drops_the_same_elements(backend: Backend, device: torch.device, seed: int) -> None:
    plain = encoder(encoder_layer(dropout=0.3, batch_first=True), device)
    model = copy.deepcopy(plain)
    fastlinear.convert(model)
    input = torch.randn(3, 5, 16, device=device)
    outputs = []
    for one in (model, plain):
        torch.manual_seed(seed)
        outputs.append(one(input))
    # One element more or less would be seen at any tolerance.
    torch.testing.assert_close(*outputs)
    assert not torch.equal(outputs[1], plain(input)), "nothing was dropped"


# The fast path packs padded sequences so.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("backend", ["auto", "triton"])  # no kernel runs: not the fixture
def test_encoder_fast_path_is_taken_and_gives_the_same_bits(
    backend: str, padded: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = encoder(encoder_layer(batch_first=True), device).eval()
    model = copy.deepcopy(plain)
    fastlinear.convert(model)
    input = torch.randn(3, 5, 16, device=device)
    mask = padding(device) if padded else None
    monkeypatch.setattr(
        fastlinear.modules, "linear", lambda *_: pytest.fail("the fast path was not taken")
    )
    with torch.no_grad(), fastlinear.use_backend(backend):
        for one, other in ((model, plain), (model.layers[0], plain.layers[0])):
            output = one(input, src_key_padding_mask=mask)
            assert torch.equal(output, other(input, src_key_padding_mask=mask))


def test_attention_is_left_alone(device: torch.device) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True, device=device)
    kind = type(attention.out_proj)
    report = fastlinear.convert(attention)
    assert report.converted == ()
    assert report.skipped == (("out_proj", NOT_CONVERTED),)
    assert type(attention.out_proj) is kind
    assert f"out_proj  skipped: {NOT_CONVERTED}" in str(report)
    input = torch.randn(3, 5, 16, device=device)
    with fastlinear.use_backend("triton"):
        output, _ = attention(input, input, input)
    assert output.shape == (3, 5, 16)
