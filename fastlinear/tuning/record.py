"""Runs a model once, and notes each distinct call of our layers."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastlinear import _torch_internals as internals
from fastlinear import functional
from fastlinear._unchanged import unchanged
from fastlinear.choice import backend, way
from fastlinear.choice.table import Key
from fastlinear.kernels.launching.operands import DTYPES


class Call(NamedTuple):
    """What calls have in common that are measured as one.

    op: "linear", as those of a gated pair are too, or "batched_linear".
    plain: whether operands are as tables have them: contiguous, at addresses that divide by 16.
    key: of the row for it.
    """

    op: str
    device: torch.device
    plain: bool
    key: Key


@dataclass
class Noted:
    """With how many rows a call was made each time, and by which modules."""

    rows: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def usual_rows(self) -> int:
        """With how many it was made most often."""
        return statistics.mode(self.rows)


def _call_of(
    function: Callable[..., Any], operands: Sequence[Any], activation: str | None
) -> tuple[Call, int] | None:
    """A call, and its number of rows; None where there is nothing to measure."""
    input, weight, bias = operands
    into_main_grad = function.__name__ == "linear_into_main_grad"
    # Without an activation it calls `linear`, which is noted then.
    if into_main_grad and activation is None:
        return None
    tensors = isinstance(input, Tensor) and isinstance(weight, Tensor)
    if not tensors or input.dtype not in DTYPES or weight.dim() < 2 or not weight.numel():
        return None
    (n, k), device = weight.shape[-2:], input.device
    dtype = backend.dtype_under(backend.autocast_dtype(device.type), input.dtype)
    wanted = "" if into_main_grad else way.wanted_of(input, weight, bias)
    rows = input.numel() // k
    key = way.call_key(device, dtype, bias is not None, wanted, activation, n, k, rows)
    op = "linear" if into_main_grad else function.__name__
    plain = all(
        type(one) in internals.PLAIN
        and one.layout == torch.strided
        and not one.is_nested
        and one.is_contiguous()
        and one.data_ptr() % 16 == 0
        for one in (input, weight)
    )
    return Call(op, device, plain, key), rows


def record(
    model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> dict[Call, Noted]:
    """Runs `model(*arguments, **options)`, and its backward if it is in training.

    The model is as before afterwards: parameters, gradients, buffers, modes and torch's random
    state; and so are the gradients of what it is given. Compiled parts run as they were before they
    were compiled.

    Raises:
        Exception: whatever the model raises.
    """
    names = {
        id(parameter): name or "(model)"
        for name, module in model.named_modules()
        for parameter in module._parameters.values()
    }
    calls: dict[Call, Noted] = {}

    def note(*called: Any) -> None:
        found = _call_of(*called)
        if found is not None:
            noted = calls.setdefault(found[0], Noted())
            noted.rows.append(found[1])
            name = names.get(id(called[1][1]), "(computed weight)")
            noted.names += [name] * (name not in noted.names)

    given = [one for one in tree_leaves((arguments, options)) if isinstance(one, Tensor)]
    with unchanged(model, given), internals.uncompiled():
        functional.observers.append(note)
        try:
            output = model(*arguments, **options)
            if model.training and torch.is_grad_enabled():
                _backward(output)
        finally:
            functional.observers.remove(note)
    return calls


def _backward(output: Any) -> None:
    """That of the loss, as models of `transformers` name it, or of all outputs, each for itself."""
    loss = getattr(output, "loss", None)
    found = [loss] if isinstance(loss, Tensor) else tree_leaves(output)
    outputs = [one for one in found if isinstance(one, Tensor) and one.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(one) for one in outputs])
