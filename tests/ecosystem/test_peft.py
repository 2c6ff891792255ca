"""PEFT: LoRA around converted layers, converted LoRA, training, merging, saving."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from twins import LLAMA_LAYERS, Backend, Results, in_float64, small_llama, values_and_gradients

import fastlinear

# PEFT asks transformers by a name that transformers has since changed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

# Where LoRA goes: both kinds of layer, square and not; the others are converted all the same.
TARGETS = ("q_proj", "down_proj")
PREFIX = "base_model.model."


def lora(model: nn.Module, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    # Both of its weights random: it starts with B = 0, which would hide A.
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=list(TARGETS), init_lora_weights=False)
    )


def is_target(name: str) -> bool:
    return name.endswith(TARGETS)


def base_names() -> list[str]:
    """The names of Llama's layers inside the PEFT model, in its order."""
    return [PREFIX + name + (".base_layer" if is_target(name) else "") for name in LLAMA_LAYERS]


def lora_names() -> set[str]:
    return {
        f"{PREFIX}{name}.lora_{side}.default"
        for name in LLAMA_LAYERS
        if is_target(name)
        for side in "AB"
    }


def converted_lora(base: nn.Module, order: str, seed: int) -> PeftModel:
    if order == "LoRA, then convert":
        model = lora(base, seed)
        report = fastlinear.convert(model)
        assert set(report.converted) == {*base_names(), *lora_names()}
        assert report.skipped == ()
        assert report.gated == ((f"{PREFIX}model.layers.0.mlp", "silu"),)
        return model
    assert fastlinear.convert(base).converted == LLAMA_LAYERS
    model = lora(base, seed)
    if order == "convert, LoRA, convert again":
        report = fastlinear.convert(model)
        assert set(report.converted) == lora_names()
        assert dict(report.skipped) == dict.fromkeys(base_names(), "is a fastlinear.Linear already")
    return model


LAYERS_COMPUTED = {
    "convert, then LoRA": len(LLAMA_LAYERS),
    "LoRA, then convert": len(LLAMA_LAYERS) + 2 * len(TARGETS),
    "convert, LoRA, convert again": len(LLAMA_LAYERS) + 2 * len(TARGETS),
}


@pytest.mark.parametrize("order", LAYERS_COMPUTED)
def test_lora_trains_and_merges(
    order: str, backend: Backend, device: torch.device, seed: int
) -> None:
    base = small_llama(device)
    model = converted_lora(copy.deepcopy(base), order, seed)
    plain = lora(base, seed)
    exact = in_float64(plain)
    tokens = torch.randint(3, 37, (2, 5), device=device)
    grad_logits = torch.randn(2, 5, 37, device=device)

    results = [
        values_and_gradients(one, one(input_ids=tokens).logits, grad_logits)
        for one in (model, plain, exact)
    ]
    backend.assert_equal(*results)
    assert len(results[0]) == 1 + 2 * len(TARGETS), "LoRA alone has gradients"
    if backend.name == "triton":
        assert backend.calls == LAYERS_COMPUTED[order]

    def trained_and_merged(one: PeftModel) -> tuple[nn.Module, Results]:
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        loss = F.cross_entropy(one(input_ids=tokens).logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apart = one(input_ids=tokens).logits
        merged = one.merge_and_unload()
        return merged, {
            "loss": loss,
            "logits, LoRA apart": apart,
            "logits, LoRA merged": merged(input_ids=tokens).logits,
        }

    (merged, ours), (_, natives), (_, exacts) = (
        trained_and_merged(one) for one in (model, plain, exact)
    )
    assert torch.allclose(
        exacts["logits, LoRA apart"], exacts["logits, LoRA merged"], rtol=0, atol=1e-12
    )
    backend.assert_equal(ours, natives, exacts)
    # What LoRA was merged into is the converted layer itself.
    assert fastlinear.revert(merged).converted == LLAMA_LAYERS
    assert {type(layer) for layer in merged.modules() if isinstance(layer, nn.Linear)} == {
        nn.Linear
    }


def test_lora_saved_from_a_converted_model_loads_in_plain_and_back(
    backend: Backend, device: torch.device, seed: int, tmp_path: Path
) -> None:
    base = small_llama(device)
    converted = copy.deepcopy(base)
    fastlinear.convert(converted)
    lora(copy.deepcopy(converted), seed).save_pretrained(tmp_path / "converted")
    lora(copy.deepcopy(base), seed).save_pretrained(tmp_path / "plain")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "converted" / weights).read_bytes() == (
        tmp_path / "plain" / weights
    ).read_bytes()

    tokens = torch.randint(3, 37, (2, 5), device=device)
    plain = PeftModel.from_pretrained(base, tmp_path / "converted")
    exact = in_float64(plain)
    model = PeftModel.from_pretrained(converted, tmp_path / "plain")
    backend.assert_equal(
        *({"logits": one(input_ids=tokens).logits} for one in (model, plain, exact))
    )
