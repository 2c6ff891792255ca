"""What backend "auto" does with a call of `linear`."""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastlinear import _torch_internals as internals
from fastlinear._torch_internals import PLAIN
from fastlinear.choice import backend
from fastlinear.choice.way import Way, find, remember, takes_ours


def tables_say_so(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Way | bool:
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
        return takes_ours(input, weight, bias, activation)
    operands = (input, weight) if bias is None else (input, weight, bias)
    if any(one.is_nested or one.layout != torch.strided for one in operands):
        return False
    found = find(input, weight, bias, activation)
    if found is not None:
        return False if found.output is None else found
    if internals.transforming() or internals.tracing() is not None:
        return False
    ours = takes_ours(input, weight, bias, activation)
    if not ours:
        remember(input, weight, bias, activation, None)
    return ours
