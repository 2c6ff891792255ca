"""Finds the activation modules that linear layers can apply themselves, and folds them in."""

import functools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import activation as torchs

from fastlinear._torch_internals import Linear as TorchLinear
from fastlinear.conversion.source import read
from fastlinear.modules import is_as_written

# Set by `fold`. On a layer: its activation's module, and what the layer's `activation` became. On
# that module: the class that it had, and how many layers it was folded into.
FOLD = "_fastlinear_folded"

_NAMES: dict[type, str] = {
    torchs.ReLU: "relu",
    torchs.GELU: "gelu",
    torchs.SiLU: "silu",
    torchs.Sigmoid: "sigmoid",
    torchs.Tanh: "tanh",
    torchs.LeakyReLU: "leaky_relu",
}
_SEE_OUTPUT = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_SEE_ANY = (*_SEE_OUTPUT, "_forward_pre_hooks")


class Folded(nn.Module):
    """An activation that the layers before it apply: passes its input on.

    It is the object that it was, in its place and with its attributes; only its class was changed.
    """

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        kind = vars(self)[FOLD][0]
        return f"{kind.__name__}({kind.extra_repr(self)})"


def fold(pairs: dict[TorchLinear, nn.Module]) -> None:
    """Makes the layers, which are fastlinear's by now, apply the activations."""
    for layer, act in pairs.items():
        kind, count = vars(act).get(FOLD, (type(act), 0))
        is_tanh_gelu = kind is torchs.GELU and act.approximate == "tanh"
        activation = "gelu_tanh" if is_tanh_gelu else _NAMES[kind]
        setattr(layer, "activation", activation)  # noqa: B010  nn.Linear has none
        setattr(layer, FOLD, (act, activation))  # in a tuple, or act would be registered
        setattr(act, FOLD, (kind, count + 1))
        act.__class__ = Folded


def unfold(layer: TorchLinear) -> None:
    """Undoes `fold`; every layer that the activation was folded into needs it."""
    act, _ = vars(layer).pop(FOLD)
    delattr(layer, "_fastlinear_activation")  # where Linear keeps it
    if isinstance(act, Folded):
        act.__class__ = vars(act).pop(FOLD)[0]


def stay_folded(model: nn.Module, layers: Collection[TorchLinear]) -> dict[nn.Module, str]:
    """The layers and activations of `model` that cannot be unfolded if only `layers` can, and why.

    An activation has to be for all its layers at once, or it would be applied twice or never.
    """
    pairs = {layer: vars(layer)[FOLD][0] for layer in layers if FOLD in vars(layer)}
    ready = Counter(pairs.values())
    folded = [module for module in model.modules() if type(module) is Folded]
    whole = {act for act in folded if ready[act] == vars(act)[FOLD][1]}
    reason = "its activation is not here, or is folded into other layers that cannot be reverted"
    stay: dict[nn.Module, str] = {layer: reason for layer, act in pairs.items() if act not in whole}
    reason = "was folded into layers that are not here, or cannot be reverted"
    return stay | {act: reason for act in folded if act not in whole}


def find_pairs(
    model: nn.Module, layers: Collection[TorchLinear]
) -> tuple[dict[TorchLinear, nn.Module], dict[TorchLinear, str]]:
    """The activation that each of `layers` can apply, and why others that have one cannot.

    The source has to say `act(layer(x))` at every place where it names the one or the other. Then
    both are called or neither, whatever stands around: no branch or loop has to be understood.
    """
    parts = _Parts(model)
    acts: dict[nn.Module | None, nn.Module] = {}  # of the layers that can apply them
    reasons: dict[TorchLinear, str] = {}
    for layer in layers:
        after = parts.beside(layer, 1)
        near = [*after, *parts.near(layer)]
        act = next((part for part in near if type(part) in _NAMES), None)
        if isinstance(act, nn.Module):
            why_not = parts.why_not(layer) or parts.why_not(act) or _why_not(layer, act)
            if why_not is None and after != {act}:
                why_not = "the code does not say act(layer(x)) wherever it names the layer"
            if why_not is None:
                acts[layer] = act
            else:
                reasons[layer] = why_not
        elif any(isinstance(part, str) and part.rstrip("_") in _NAMES.values() for part in near):
            reasons[layer] = (
                "it is a function call, which stays in the forward's code: use a module such as "
                "nn.ReLU, or Linear(activation=...)"
            )
    pairs: dict[TorchLinear, nn.Module] = {}
    for layer in [layer for layer in layers if layer in acts]:
        if all(acts.get(before) is acts[layer] for before in parts.beside(acts[layer], -1)):
            pairs[layer] = acts[layer]
        else:
            reasons[layer] = "it is also called on something that cannot apply it"
    return pairs, reasons


def _why_not(layer: TorchLinear, act: nn.Module) -> str | None:
    """Why `layer` cannot apply `act`, wherever they are called."""
    if isinstance(act, torchs.LeakyReLU) and act.negative_slope != 0.01:
        return f"its slope is {act.negative_slope}, and leaky_relu's is 0.01"
    if _hooked(layer, _SEE_OUTPUT) or _hooked(act, _SEE_ANY) or "forward" in vars(act):
        return "it or the layer has hooks, or a forward of its own"
    if not is_as_written(type(act)):
        return f"{type(act).__name__}.forward is replaced on the class"
    return None


def _hooked(module: nn.Module, kinds: tuple[str, ...]) -> bool:
    return any(getattr(module, kind) for kind in kinds)


class _Parts:
    """The modules within a model: where they are registered, and how the code there uses them."""

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if module._modules]
        self._sources = {kind: read(kind) for kind in {type(module) for module in modules}}
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        self._closed: dict[nn.Module, str] = {}  # why nothing within is folded
        for module in modules:
            kind = type(module)
            why = self._sources[kind].unknown or _set_aside(module)
            if why is not None:
                self._close(module, why)
            for name, part in module._modules.items():
                if part is not None:
                    self._places[part].append((module, name))
                    how = "items" if type(part) in (nn.ModuleList, nn.ModuleDict) else "call"
                    if any(use.how != how for use in self._sources[kind].uses.get(name, ())):
                        self._close(part, f"{kind.__name__} may call what is in {name} by itself")

    def _close(self, module: nn.Module, why: str) -> None:
        if module not in self._closed:
            self._closed[module] = why
            for part in module.children():
                self._close(part, why)

    def why_not(self, module: nn.Module) -> str | None:
        whys = [self._closed.get(around) for around, _ in self._places[module]]
        return next(filter(None, whys), None)

    def near(self, module: nn.Module) -> Iterator[nn.Module | str | None]:
        """What may get the output of `module` on another way; of a function, its name."""
        for around, name in self._places[module]:
            source = self._sources[type(around)]
            if source.unknown:
                yield from around.children()
            for taker in sorted(source.near.get(name, ())):
                function = taker.removeprefix("()")
                yield function if function != taker else around._modules.get(taker)

    def beside(self, module: nn.Module, step: int) -> set[nn.Module | None]:
        """What gets the output of `module`, or for a step of -1 gives its input, at each place.

        None is for what is no module.
        """
        found: set[nn.Module | None] = set()
        for around, name in self._places[module]:
            if _is_sequence(around):
                names = list(around._modules)
                place = names.index(name) + step
                if 0 <= place < len(names):
                    found.add(_end(around._modules[names[place]], step))
                else:
                    found |= self.beside(around, step) if _is_transparent(around) else {None}
            else:  # a subclass of Sequential calls its parts without naming them
                is_sequence = isinstance(around, nn.Sequential)
                uses = [] if is_sequence else self._sources[type(around)].uses.get(name, [])
                uses = [use for use in uses if use.how != "data"]
                others = [use.after if step > 0 else use.before for use in uses] or [None]
                parts = [around._modules.get(other) if other else None for other in others]
                found |= {_end(part, step) for part in parts}
        return found or {None}


def _is_sequence(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and is_as_written(nn.Sequential)


def _is_transparent(module: nn.Module) -> bool:
    """Whether the first part of `module` gets its input, and the last one's output is its own."""
    return _is_sequence(module) and bool(module._modules) and not _hooked(module, _SEE_ANY)


def _end(module: nn.Module | None, step: int) -> nn.Module | None:
    """What is called first in `module`, or for a step of -1 last."""
    while module is not None and _is_transparent(module):
        module = list(module._modules.values())[0 if step > 0 else -1]
    return module


def _set_aside(module: nn.Module) -> str | None:
    """What has been set on `module` that may call its parts, without that its class says so."""
    ours = vars(nn.Module())
    for name, value in vars(module).items():
        if name in ours or name.startswith(("_fastlinear", "_compiled_call")):
            continue
        for one in _flat(value):
            may_have_parts = isinstance(one, (nn.Module, MethodType, functools.partial))
            if may_have_parts or (isinstance(one, FunctionType) and one.__closure__):
                return f"{name} may have modules in it that are not registered"
        if callable(value) and hasattr(type(module), name):
            return f"{name} is replaced on the instance"
    return None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list, set, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _flat(one)
    else:
        yield value
