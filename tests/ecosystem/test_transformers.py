"""Hugging Face transformers: a small Llama computes, trains, generates and saves as before."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from twins import LLAMA_LAYERS, Backend, in_float64, small_llama, values_and_gradients

import fastlinear

pytestmark = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def some_tokens(device: torch.device, rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(3, 37, (rows, length), device=device)  # past the special ones


def kinds(model: nn.Module) -> set[type]:
    return {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)}


def test_llama_logits_and_gradients(tied: bool, backend: Backend, device: torch.device) -> None:
    plain = small_llama(device, tied)
    model, exact = copy.deepcopy(plain), in_float64(plain)
    parameters = list(model.parameters())
    report = fastlinear.convert(model)

    assert report.converted == LLAMA_LAYERS
    assert report.skipped == ()
    assert report.gated == (("model.layers.0.mlp", "silu"),)
    assert kinds(model) == {fastlinear.Linear}
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    tokens = some_tokens(device)
    grad_logits = torch.randn(2, 5, 37, device=device)
    backend.assert_equal(
        *(
            values_and_gradients(one, one(input_ids=tokens).logits, grad_logits)
            for one in (model, plain, exact)
        )
    )
    assert backend.calls == (len(LLAMA_LAYERS) if backend.name == "triton" else 0)


def test_llama_trains_with_an_optimizer_made_before(
    tied: bool, backend: Backend, device: torch.device
) -> None:
    start = small_llama(device, tied)
    tokens = some_tokens(device, length=6)

    def trained(model: nn.Module, convert: bool = False) -> dict[str, Tensor]:
        # With the usual eps, parameters of no gradient to speak of would move by its rounding.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2)
        losses = []
        for step in range(3):
            if convert and step == 1:  # the optimizer has its averages by then
                fastlinear.convert(model)
            logits = model(input_ids=tokens).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert losses[0] > losses[1] > losses[2]
        changes = {
            f"change of {name}": parameter.detach() - before.detach()
            for (name, parameter), before in zip(
                model.named_parameters(), start.parameters(), strict=True
            )
        }
        assert all(change.any() for change in changes.values())
        return {"losses": torch.stack(losses), **changes}

    model, plain, exact = copy.deepcopy(start), copy.deepcopy(start), in_float64(start)
    backend.assert_equal(trained(model, convert=True), trained(plain), trained(exact))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_llama_generates_the_same_tokens(
    tied: bool, backend: Backend, device: torch.device
) -> None:
    plain = small_llama(device, tied).eval()
    model = copy.deepcopy(plain)
    fastlinear.convert(model)
    prompt = some_tokens(device)
    generated, expected = (
        one.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            use_cache=True,
            min_new_tokens=6,
            max_new_tokens=6,
            return_dict_in_generate=True,
        )
        for one in (model, plain)
    )
    assert generated.sequences.shape == (2, 5 + 6)
    assert torch.equal(generated.sequences, expected.sequences)
    assert generated.past_key_values.get_seq_length() == 5 + 6 - 1
    # The prompt in one pass, then one token at a time.
    assert backend.calls == (6 * len(LLAMA_LAYERS) if backend.name == "triton" else 0)


def saved(model: nn.Module, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_llama_saved_is_the_same_files(tied: bool, device: torch.device, tmp_path: Path) -> None:
    model = small_llama(device, tied)
    expected = saved(model, tmp_path / "plain")
    assert "model.safetensors" in expected
    fastlinear.convert(model)
    assert saved(model, tmp_path / "converted") == expected
    fastlinear.revert(model)
    assert saved(model, tmp_path / "reverted") == expected


def test_llama_saved_converted_loads_in_plain_and_back(
    tied: bool, backend: Backend, device: torch.device, tmp_path: Path
) -> None:
    plain = small_llama(device, tied)
    exact = in_float64(plain)
    model = copy.deepcopy(plain)
    fastlinear.convert(model)
    model.save_pretrained(tmp_path / "converted")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "converted").to(device)
    assert kinds(loaded) == {nn.Linear}

    plain.save_pretrained(tmp_path / "plain")
    other = small_llama(device, tied)
    fastlinear.convert(other)
    missing, unexpected = other.load_state_dict(
        load_file(tmp_path / "plain" / "model.safetensors"), strict=False
    )
    # Of two tied weights one is saved.
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    assert kinds(other) == {fastlinear.Linear}

    tokens = some_tokens(device)
    grad_logits = torch.randn(2, 5, 37, device=device)
    results = {
        one: values_and_gradients(one, one(input_ids=tokens).logits, grad_logits)
        for one in (loaded, other, plain, exact)
    }
    for name, native in results[plain].items():
        assert torch.equal(results[loaded][name], native), name
    backend.assert_equal(results[other], results[plain], results[exact])
    for one in (loaded, other):
        assert (one.lm_head.weight is one.model.embed_tokens.weight) == tied


def test_llama_reverted_is_as_it_was(tied: bool, device: torch.device) -> None:
    plain = small_llama(device, tied)
    model = copy.deepcopy(plain)
    parameters = list(model.parameters())
    fastlinear.convert(model)
    assert fastlinear.revert(model).converted == LLAMA_LAYERS
    assert kinds(model) == {nn.Linear}
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for one, other in zip(model.modules(), plain.modules(), strict=True):
        assert type(one) is type(other)
        assert vars(one).keys() == vars(other).keys()
    tokens = some_tokens(device)
    with fastlinear.use_backend("triton"):
        assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("hidden_act", "activation"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu")],
)
def test_llama_mlps_of_every_activation_are_gated(
    hidden_act: str, activation: str, tied: bool, backend: Backend, device: torch.device
) -> None:
    model = small_llama(device, tied, hidden_act=hidden_act)
    plain, tokens = copy.deepcopy(model), some_tokens(device)
    assert fastlinear.convert(model).gated == (("model.layers.0.mlp", activation),)
    torch.testing.assert_close(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
