"""The functions behind the layers.

`linear`, `batched_linear`, `gated_linear`, and what they can take.
"""

import functools
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
from fastlinear._on_import import when_imported
from fastlinear._torch_internals import PLAIN
from fastlinear.choice import backend, known, way
from fastlinear.choice.way import tables_say_so
from fastlinear.kernels.launching.operands import check_activation
from fastlinear.ops import implementations, torchscript
from fastlinear.ops.arguments import broadcasts, named, unlike_layers, why_not, why_not_gated
from fastlinear.ops.elementwise import ACTIVATIONS, activated
from fastlinear.ops.gated import gated_linear_op
from fastlinear.ops.linear import LinearFunction, linear_activation_op, linear_op

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

    Without an activation that is `torch.nn.functional.linear`. Which path computes it is
    `fastlinear.use_backend`'s to say. The kernels accumulate in float32 (float64 for float64) and
    add the bias before the one rounding to the output's dtype; float32 products follow
    `torch.set_float32_matmul_precision`. Gradients of every order, forward and reverse, are
    defined.

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
                    return LinearFunction.apply(found.recorded, input, weight, bias)
                return LinearFunction.apply(found.recorded, input, weight, bias, activation)[0]
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
    inputs to one layer. The kernels take one launch for all. Backends, dtypes, strides, precision
    and derivatives are those of `fastlinear.linear`.

    Args:
        input: (B, M, in_features).
        weight: (B, out_features, in_features).
        bias: None or (B, out_features). As for `torch.baddbmm`, a dimension may have size 1 and is
            then expanded.
        activation: None or a name, as in `fastlinear.linear`.

    Returns:
        (B, M, out_features), as from `fastlinear.linear`.

    Raises:
        RuntimeError: shapes are none of these, and the message names those that came; or dtypes
            differ, in PyTorch's words.
        TypeError: an argument is no tensor.
        Exception: what `fastlinear.linear` raises for the activation, and with backend "triton".
    """
    check_activation(activation)
    operands = (input, weight, bias)
    observe(batched_linear, operands, activation)
    output = of_operands(batched_linear, operands, activation)
    if output is not NotImplemented:
        return output
    if backend.current != "triton":
        return activated(_batched_by_pytorch(input, weight, bias), activation)
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

    By the kernels that is one launch, which reads input once, else `fastlinear.linear` twice, whose
    backends, dtypes, strides, precision and derivatives it has. The kernels also multiply before
    the one rounding. For backward they keep gate and up, where PyTorch also keeps
    `activation(gate)`; the gradients of both weights are halves of one tensor.

    Args:
        input: (*, in_features).
        gate_weight, up_weight: (out_features, in_features).
        gate_bias, up_bias: None or (out_features,).
        activation: a name, as in `fastlinear.linear`.

    Returns:
        (*, out_features), as from `fastlinear.linear`.

    Raises:
        RuntimeError: the weights have not the same out_features.
        Exception: whatever `fastlinear.linear` raises for input and either weight and bias.
    """
    check_activation(activation, optional=False)
    operands = (input, gate_weight, up_weight, gate_bias, up_bias)
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
    by_pytorch = functools.partial(_gated_apart, torchscript.linear, *operands, activation)
    _raise_if(why_not_gated(*operands), by_pytorch)
    biases = _expanded(gate_weight, gate_bias), _expanded(up_weight, up_bias)
    return gated_linear_op(*operands[:3], *biases, activation)


def of_operands(
    function: Callable[..., Tensor], operands: Sequence[Any], activation: str | None
) -> Any:
    """What an operand makes of the call that only stands for a tensor, as those of torch.fx do.

    Its `__torch_function__` does. NotImplemented where there is none, and, but for backend
    "triton", where it does not know the function: it may know PyTorch's, as subclasses of Tensor
    do.
    """
    if not has_torch_function(operands) or all(
        operand is None or isinstance(operand, Tensor) for operand in operands
    ):
        return NotImplemented
    try:
        return handle_torch_function(function, operands, *operands, activation)
    except TypeError:
        if backend.current == "triton":
            raise
        return NotImplemented


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


def _batched_by_pytorch(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`batched_linear` by PyTorch, whose errors name neither these arguments nor all shapes."""
    try:
        # A bias (N,) would be added along the rows, were there N of them.
        if bias is None or bias.dim() == 2:
            return implementations.batched_product(input, weight, bias)
    except Exception:
        for name, operand in named(input, weight, bias).items():
            if not isinstance(operand, Tensor):
                raise TypeError(
                    f"batched_linear takes tensors, but {name} is {type(operand).__name__}"
                ) from None
        if unlike_layers(input, weight, bias) is None:
            raise
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
    by_pytorch = _batched_by_pytorch if batched else F.linear
    _raise_if(
        why_not(input, weight, bias, batched=batched),
        functools.partial(by_pytorch, input, weight, bias),
    )
    bias = _expanded(weight, bias)
    if activation is None:
        return linear_op(input, weight, bias)
    return linear_activation_op(input, weight, bias, activation)


def _raise_if(unsupported: str | None, by_pytorch: Callable[[], object]) -> None:
    """Raises where the kernels cannot take a call, for `unsupported` or where it is for ONNX.

    That is PyTorch's own error where it, too, cannot take the arguments.
    """
    if internals.exporting_to_onnx():
        raise RuntimeError(
            "backend 'triton' has no kernels for ONNX; "
            "export within `with fastlinear.use_backend('torch'):`"
        )
    if unsupported is not None:
        by_pytorch()
        raise TypeError(
            f"backend 'triton' takes {unsupported}; backend 'auto' hands this call to PyTorch"
        )


def _expanded(weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`bias` in the shape that the ops take; sizes are tensors, and not compared, in a trace."""
    if bias is not None and (internals.tracing() is not None or broadcasts(weight, bias)):
        return bias.expand(weight.shape[:-1])
    return bias


internals.compiled_by_torchscript(linear, torchscript.linear)
internals.compiled_by_torchscript(batched_linear, torchscript.batched_linear)
internals.compiled_by_torchscript(gated_linear, torchscript.gated_linear)


# It takes most of a second to import, and before that there are no DTensors.
_sharding = functools.partial(importlib.import_module, "fastlinear.ops.sharding")
when_imported("torch.distributed.tensor", _sharding)
