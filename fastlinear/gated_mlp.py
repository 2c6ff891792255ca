"""Finds the gated MLPs of Llama and its kin in a model, and has `gated_linear` compute them."""

import operator
from typing import Any, ClassVar

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from fastlinear import _torch_internals as internals
from fastlinear.functional import gated_linear
from fastlinear.modules import GatedLinear, Linear, is_plain

_FUNCTIONS: dict[Any, str] = {
    F.silu: "silu",
    F.relu: "relu",
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",  # as F.sigmoid is traced
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
}
_MODULES: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


class GatedMLP(nn.Module):
    """What `convert` adds to the class of a module that computes a gated MLP.

    `down_proj(act_fn(gate_proj(input)) * up_proj(input))` takes `gated_linear`, as long as the
    module is made of what it was made of; else, with an adapter in it or a hook on a part, its own
    forward computes it.
    """

    kind: ClassVar[type[nn.Module]]  # the module's own class, which made these:
    gate_proj: Linear
    up_proj: Linear
    down_proj: nn.Module
    act_fn: nn.Module
    # What `convert` found: the module act_fn, and its name in fastlinear.
    _fastlinear_gate: tuple[nn.Module, str]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        gate, up = self.gate_proj, self.up_proj
        act_fn, activation = self._fastlinear_gate
        if (
            act_fn is not self.act_fn
            or internals.has_hooks(act_fn)
            or not is_plain(gate)
            or not is_plain(up)
            or len(arguments) + len(named) != 1
        ):
            return super().forward(*arguments, **named)
        (input,) = arguments or named.values()
        hidden: Tensor = gated_linear(input, gate.weight, up.weight, gate.bias, up.bias, activation)
        return self.down_proj(hidden)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time: a copy, or a pickle, makes it again.
        return _empty, (self.kind,), self.__dict__


_classes: dict[Any, type[GatedMLP]] = {}


def _gated(kind: type[nn.Module]) -> type[GatedMLP]:
    """`kind` computing its gated MLP by `gated_linear`; the same class each time."""
    if kind not in _classes:
        _classes[kind] = type(f"Gated{kind.__name__}", (GatedMLP, kind), {"kind": kind})
    return _classes[kind]


def _empty(kind: type[nn.Module]) -> GatedMLP:
    gated = _gated(kind)
    return gated.__new__(gated)


def gate(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Has every gated MLP of `model` computed by `gated_linear`, in place.

    Returns:
        (name, activation) of each.
    """
    found = []
    module: Any
    for name, module in model.named_modules():
        activation = _activation_of(module)
        if activation is not None:
            # Not as an attribute: act_fn would be registered a second time.
            vars(module)["_fastlinear_gate"] = (module.act_fn, activation)
            module.__class__ = _gated(type(module))
            found.append((name, activation))
    return tuple(found)


def ungate(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Undoes `gate`, and returns what it would."""
    found = []
    module: Any
    for name, module in model.named_modules():
        if isinstance(module, GatedMLP):
            _, activation = vars(module).pop("_fastlinear_gate")
            module.__class__ = module.kind  # type: ignore[assignment]
            found.append((name, activation))
    return tuple(found)


def gated_layers(model: nn.Module) -> set[nn.Module]:
    """The layers of the gated pairs in `model`, which have their activation already."""
    pairs = [part for part in model.modules() if isinstance(part, (GatedMLP, GatedLinear))]
    return {layer for pair in pairs for layer in (pair.gate_proj, pair.up_proj)}


class _Tracer(torch.fx.Tracer):
    """Goes into act_fn, if that is not torch's, but not into the projections."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name in _PROJECTIONS or super().is_leaf_module(module, name)


def _activation_of(module: Any) -> str | None:
    """The activation of a gated MLP that `gated_linear` can compute, or None.

    By the names of its parts and by what its forward does with them.
    """
    if isinstance(module, GatedMLP) or not all(
        isinstance(getattr(module, part, None), nn.Module) for part in (*_PROJECTIONS, "act_fn")
    ):
        return None
    if not (is_plain(module.gate_proj) and is_plain(module.up_proj)):
        return None
    if "forward" in vars(module) or internals.has_hooks(module.act_fn):
        return None
    in_both_modes = {_traced_activation(module, training) for training in (True, False)}
    return in_both_modes.pop() if len(in_both_modes) == 1 else None


def _traced_activation(module: nn.Module, training: bool) -> str | None:
    modes = {part: part.training for part in module.modules()}
    try:
        module.train(training)
        output = next(reversed(_Tracer().trace(module).nodes))
    except Exception:  # its forward takes ways that a trace cannot follow, or is no such MLP's
        return None
    finally:
        for part, mode in modes.items():
            part.training = mode
    match _expression(output):
        case ("output", ("down_proj", (operator.mul | torch.mul, first, second))):
            for activated, other in ((first, second), (second, first)):
                match activated, other:
                    case (act_fn, ("gate_proj", "input"), *options), ("up_proj", "input"):
                        return _name_of(act_fn, dict(options), module)
    return None


def _expression(node: Any) -> Any:
    """What `node` computes: (function or module's name, its arguments, its options as pairs)."""
    if not isinstance(node, torch.fx.Node):
        return node
    if node.op == "placeholder":
        return "input"
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(Tensor, target)
    return target, *map(_expression, node.args), *node.kwargs.items()


def _name_of(act_fn: Any, options: dict[str, Any], module: nn.Module) -> str | None:
    """The name in fastlinear of an activation, traced to a function or to a module's name."""
    if isinstance(act_fn, str):
        part = module.get_submodule(act_fn)
        if type(part) is nn.GELU:
            return _GELUS.get(part.approximate)
        return None if "forward" in vars(part) else _MODULES.get(type(part))
    if act_fn is F.gelu:
        return _GELUS.get(options.get("approximate", "none"))
    return _FUNCTIONS.get(act_fn)
