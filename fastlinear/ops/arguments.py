"""What the kernels take of a call's arguments, and what came instead, in words."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastlinear import _torch_internals as internals
from fastlinear._torch_internals import PLAIN
from fastlinear.choice import backend
from fastlinear.kernels.launching.operands import DTYPES


def broadcasts(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `bias` is to be expanded."""
    return bias is not None and bias.shape != weight.shape[:-1]


def _changes_meaning(tensor: Tensor) -> bool:
    """Whether operations on this subclass of Tensor give something else than a plain tensor.

    Fake tensors and the like stand for plain ones, and switch __torch_function__ off. Distributed
    tensors call the op with plain ones.
    """
    if type(tensor) in internals.DISTRIBUTED:
        return False
    stands_for_plain = type(tensor).__torch_function__ is torch._C._disabled_torch_function_impl
    return not stands_for_plain or is_traceable_wrapper_subclass(tensor)


def _has_names(tensor: Tensor) -> bool:
    """Whether dimensions have names, which later torches have given up and no tracer takes."""
    if is_dynamo_compiling() or type(tensor) not in PLAIN:
        return False
    return any(name is not None for name in getattr(tensor, "names", ()))


def named(
    input: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = ""
) -> dict[str, Tensor]:
    found = {"input": input, f"{prefix}weight": weight}
    return found if bias is None else found | {f"{prefix}bias": bias}


def why_not(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    batched: bool = False,
    prefix: str = "",
) -> str | None:
    """What the kernels would take and what came instead, in words.

    None where they can take the arguments, of `linear` or, if batched, of `batched_linear`. The
    words are those for weight and bias with `prefix` before their names.
    """
    operands = named(input, weight, bias, prefix)
    for name, tensor in operands.items():
        if not isinstance(tensor, Tensor):
            return f"tensors, but {name} is {type(tensor).__name__}"
        if type(tensor) not in PLAIN and _changes_meaning(tensor):
            return f"plain tensors, but {name} is a {type(tensor).__name__}"
        if tensor.is_nested:
            return f"plain tensors, but {name} is nested"
        if _has_names(tensor):
            return f"tensors without named dimensions, but {name} has some"
        if tensor.layout != torch.strided:
            return f"strided tensors, but {name} has layout {tensor.layout}"
        if tensor.dtype not in DTYPES:
            return f"float16, bfloat16, float32 and float64, but {name} is {tensor.dtype}"
        if tensor.device != input.device:
            return (
                f"tensors of one device, but input is on {input.device} "
                f"and {name} on {tensor.device}"
            )

    autocast = backend.autocast_dtype(input.device.type)
    dtypes = {
        name: backend.dtype_under(autocast, tensor.dtype) for name, tensor in operands.items()
    }
    for name, dtype in dtypes.items():
        if dtype != dtypes["input"]:
            return f"tensors of one dtype, but input is {dtypes['input']} and {name} {dtype}"
    if internals.tracing() is not None:  # sizes are tensors there; the ops look at them
        return None
    if batched:
        return unlike_layers(input, weight, bias)
    return _unlike_a_layer(input, weight, bias, prefix)


def _unlike_a_layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = ""
) -> str | None:
    """The shapes of a layer, and those that came instead; None where they fit."""
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        return (
            f"input (*, in_features) and {prefix}weight (out_features, in_features), "
            f"but input is {tuple(input.shape)} and {prefix}weight {tuple(weight.shape)}"
        )
    if bias is not None and (bias.dim() > 1 or bias.numel() not in (1, weight.shape[0])):
        return (
            f"{prefix}bias (out_features,), but {prefix}bias is {tuple(bias.shape)} "
            f"and out_features {weight.shape[0]}"
        )
    return None


def unlike_layers(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """The shapes of B layers, and those that came instead; None where they fit."""
    if (
        input.dim() != 3
        or weight.dim() != 3
        or (input.shape[0], input.shape[2]) != (weight.shape[0], weight.shape[2])
    ):
        return (
            "input (B, M, in_features) and weight (B, out_features, in_features), "
            f"but input is {tuple(input.shape)} and weight {tuple(weight.shape)}"
        )
    if bias is not None and (
        bias.dim() != 2
        or any(
            mine not in (1, size) for mine, size in zip(bias.shape, weight.shape[:-1], strict=True)
        )
    ):
        return (
            "bias (B, out_features), "
            f"but bias is {tuple(bias.shape)} and weight {tuple(weight.shape)}"
        )
    return None


def why_not_gated(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
) -> str | None:
    """`why_not`, of `gated_linear`."""
    reason = why_not(input, gate_weight, gate_bias, prefix="gate_")
    reason = reason or why_not(input, up_weight, up_bias, prefix="up_")
    if reason is None and gate_weight.shape != up_weight.shape:
        return (
            "weights of one shape, "
            f"but gate_weight is {tuple(gate_weight.shape)} and up_weight {tuple(up_weight.shape)}"
        )
    return reason
