"""Converts models in place: every `nn.Linear` becomes a `fastlinear.Linear`, and back."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from fastlinear.gated_mlp import gate, ungate
from fastlinear.modules import Linear

# Set on a converted layer, so that `revert` leaves alone the layers that were made as Linear.
_MARK = "_fastlinear_converted"


@dataclass(frozen=True)
class Report:
    """What `convert` or `revert` did; printed, it is a table.

    converted: names of the layers whose class was changed, as `model.named_modules()` has them; the
        model's own is "".
    skipped: (name, reason) of each linear layer that was left alone.
    gated: (name, activation) of each gated MLP that takes `fastlinear.gated_linear` from now on.
    """

    converted: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    gated: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        rows = [(name, "converted") for name in self.converted]
        rows += [(name, f"gated pair with {activation}") for name, activation in self.gated]
        rows += [(name, f"skipped: {reason}") for name, reason in self.skipped]
        width = max((len(name or "(model)") for name, _ in rows), default=0)
        lines = [f"{name or '(model)':{width}}  {outcome}" for name, outcome in rows]
        return "\n".join([*lines, f"{len(self.converted)} converted, {len(self.skipped)} skipped"])


def convert(
    model: nn.Module, *, filter: Callable[[str, nn.Linear], object] | None = None
) -> Report:
    """Makes every `nn.Linear` of `model` a `fastlinear.Linear`, in place.

    Only the layer's class changes. Parameters, buffers, hooks and parametrizations stay the same
    objects, so optimizers, tied weights and checkpoints stay valid. What is not exactly an
    `nn.Linear` is left alone: a subclass may mean something else by its forward.

    A gated MLP as Llama and its kin have it, a module of `gate_proj`, `up_proj`, `down_proj` and
    `act_fn` whose forward a trace shows to be `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, gets
    a subclass of its class that takes `fastlinear.gated_linear` where both its projections are
    plain layers of fastlinear. With an adapter in it or a hook on a part, it computes as before.

    Args:
        model: any module; itself an `nn.Linear`, or with layers at any depth.
        filter: called with the name and the module of every layer that would be converted, before
            any is; where it returns something false, the layer is left alone.

    Returns:
        A Report of what was converted, and what was not and why.

    Raises:
        TypeError: model is not an `nn.Module`.
        Exception: whatever filter raises; then nothing has been converted.
    """
    layers, skipped = [], []
    for name, layer in _linear_layers(model, "convert"):
        reason = _why_not(layer)
        if reason is None and filter is not None and not filter(name, layer):
            reason = "filter returned False"
        if reason is None:
            layers.append((name, layer))
        else:
            skipped.append((name, reason))
    for _, layer in layers:
        _rebase(layer, Linear)
        setattr(layer, _MARK, True)
    return Report(tuple(name for name, _ in layers), tuple(skipped), gate(model))


def revert(model: nn.Module) -> Report:
    """Undoes `convert`: every layer that it converted is again what it was, in place.

    A layer is left alone where something has given it another class or forward since.

    Args:
        model: a module that `convert` was called on, a copy of one, or a part of one.

    Returns:
        A Report whose `converted` are the layers that are `nn.Linear` again, and whose `skipped`
        are the other layers of fastlinear, each with the reason.

    Raises:
        TypeError: model is not an `nn.Module`.
    """
    layers: list[tuple[str, Linear]] = []
    skipped: list[tuple[str, str]] = []
    for name, layer in _linear_layers(model, "revert"):
        kind = parametrize.type_before_parametrizations(layer)
        if _MARK in vars(layer):
            if kind is not Linear:
                skipped.append((name, f"has become a {kind.__name__} since it was converted"))
            elif "forward" in vars(layer):
                # What replaced it may end in Linear's own, which an nn.Linear cannot run.
                skipped.append((name, "its forward was replaced since it was converted"))
            elif layer.activation is not None:
                skipped.append((name, "has got an activation since it was converted"))
            else:
                layers.append((name, layer))
        elif isinstance(layer, Linear):
            skipped.append((name, "was made as fastlinear.Linear, not converted"))
    ungate(model)
    for _, layer in layers:
        _rebase(layer, nn.Linear)
        delattr(layer, _MARK)
    return Report(tuple(name for name, _ in layers), tuple(skipped))


def _linear_layers(model: nn.Module, caller: str) -> list[tuple[str, nn.Linear]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}() takes an nn.Module, but model is {type(model).__name__}")
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def _why_not(layer: nn.Linear) -> str | None:
    """Why `convert` leaves `layer` alone, or None where it converts it."""
    kind = parametrize.type_before_parametrizations(layer)
    if issubclass(kind, Linear):
        return "is a fastlinear.Linear already"
    if issubclass(kind, nn.LazyLinear):
        return "is a LazyLinear that has not seen an input: run it once first"
    if kind is not nn.Linear:
        return f"is a {kind.__name__}, not exactly nn.Linear"
    if "forward" in vars(layer):
        return "its forward is replaced on the instance, and would not be fastlinear's"
    if hasattr(layer, "activation"):
        return "has an attribute of its own called activation, which fastlinear.Linear would apply"
    return None


def _rebase(layer: nn.Linear, base: type[nn.Linear]) -> None:
    """Makes `layer` a `base`, parametrized as it is.

    torch makes a class for each parametrized layer. It gets a new one rather than new bases for
    that one, which copies of the layer share.
    """
    if parametrize.is_parametrized(layer):
        members = {
            name: member
            for name, member in vars(type(layer)).items()
            if name not in ("__dict__", "__weakref__")
        }
        layer.__class__ = type(type(layer).__name__, (base,), members)
    else:
        layer.__class__ = base
