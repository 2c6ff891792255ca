"""Converts models in place: every `nn.Linear` becomes a `fastlinear.Linear`, and back."""

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.modules.linear import LazyLinear
from torch.nn.utils import parametrize

from fastlinear import _torch_internals as internals
from fastlinear._torch_internals import Linear as TorchLinear
from fastlinear.choice import backend, known, way
from fastlinear.conversion.fold import FOLD, find_pairs, fold, stay_folded, unfold
from fastlinear.conversion.gated_mlp import gate, gated_layers, ungate
from fastlinear.modules import Linear, is_as_written

# Set on a converted layer, so that `revert` leaves alone the layers that were made as Linear.
_MARK = "_fastlinear_converted"


@dataclass(frozen=True)
class Report:
    """What `convert` or `revert` did; printed, it is a table.

    converted: names of the layers whose class was changed, as `model.named_modules()` has them; the
        model's own is "".
    skipped: (name, reason) of each linear layer, or activation of one, that was left alone.
    gated: (name, activation) of each gated MLP that `convert` has `fastlinear.gated_linear`
        compute, or that `revert` has computed by its own forward again.
    folded: (layer's name, module's name, activation) of each activation that `convert` folded into
        a layer, or `revert` took out of it.
    faster: of how many converted layers a table says that they have a faster way on their device,
        for some batch; None of `revert`.
    """

    converted: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    gated: tuple[tuple[str, str], ...] = ()
    folded: tuple[tuple[str, str, str], ...] = ()
    faster: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        rows = [(name, "converted") for name in self.converted]
        rows += [(name, f"gated pair with {activation}") for name, activation in self.gated]
        rows += [
            (layer, f"folded: {activation} of {act}") for layer, act, activation in self.folded
        ]
        rows += [(name, f"skipped: {reason}") for name, reason in self.skipped]
        width = max((len(name or "(model)") for name, _ in rows), default=0)
        lines = [f"{name or '(model)':{width}}  {outcome}" for name, outcome in rows]
        counts = f"{len(self.converted)} converted, {len(self.skipped)} skipped"
        counts += f", {len(self.folded)} folded" if self.folded else ""
        if self.converted and self.faster is not None:
            counts += f"; a faster way is known for {self.faster} here"
            counts += ", fastlinear.tune(model, batch) finds more"
        return "\n".join([*lines, counts])


def convert(
    model: nn.Module,
    *,
    filter: Callable[[str, nn.Linear], object] | None = None,
    fold_activations: bool = False,
) -> Report:
    """Makes every `nn.Linear` of `model` a `fastlinear.Linear`, in place.

    Only the layer's class changes. Parameters, buffers, hooks and parametrizations stay the same
    objects, so optimizers, tied weights and checkpoints stay valid. What is not exactly an
    `nn.Linear` is left alone: a subclass may mean something else by its forward. So is every layer
    where something has set another `nn.Linear.forward` on the class.

    A gated MLP as Llama and its kin have it, a module of `gate_proj`, `up_proj`, `down_proj` and
    `act_fn` whose forward says `down_proj(act_fn(gate_proj(x)) * up_proj(x))` and nothing else,
    gets a subclass of its class that takes `fastlinear.gated_linear` where both its projections are
    plain layers of fastlinear. With an adapter in it or a hook on a part, it computes as before.

    With `fold_activations`, a layer applies the activation that alone reads its output, and the
    activation's module, the same object under the same name, passes its input on. Results and
    gradients are the same to rounding, and state_dict has the same keys. Which activations those
    are is read in the source: one that comes next in an `nn.Sequential`, or where the class says
    `self.act(self.layer(x))`, or `x = self.layer(x)` and directly after it `x = self.act(x)` or
    `return self.act(x)`, in every place where it names the layer or the activation. Code around
    may do what it likes, if it calls the modules that it has as wholes: within one of which it
    takes out a part, or where all parts are handed on or asked for, nothing is folded. So it is
    assumed that nobody calls the layer or the activation from outside of the model's code, and that
    no module or function of it is replaced later; else either could be called alone.
    What takes a layer's output for `input @ weight.T + bias`, as LoRA and hooks do, has to be there
    before.

    Args:
        model: any module; itself an `nn.Linear`, or with layers at any depth.
        filter: called with the name and the module of every layer that would be converted, or given
            an activation, before any is; where it returns something false, the layer is left alone.
        fold_activations: whether layers take over modules that are exactly an `nn.ReLU`, `nn.GELU`,
            `nn.SiLU`, `nn.Sigmoid`, `nn.Tanh`, or an `nn.LeakyReLU` of slope 0.01.

    Returns:
        A Report of what was converted and folded, and what was not and why.

    Raises:
        TypeError: model is not an `nn.Module`.
        Exception: whatever filter raises; then nothing has been converted.
    """
    backend.expect_ranks()
    layers, foldable = [], []
    skipped: dict[nn.Module, str] = {}
    for name, layer in _linear_layers(model, "convert"):
        reason = _why_not(layer)
        takes_activation = fold_activations and (reason is None or _is_bare(layer))
        if (reason is None or takes_activation) and filter is not None and not filter(name, layer):
            reason, takes_activation = "filter returned False", False
        if reason is None:
            layers.append(layer)
        else:
            skipped[layer] = reason
        if takes_activation:
            foldable.append(layer)
    for layer in layers:
        _rebase(layer, Linear)
        setattr(layer, _MARK, True)
    gated = gate(model)
    in_pairs = gated_layers(model)  # these have their activation already
    foldable = [layer for layer in foldable if layer not in in_pairs]
    pairs, not_folded = find_pairs(model, foldable) if foldable else ({}, {})
    fold(pairs)
    skipped = {layer: reason for layer, reason in skipped.items() if layer not in pairs}
    skipped |= {layer: f"activation not folded: {why}" for layer, why in not_folded.items()}
    report = _report(model, layers, skipped, gated, pairs)
    return replace(report, faster=_known_faster(layers))


def _known_faster(layers: Iterable[TorchLinear]) -> int:
    """For how many of them a table says that another way than PyTorch's is faster."""
    if not known.available:
        return 0
    sizes = functools.cache(way.faster_sizes)
    # Not by weights: a parametrization may count how often they are asked for.
    first = [(next(layer.parameters(), None), layer) for layer in layers]
    return sum(
        one is not None and (layer.out_features, layer.in_features) in sizes(one.device)
        for one, layer in first
    )


def revert(model: nn.Module, *, made: bool = False) -> Report:
    """Undoes `convert`: every layer that it converted is again what it was, in place.

    So is every activation that it folded, if all the layers that it was folded into are in `model`
    and can be reverted; else these are left alone. So is a layer where something has given it
    another class or forward since.

    For a tool that asks for exactly `nn.Linear`, as dynamic quantization does, revert with `made`,
    use the tool, and convert again.

    Args:
        model: a module that `convert` was called on, a copy of one, or a part of one.
        made: whether layers that were made as `fastlinear.Linear` become `nn.Linear` too. Those
            that do what an `nn.Linear` does not, as to apply an activation of their own, stay.

    Returns:
        A Report whose `converted` are the layers that are `nn.Linear` again, whose `gated` are the
        MLPs that compute by themselves again, whose `folded` are the activations that are modules
        again, and whose `skipped` are the other layers of fastlinear, and activations without a
        layer, each with the reason.

    Raises:
        TypeError: model is not an `nn.Module`.
    """
    ready: list[TorchLinear] = []
    skipped: dict[nn.Module, str] = {}
    for _, layer in _linear_layers(model, "revert"):
        if _MARK in vars(layer) or FOLD in vars(layer) or (made and isinstance(layer, Linear)):
            reason = _stays(layer)
            if reason is None:
                ready.append(layer)
            else:
                skipped[layer] = reason
        elif isinstance(layer, Linear):
            skipped[layer] = "was made as fastlinear.Linear, not converted"
    skipped |= stay_folded(model, ready)
    ready = [layer for layer in ready if layer not in skipped]
    converted = [layer for layer in ready if made or _MARK in vars(layer)]
    folded = [layer for layer in ready if FOLD in vars(layer)]
    report = _report(model, converted, skipped, ungate(model), folded)
    for layer in folded:
        unfold(layer)
    for layer in converted:
        _rebase(layer, TorchLinear)
        for name in (_MARK, "_fastlinear_activation", "accumulate_into_main_grad"):
            vars(layer).pop(name, None)
    return report


def _report(
    model: nn.Module,
    converted: Collection[nn.Module],
    skipped: dict[nn.Module, str],
    gated: tuple[tuple[str, str], ...],
    folded: Collection[nn.Module],
) -> Report:
    names = {module: name for name, module in model.named_modules()}
    pairs = [(layer, *vars(layer)[FOLD]) for layer in names if layer in folded]
    return Report(
        tuple(names[layer] for layer in converted),
        tuple((name, skipped[module]) for module, name in names.items() if module in skipped),
        gated,
        tuple((names[layer], names[act], activation) for layer, act, activation in pairs),
    )


def _linear_layers(model: nn.Module, caller: str) -> list[tuple[str, TorchLinear]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}() takes an nn.Module, but model is {type(model).__name__}")
    modules = model.named_modules()
    return [(name, layer) for name, layer in modules if isinstance(layer, TorchLinear)]


def _why_not(layer: TorchLinear) -> str | None:
    """Why `convert` leaves `layer` alone, or None where it converts it."""
    kind = parametrize.type_before_parametrizations(layer)
    if issubclass(kind, Linear):
        return "is a fastlinear.Linear already"
    if issubclass(kind, LazyLinear):
        return "is a LazyLinear that has not seen an input: run it once first"
    if kind is not TorchLinear:
        return f"is a {_name_of(kind)}, not exactly nn.Linear"
    if "forward" in vars(layer):
        return "its forward is replaced on the instance, and would not be fastlinear's"
    if internals.linear_is_patched():
        return "nn.Linear.forward is replaced on the class, and fastlinear's would run instead"
    for name in ("activation", "accumulate_into_main_grad"):
        if hasattr(layer, name):
            return f"has an attribute of its own called {name}, which fastlinear.Linear would heed"
    return None


def _name_of(kind: type) -> str:
    """The name of a class that is not nn.Linear, though it may be called so."""
    return kind.__name__ if kind.__name__ != "Linear" else f"{kind.__module__}.Linear"


def _is_bare(layer: TorchLinear) -> bool:
    """Whether `layer` is a `fastlinear.Linear` without activation already."""
    kind = parametrize.type_before_parametrizations(layer)
    return (
        kind is Linear
        and layer.activation is None
        and "forward" not in vars(layer)
        and is_as_written(Linear)
        and not internals.linear_is_patched()
    )


def _stays(layer: TorchLinear) -> str | None:
    """Why `revert` cannot make `layer` an `nn.Linear`, or None."""
    kind = parametrize.type_before_parametrizations(layer)
    since = " since it was converted" if _MARK in vars(layer) or FOLD in vars(layer) else ""
    if kind is not Linear:
        name = _name_of(kind)
        return f"has become a {name}{since}" if since else f"is a {name}, not fastlinear.Linear"
    if "forward" in vars(layer):
        # What replaced it may end in Linear's own, which an nn.Linear cannot run.
        return f"its forward was replaced{since}"
    _, activation = vars(layer).get(FOLD, (None, None))
    if layer.activation != activation:
        if since:
            return f"has got an activation{since}"
        return "has an activation, which an nn.Linear does not apply"
    if layer.accumulate_into_main_grad:
        return f"accumulates into main_grad{since}, which an nn.Linear does not"
    return None


def _rebase(layer: TorchLinear, base: type[TorchLinear]) -> None:
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
