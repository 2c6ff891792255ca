"""Finds the gated MLPs of Llama and its kin in a model, and has `gated_linear` compute them."""

import ast
import copyreg
import functools
import inspect
from types import FunctionType
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import activation as torchs
from torch.nn.utils import parametrize

from fastlinear import _torch_internals as internals
from fastlinear.conversion.source import tree_of
from fastlinear.functional import gated_linear
from fastlinear.modules import GatedLinear, Linear, is_as_written, is_pair

# What the forward of a gated MLP says: the product, with its factors in either order, returned at
# once or by a name.
_GATED = (
    "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
    "self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))",
)
_MODULES: dict[type[nn.Module], str] = {
    torchs.SiLU: "silu",
    torchs.ReLU: "relu",
    torchs.Sigmoid: "sigmoid",
    torchs.Tanh: "tanh",
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


class GatedMLP(nn.Module):
    """What `convert` adds to the class of a module that computes a gated MLP.

    `down_proj(act_fn(gate_proj(x)) * up_proj(x))` takes `gated_linear`, as long as the module is
    made of what it was made of; else, with an adapter in it, a hook on a part or weights of two
    shapes, its own forward computes it.
    """

    _fastlinear_forward: ClassVar[tuple[Any]]  # that of the module's own class, as it was found
    _fastlinear_kind: ClassVar[type[nn.Module]]  # the module's own class, which made these:
    gate_proj: Linear
    up_proj: Linear
    down_proj: nn.Module
    act_fn: nn.Module
    # What `convert` found: the module act_fn, and its name in fastlinear.
    _fastlinear_gate: tuple[nn.Module, str] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if internals.is_scripting():  # TorchScript compiles this branch alone
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        gate, up = self.gate_proj, self.up_proj
        if (
            self._fastlinear_gate is None
            or self._fastlinear_gate[0] is not self.act_fn
            or not _is_untouched(self.act_fn)
            or not is_pair(gate, up)
            or self._fastlinear_kind.forward is not self._fastlinear_forward[0]
        ):
            output: Tensor = super().forward(x)
        else:
            activation = self._fastlinear_gate[1]
            hidden = gated_linear(x, gate.weight, up.weight, gate.bias, up.bias, activation)
            output = self.down_proj(hidden)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time: a copy, or a pickle, makes it again.
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _empty, (self._fastlinear_kind,), *reduced[2:]
        return reduced


_classes: dict[Any, type[GatedMLP]] = {}


def _gated(kind: type[nn.Module]) -> type[GatedMLP]:
    """`kind` computing its gated MLP by `gated_linear`; the same class each time."""
    # Its forward may say something else by now, as where a pickle is loaded.
    forward = kind.forward if _says_gated(kind.forward) else None
    if (kind, forward) not in _classes:
        # Called what it was: some look modules up by the name of their class.
        members = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        # Else TorchScript would take those of GatedMLP.
        annotations = (inspect.get_annotations(base) for base in kind.__mro__)
        members |= {"__annotations__": next(filter(None, annotations))}
        members |= {"_fastlinear_kind": kind, "_fastlinear_forward": (forward,)}
        _classes[kind, forward] = type(kind.__name__, (GatedMLP, kind), members)
    return _classes[kind, forward]


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
    """Undoes `gate`, and returns what it would.

    A module that has got another class since, as by a parametrization, or another forward, which
    may end in its own, stays what it is.
    """
    found = []
    module: Any
    for name, module in model.named_modules():
        if (
            isinstance(module, GatedMLP)
            and "_fastlinear_kind" in vars(type(module))
            and "forward" not in vars(module)
        ):
            gate = vars(module).pop("_fastlinear_gate", None)
            module.__class__ = module._fastlinear_kind  # type: ignore[assignment]
            if gate is not None:
                found.append((name, gate[1]))
    return tuple(found)


def gated_layers(model: nn.Module) -> set[nn.Module]:
    """The layers of the gated pairs in `model`, which have their activation already."""
    pairs = [part for part in model.modules() if isinstance(part, (GatedMLP, GatedLinear))]
    return {layer for pair in pairs for layer in (pair.gate_proj, pair.up_proj)}


def _activation_of(module: Any) -> str | None:
    """The activation of a gated MLP that `gated_linear` can compute, or None."""
    if (
        isinstance(module, GatedMLP)
        or parametrize.is_parametrized(module)
        or "forward" in vars(module)
        or not _says_gated(type(module).forward)
    ):
        return None
    parts: list[Any] = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "act_fn")]
    gate, up, act_fn = parts
    if not all(isinstance(part, nn.Module) for part in parts):
        return None
    if not (is_pair(gate, up) and _is_untouched(act_fn)):
        return None
    try:
        _gated(type(module))
    except Exception:  # its class asks something of subclasses
        return None
    return _name_of(act_fn)


@functools.cache
def _says_gated(forward: Any) -> bool:
    """Whether the source of `forward` is that of a gated MLP, and nothing else.

    A trace would not do: it shows one way through a forward, and none of its side effects.
    """
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return False
    function = tree_of(forward)
    if not isinstance(function, ast.FunctionDef):
        return False
    names = [argument.arg for argument in function.args.args]
    if names != ["self", "x"] or len(inspect.signature(forward).parameters) != 2:
        return False
    statements = function.body[ast.get_docstring(function) is not None :]
    match statements:
        case [ast.Return(value=product)]:
            pass
        case [
            ast.Assign(targets=[ast.Name(id=assigned)], value=product),
            ast.Return(value=ast.Name(id=returned)),
        ] if assigned == returned:
            pass
        case _:
            return False
    return product is not None and ast.unparse(product) in _GATED


def _is_untouched(act_fn: nn.Module) -> bool:
    """Whether calling `act_fn` calls the forward that its class was written with, alone."""
    return (
        "forward" not in vars(act_fn)
        and not internals.has_hooks(act_fn)
        and is_as_written(type(act_fn))
    )


def _name_of(act_fn: Any) -> str | None:
    """The name in fastlinear of an activation of torch's or of transformers'."""
    kind = type(act_fn)
    if kind is torchs.GELU:
        return _GELUS.get(act_fn.approximate)
    if kind.__module__ != "transformers.activations":
        return _MODULES.get(kind)
    function = getattr(act_fn, "act", None)
    if kind.__name__ == "GELUActivation" and function is F.gelu:
        return "gelu"
    if kind.__name__ == "GELUTanh" and isinstance(function, functools.partial):
        tanh = (F.gelu, (), {"approximate": "tanh"})
        return "gelu_tanh" if (function.func, function.args, function.keywords) == tanh else None
    return "silu" if kind.__name__ == "SiLUActivation" else None
