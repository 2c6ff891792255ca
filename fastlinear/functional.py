"""The functions behind the layers.

`linear`, `batched_linear`, `gated_linear`, and what they can take.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_variadic,
)

from fastlinear import _torch_internals as internals
from fastlinear.choice import backend, known, way
from fastlinear.kernels.launching.operands import check_activation
from fastlinear.ops import implementations, torchscript
from fastlinear.ops.arguments import PLAIN, broadcasts, named, unlike_layers, why_not, why_not_gated
from fastlinear.ops.elementwise import ACTIVATIONS
from fastlinear.ops.gated import gated_linear_op
from fastlinear.ops.linear import (
    LinearActivationFunction,
    LinearFunction,
    linear_activation_op,
    linear_op,
)

_linear = internals.unwrapped(linear_op)
_linear_activation = internals.unwrapped(linear_activation_op)
_gated_linear = internals.unwrapped(gated_linear_op)


# Called with each call: the function, its operands and its activation.
observers: list[Callable[[Callable[..., Tensor], Sequence[Any], str | None], None]] = []


def observe(
    function: Callable[..., Tensor], operands: Sequence[Any], activation: str | None
) -> None:
    """Tells the observers of a call."""
    for observer in observers:
        observer(function, operands, activation)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Computes `output = activation(input @ weight.T + bias)`.

    Without an activation that is `torch.nn.functional.linear`.

    Which path computes it is `fastlinear.use_backend`'s to say. The kernels accumulate in float32
    (float64 for float64) and add the bias before the one rounding to the output's dtype; float32
    products follow `torch.set_float32_matmul_precision`. Gradients of every order, forward and
    reverse, are defined.

    Args:
        input: (*, in_features); the kernels take float16, bfloat16, float32 and float64, with any
            strides.
        weight: (out_features, in_features), in input's dtype and on its device.
        bias: None or (out_features,), in input's dtype and on its device.
        activation: None, "relu", "gelu" (by erf), "gelu_tanh", "silu", "sigmoid", "tanh",
            "leaky_relu" (slope 0.01) or "relu_squared": the torch function of that name. The
            kernels apply it to the accumulator, before the one rounding. For backward the
            pre-activation is kept where a derivative needs it ("gelu", "gelu_tanh", "silu",
            "relu_squared"), else the output, which must then not change in place.

    Returns:
        (*, out_features), contiguous, in input's dtype (under autocast, in autocast's).

    Raises:
        ValueError: activation is none of these.
        Exception: whatever `torch.nn.functional.linear` raises for these arguments.
        TypeError: backend "triton" cannot take the arguments, though PyTorch can; the message says
            why.
        RuntimeError: backend "triton" cannot run on this machine; the message says what is missing.
    """
    if activation is not None:
        check_activation(activation)
    if observers:
        observe(linear, (input, weight, bias), activation)
    if has_torch_function_variadic(input, weight, bias):
        output = of_operands(linear, (input, weight, bias), activation)
        if output is not NotImplemented:
            return output
    found: way.Way | bool | None = None
    if backend.current != "triton" and (
        not known.available
        or (not is_dynamo_compiling() and way.is_pytorchs(input, weight, activation))
        or not (found := tables_say_so(input, weight, bias, activation))
    ):
        output = F.linear(input, weight, bias)
        return output if activation is None else ACTIVATIONS[activation](output)
    if (
        type(input) is Tensor
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and not is_dynamo_compiling()
    ):
        # Looking into good arguments takes half as long as all the rest of a call: bad ones are
        # looked into when the op has refused them. Within a transform it sees other shapes than the
        # caller, and a compiler sees no exception.
        try:
            if found is None or found is True:
                found = way.find(input, weight, bias, activation)
            if found and found.output is not None:
                if not (found.requires_grad and torch.is_grad_enabled()):
                    return found.output(input, weight, bias)
                if activation is None:
                    return LinearFunction.apply(input, weight, bias, found.recorded)
                return LinearActivationFunction.apply(
                    input, weight, bias, activation, found.recorded
                )[0]
            if (
                weight.dim() == 2
                and not internals.transforming()
                and not internals.exporting_to_onnx()
            ):
                if activation is None:
                    output = _linear(input, weight, bias)
                else:
                    output = _linear_activation(input, weight, bias, activation)
                way.remember(input, weight, bias, activation, implementations.straight)
                return output
        except RuntimeError:
            if why_not(input, weight, bias) is None and not broadcasts(weight, bias):
                raise
    return _by_the_kernels(input, weight, bias, activation)


def batched_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Computes B layers at once: `output[b] = activation(input[b] @ weight[b].T + bias[b])`.

    Without an activation that is `torch.baddbmm(bias.unsqueeze(1), input, weight.mT)`, or
    `torch.bmm` where there is no bias. Operands may have a stride of 0 over B, and are then read as
    they are: `input.expand(B, -1, -1)` gives one input to B layers, `weight.expand(B, -1, -1)` B
    inputs to one layer.

    Which path computes it is `fastlinear.use_backend`'s to say: the kernels, in one launch, or
    these functions of torch. The kernels accumulate in float32 (float64 for float64) and add the
    bias before the one rounding to the output's dtype; float32 products follow
    `torch.set_float32_matmul_precision`. Gradients of every order, forward and reverse, are
    defined.

    Args:
        input: (B, M, in_features); the kernels take float16, bfloat16, float32 and float64, with
            any strides.
        weight: (B, out_features, in_features), in input's dtype and on its device.
        bias: None or (B, out_features), in input's dtype and on its device. As for
            `torch.baddbmm`, a dimension may have size 1 and is then expanded.
        activation: None or a name, as in `fastlinear.linear`.

    Returns:
        (B, M, out_features), contiguous, in input's dtype (under autocast, in autocast's).

    Raises:
        ValueError: activation is none of these.
        RuntimeError: shapes are none of these, and the message names those that came; or dtypes
            differ, in PyTorch's words; or backend "triton" cannot run on this machine, and the
            message says what is missing.
        TypeError: an argument is no tensor, or backend "triton" cannot take the arguments, though
            PyTorch can; the message says why.
    """
    if activation is not None:
        check_activation(activation)
    operands = (input, weight, bias)
    observe(batched_linear, operands, activation)
    if has_torch_function(operands):
        output = of_operands(batched_linear, operands, activation)
        if output is not NotImplemented:
            return output
    if backend.current != "triton":
        output = _batched_by_pytorch(input, weight, bias)
        return output if activation is None else ACTIVATIONS[activation](output)
    return _by_the_kernels(input, weight, bias, activation, batched=True)


def gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Computes `output = activation(gate) * up` from two layers of one input.

    gate is `input @ gate_weight.T + gate_bias` and up is `input @ up_weight.T + up_bias`: with
    "silu" that is SwiGLU, with "gelu" GEGLU, with "relu" ReGLU, with "sigmoid" GLU.

    Which path computes it is `fastlinear.use_backend`'s to say: the kernels, in one launch that
    reads input once, or `fastlinear.linear` twice. The kernels accumulate in float32
    (float64 for float64), and activate and multiply there, before the one rounding to the output's
    dtype; float32 products follow `torch.set_float32_matmul_precision`. For backward they keep gate
    and up, where PyTorch also keeps `activation(gate)`. Gradients of every order, forward and
    reverse, are defined; those of both weights are halves of one tensor.

    Args:
        input: (*, in_features); the kernels take float16, bfloat16, float32 and float64, with any
            strides.
        gate_weight, up_weight: (out_features, in_features), in input's dtype and on its device.
        gate_bias, up_bias: None or (out_features,), in input's dtype and on its device.
        activation: a name, as in `fastlinear.linear`.

    Returns:
        (*, out_features), contiguous, in input's dtype (under autocast, in autocast's).

    Raises:
        ValueError: activation is none of these.
        RuntimeError: the weights have not the same out_features.
        Exception: whatever `torch.nn.functional.linear` raises for input and either weight and
            bias.
        TypeError: backend "triton" cannot take the arguments, though PyTorch can; the message says
            why.
    """
    check_activation(activation, optional=False)
    operands = (input, gate_weight, up_weight, gate_bias, up_bias)
    if has_torch_function(operands):
        output = of_operands(gated_linear, operands, activation)
        if output is not NotImplemented:
            return output
    if backend.current != "triton":
        return _gated_apart(linear, *operands, activation)  # each as a table says, if one does
    if (
        all(type(operand) in PLAIN for operand in operands[:3])
        and all(bias is None or type(bias) in PLAIN for bias in operands[3:])
        and not internals.transforming()
        and not internals.exporting_to_onnx()
        and not is_dynamo_compiling()
    ):
        try:  # as `linear` does, and why
            return _gated_linear(*operands, activation)
        except RuntimeError:
            expands = broadcasts(gate_weight, gate_bias) or broadcasts(up_weight, up_bias)
            if why_not_gated(*operands) is None and not expands:
                raise
    _refuse_onnx()
    reason = why_not_gated(*operands)
    if reason is not None:
        _gated_apart(_by_pytorch, *operands, activation)
        raise TypeError(
            f"backend 'triton' takes {reason}; backend 'auto' hands this call to PyTorch"
        )
    if gate_bias is not None:
        gate_bias = gate_bias.expand(gate_weight.shape[:1])
    if up_bias is not None:
        up_bias = up_bias.expand(up_weight.shape[:1])
    return gated_linear_op(input, gate_weight, up_weight, gate_bias, up_bias, activation)


def of_operands(
    function: Callable[..., Tensor], operands: Sequence[Any], activation: str | None
) -> Any:
    """What an operand makes of the call that only stands for a tensor, as those of torch.fx do.

    Its `__torch_function__` does. NotImplemented where there is none, and, but for backend
    "triton", where it does not know the function: it may know PyTorch's, as subclasses of Tensor
    do.
    """
    if all(operand is None or isinstance(operand, Tensor) for operand in operands):
        return NotImplemented
    try:
        return handle_torch_function(function, operands, *operands, activation)
    except TypeError:
        if backend.current == "triton":
            raise
        return NotImplemented


def _by_pytorch(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    output = F.linear(input, weight, bias)
    return output if activation is None else ACTIVATIONS[activation](output)


def _gated_apart(
    layer: Callable[..., Tensor],
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    gate = layer(input, gate_weight, gate_bias, activation)
    up = layer(input, up_weight, up_bias)
    # One feature would be multiplied with many. torch.jit.trace has tensors for sizes.
    if internals.tracing() is None and gate.shape != up.shape:
        raise RuntimeError(
            "gated_linear takes weights of the same out_features, "
            f"but gate_weight is {tuple(gate_weight.shape)} and up_weight {tuple(up_weight.shape)}"
        )
    return gate * up


def _refuse_onnx() -> None:
    if internals.exporting_to_onnx():
        raise RuntimeError(
            "backend 'triton' has no kernels for ONNX; "
            "export within `with fastlinear.use_backend('torch'):`"
        )


def _batched_by_pytorch(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`batched_linear` by PyTorch, whose errors name neither these arguments nor all shapes."""
    try:
        if bias is None:
            return torch.bmm(input, weight.transpose(1, 2))
        # A bias (N,) would be added along the rows, were there N of them.
        if bias.dim() == 2:
            return torch.baddbmm(bias.unsqueeze(1), input, weight.transpose(1, 2))
    except Exception:
        for name, operand in named(input, weight, bias).items():
            if not isinstance(operand, Tensor):
                raise TypeError(
                    f"batched_linear takes tensors, but {name} is {type(operand).__name__}"
                ) from None
        reason = unlike_layers(input, weight, bias)
        if reason is None:
            raise
        raise RuntimeError(f"batched_linear takes {reason}") from None
    raise RuntimeError(f"batched_linear takes {unlike_layers(input, weight, bias)}")


def _by_the_kernels(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    *,
    batched: bool = False,
) -> Tensor:
    """`linear`, or `batched_linear`, by the kernels, or an error that says why not."""
    _refuse_onnx()
    reason = why_not(input, weight, bias, batched=batched)
    if reason is not None:
        # Raises PyTorch's own error where PyTorch cannot take the arguments either.
        (_batched_by_pytorch if batched else F.linear)(input, weight, bias)
        raise TypeError(
            f"backend 'triton' takes {reason}; backend 'auto' hands this call to PyTorch"
        )
    if bias is not None and (internals.tracing() is not None or broadcasts(weight, bias)):
        bias = bias.expand(weight.shape[:-1])
    if activation is None:
        return linear_op(input, weight, bias)
    return linear_activation_op(input, weight, bias, activation)


def tables_say_so(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> way.Way | bool:
    """Whether backend "auto" takes the op: for plain operands, if a table says so.

    By which way, if one is remembered.
    """
    if (
        backend.current != "auto"
        or type(input) not in PLAIN
        or type(weight) not in PLAIN
        or (bias is not None and type(bias) not in PLAIN)
    ):
        return False
    if is_dynamo_compiling():
        return way.takes_ours(input, weight, bias, activation)
    operands = (input, weight) if bias is None else (input, weight, bias)
    if any(one.is_nested or one.layout != torch.strided for one in operands):
        return False
    found = way.find(input, weight, bias, activation)
    if found is not None:
        return False if found.output is None else found
    if internals.transforming() or internals.tracing() is not None:
        return False
    ours = way.takes_ours(input, weight, bias, activation)
    if not ours:
        way.remember(input, weight, bias, activation, None)
    return ours


internals.compiled_by_torchscript(linear, torchscript.linear)
internals.compiled_by_torchscript(batched_linear, torchscript.batched_linear)
internals.compiled_by_torchscript(gated_linear, torchscript.gated_linear)


def _register_shardings() -> None:
    importlib.import_module("fastlinear.ops.sharding")


# It takes most of a second to import, and before that there are no DTensors.
internals.when_imported("torch.distributed.tensor", _register_shardings)
