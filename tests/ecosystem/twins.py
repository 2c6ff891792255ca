"""Twins: a model as its library makes it, the same one converted, and a third in float64.

What each of them gives, and when they count as equal.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

Results = dict[str, Tensor]


@dataclass
class Backend:
    """A backend of fastlinear, and how many layers its kernels have computed so far."""

    name: str
    calls: int = 0

    def assert_equal(self, results: Results, natives: Results, exacts: Results) -> None:
        """Fails unless `results` are those of the unconverted model.

        With "auto" the same operations run on the same numbers and have to give the same bits.
        Through the kernels the budget is that of oracle.py, for the model as a whole: twice
        the error of the unconverted model plus one rounding step, relative, as the root mean square
        over all results. Not one result at a time: an error made in one layer goes on into many,
        so that the largest in some small gradient is a matter of luck, on either side.
        """
        assert list(results) == list(natives) == list(exacts)
        squares = torch.zeros(2, dtype=torch.float64)
        for name, exact in exacts.items():
            result, native = results[name].detach(), natives[name].detach()
            assert result.shape == native.shape, name
            assert result.dtype == native.dtype == torch.float32, name
            assert exact.dtype == torch.float64, name
            if self.name == "auto":
                assert torch.equal(result, native), name
            size = torch.linalg.vector_norm(exact.detach())
            if size == 0:
                assert not result.any(), f"{name} is not 0"
                continue
            for index, tensor in enumerate((result, native)):
                error = torch.linalg.vector_norm(tensor.double() - exact.detach())
                squares[index] += (error / size).cpu() ** 2
        error, native_error = (squares / len(exacts)).sqrt().tolist()
        budget = 2 * native_error + torch.finfo(torch.float32).eps
        assert error <= budget, (
            f"off by {error:.3g}, the unconverted model by {native_error:.3g}; "
            f"the budget is {budget:.3g}"
        )


def leaf(input: Tensor, model: nn.Module) -> Tensor:
    """A copy of `input` in the dtype of `model`, to collect a gradient."""
    dtype = next(model.parameters()).dtype
    return input.to(dtype, copy=True).requires_grad_()


def values_and_gradients(model: nn.Module, output: Tensor, grad_output: Tensor) -> Results:
    """`output`, and the gradient that it gives to every parameter of `model`."""
    model.zero_grad()
    output.backward(grad_output.to(output.dtype))
    gradients = {
        f"gradient of {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"output": output.detach(), **gradients}


def small_llama(
    device: torch.device, tied: bool = False, hidden_act: str = "silu"
) -> LlamaForCausalLM:
    """A Llama of one block of random weights, wide enough to tell tokens apart."""
    config = LlamaConfig(
        vocab_size=37,
        hidden_act=hidden_act,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(device)


# Of a block: q, k, v and o of the attention, and gate, up and down of the MLP.
LLAMA_LAYERS = (
    *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "lm_head",
)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of `model` that computes in float64 throughout."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):  # goes through float32, whatever comes in
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model
