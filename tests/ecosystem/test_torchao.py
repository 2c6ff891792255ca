"""torchao: int8 weights in converted layers."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from twins import LLAMA_LAYERS, small_llama

import fastlinear


def quantized(model: nn.Module) -> nn.Module:
    quantize_(model, Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("order", ["convert, then quantize", "quantize, then convert"])
def test_int8_weights_give_the_same_bits(order: str, device: torch.device) -> None:
    base = small_llama(device)
    plain = quantized(copy.deepcopy(base))
    model = copy.deepcopy(base)
    if order == "convert, then quantize":
        assert fastlinear.convert(model).converted == LLAMA_LAYERS
        quantized(model)
    else:
        quantized(model)
        assert fastlinear.convert(model).converted == LLAMA_LAYERS
    assert type(model.lm_head) is fastlinear.Linear
    kind = type(model.lm_head.weight)
    assert kind is type(plain.lm_head.weight)
    assert kind is not nn.Parameter, "quantized"

    tokens = torch.randint(3, 37, (2, 5), device=device)
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits
        assert not torch.equal(expected, base(input_ids=tokens).logits), "quantized"
        for backend in ("auto", "torch"):
            with fastlinear.use_backend(backend):
                assert torch.equal(model(input_ids=tokens).logits, expected)
        with (
            fastlinear.use_backend("triton"),
            pytest.raises(
                TypeError,
                match=f"'triton' takes plain tensors, but weight is a {kind.__name__}; "
                "backend 'auto' hands this call to PyTorch",
            ),
        ):
            model(input_ids=tokens)

        assert fastlinear.revert(model).converted == LLAMA_LAYERS
        assert type(model.lm_head) is nn.Linear
        assert type(model.lm_head.weight) is kind
        with fastlinear.use_backend("triton"):
            assert torch.equal(model(input_ids=tokens).logits, expected)
