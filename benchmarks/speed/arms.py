"""The arms of the sweep: ways to compute one layer from the same weights, and why one is absent."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

import fastlinear
from benchmarks.shared.names import NATIVE
from fastlinear.ops.elementwise import ACTIVATIONS

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Arm:
    """A way to compute a layer.

    make: from weight, bias and the activation's name, the function of the input, whose derivatives
        reach the weight and the bias that were given.
    absent: why this machine cannot run it, or None.
    backend: what fastlinear's layers are to be called under.
    """

    name: str
    make: Callable[[Tensor, Tensor | None, str | None], Call]
    absent: str | None = None
    backend: str = "auto"


def _activated(call: Call, activation: str | None) -> Call:
    if activation is None:
        return call
    function = ACTIVATIONS[activation]
    return lambda input: function(call(input))


def _as_module(kind: Any, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
    """A layer of class `kind` with these tensors for parameters."""
    out_features, in_features = weight.shape
    layer = kind(in_features, out_features, bias=bias is not None, **options)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _native(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
    return _activated(_as_module(nn.Linear, weight, bias, device="meta"), activation)


def _compiled(mode: str) -> Callable[..., Call]:
    def make(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
        # Backward alone is timed again and again over one forward, whose tensors it must not reuse.
        torch._functorch.config.donated_buffer = False
        call = _native(weight, bias, activation)
        return torch.compile(call, mode=mode, dynamic=False)

    return make


def _fastlinear(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
    return _as_module(fastlinear.Linear, weight, bias, device="meta", activation=activation)


def _naive(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
    from benchmarks.speed import naive

    return _activated(lambda input: naive.linear(input, weight, bias), activation)


def _peer(module: str, name: str, **options: Any) -> Callable[..., Call]:
    def make(weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
        kind = getattr(importlib.import_module(module), name)
        layer = _as_module(kind, weight, bias, device=weight.device, dtype=weight.dtype, **options)
        return _activated(layer, activation)

    return make


# Others' linear layers: (package, module, class). Each is used where it can be imported; whether it
# computes what it should is seen before it is timed.
PEERS = [
    ("quack", "quack.linear", "Linear"),
    ("transformer_engine", "transformer_engine.pytorch", "Linear"),
    ("flash_attn", "flash_attn.ops.fused_dense", "FusedDense"),
]


def _why_no_import(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a package for other versions may fail in any way
        return f"cannot be imported ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    return None


def arms(device: torch.device, tuned: bool = False) -> dict[str, Arm]:
    """Every arm, by name, nn.Linear first; those that cannot run here say why.

    tuned: whether there will be a table of what is measured.
    """
    no_gpu = None if device.type == "cuda" else "needs a GPU"
    found = [
        Arm(NATIVE, _native),
        Arm("torch.compile", _compiled("default"), no_gpu),
        Arm("torch.compile max-autotune", _compiled("max-autotune-no-cudagraphs"), no_gpu),
        Arm("fastlinear tuned" if tuned else "fastlinear auto", _fastlinear),
        Arm("fastlinear triton", _fastlinear, no_gpu, backend="triton"),
        Arm("naive triton", _naive, no_gpu),
    ]
    for package, module, name in PEERS:
        found.append(Arm(package, _peer(module, name), no_gpu or _why_no_import(module)))
    found.append(Arm("liger", _native, "has no linear layer to compare with"))
    return {arm.name: arm for arm in found}
