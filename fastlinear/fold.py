"""Finds the activation modules that linear layers can apply themselves, and folds them in."""

import copy
import inspect
import random
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules import activation as torchs

from fastlinear import one_way
from fastlinear._torch_internals import Linear as TorchLinear
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
_MOST_OPTIONAL = 3  # arguments of a forward; each doubles the number of its traces

_Calls = dict[nn.Module, list[torch.fx.Node]]  # of each module, in all traces of one part


class Folded(nn.Module):
    """An activation that the layers before it apply: passes its input on.

    It is the object that it was, in its place and with its attributes; only its class was changed.
    """

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        kind = vars(self)[FOLD][0]
        return f"{kind.__name__}({kind.extra_repr(self)})"


_LEAVES = (TorchLinear, Folded, *_NAMES)


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

    torch.fx traces `model` or, where it cannot or other calls may go another way, its children, and
    so on down; also what a trace took for one operation although there are modules within. Nothing
    is changed.
    """
    pairs: dict[TorchLinear, nn.Module] = {}
    reasons: dict[TorchLinear, str] = {}
    traced: list[_Calls] = []
    reached: Counter[nn.Module] = Counter()  # from how many of the parts
    exposed: set[nn.Module] = set()  # what code that is not traced may call
    parts = [model]
    for part in parts:
        try:
            calls = _trace_all_ways(part)
        except Exception as error:  # a forward may raise anything for what is no tensor
            calls = {child: [] for child in part.children()}
            exposed |= one_way.looked_into(part)
            if any(type(child) in _NAMES for child in calls):
                why = error if isinstance(error, one_way.Unproven) else type(error).__name__
                reason = f"torch.fx cannot trace {type(part).__name__} ({why})"
                reasons |= {layer: reason for layer in layers if layer in calls}
        traced.append(calls)
        reached.update(list(calls))
        parts += [module for module in calls if reached[module] == 1 and list(module.children())]

    for calls in traced:
        called = {node: module for module, nodes in calls.items() for node in nodes}
        acts: dict[nn.Module | None, nn.Module] = {}  # of the layers that can apply them
        for layer in [layer for layer in layers if layer in calls]:
            act, why_not = _activation_of(layer, calls[layer], called)
            if act is not None and max(reached[layer], reached[act]) > 1:
                why_not = "it or the layer is in several modules that are traced apart"
            if act is not None and not exposed.isdisjoint((layer, act)):
                why_not = "code that cannot be traced may call it or the layer by itself"
            if why_not is not None:
                reasons[layer] = why_not
            elif act is not None:
                acts[layer] = act
        for layer in [layer for layer in layers if layer in acts]:
            sources = [source for call in calls[acts[layer]] for source in call.all_input_nodes]
            if all(acts.get(called.get(source)) is acts[layer] for source in sources):
                pairs[layer] = acts[layer]
            else:
                reasons[layer] = "it also follows something that cannot apply it"
    return pairs, reasons


def _activation_of(
    layer: TorchLinear, calls: list[torch.fx.Node], called: dict[torch.fx.Node, nn.Module]
) -> tuple[nn.Module | None, str | None]:
    """What follows `layer`, if that is an activation, and why the layer cannot apply it, if so."""
    readers = [reader for call in calls for reader in call.users]
    act = next((called[node] for node in readers if type(called.get(node)) in _NAMES), None)
    if act is None:
        if not any(_is_function(reader) for reader in readers):
            return None, None
        return None, (
            "it is a function call, which stays in the forward's code: use a module such as "
            "nn.ReLU, or Linear(activation=...)"
        )
    if isinstance(act, torchs.LeakyReLU) and act.negative_slope != 0.01:
        return act, f"its slope is {act.negative_slope}, and leaky_relu's is 0.01"
    if _hooked(layer, _SEE_OUTPUT) or _hooked(act, _SEE_ANY) or "forward" in vars(act):
        return act, "it or the layer has hooks, or a forward of its own"
    if not is_as_written(type(act)):
        return act, f"{type(act).__name__}.forward is replaced on the class"
    for call in calls:
        if [called.get(reader) for reader in call.users] != [act]:
            return act, "the layer's output has another reader"
        if call.meta["kept"]:
            return act, "the forward keeps the layer's output"
        if call.meta["grad"] != next(iter(call.users)).meta["grad"]:
            return act, "one of it and the layer is called under no_grad"
    return act, None


def _is_function(node: torch.fx.Node) -> bool:
    name = getattr(node.target, "__name__", node.target)
    return node.op in ("call_function", "call_method") and str(name).rstrip("_") in _NAMES.values()


def _hooked(module: nn.Module, kinds: tuple[str, ...]) -> bool:
    return any(getattr(module, kind) for kind in kinds)


def _trace_all_ways(part: nn.Module) -> _Calls:
    """The calls in the forward of `part`.

    A trace gives every argument, and so does not see what an `argument is None` leads to: each
    that is None by default is also left out.
    """
    if "forward" in vars(part):
        raise one_way.Unproven("torch.fx would trace the forward of its class")
    parameters = inspect.signature(type(part).forward).parameters.values()
    optional = [parameter.name for parameter in parameters if parameter.default is None]
    if len(optional) > _MOST_OPTIONAL:
        raise one_way.Unproven("too many optional arguments")
    calls: _Calls = defaultdict(list)
    for given in product((True, False), repeat=len(optional)):
        left_out = [name for name, here in zip(optional, given, strict=True) if not here]
        for node in _trace(part, optional, left_out).nodes:
            if node.op == "call_module":
                calls[part.get_submodule(node.target)].append(node)
    return dict(calls)


def _trace(part: nn.Module, optional: list[str], left_out: list[str]) -> torch.fx.Graph:
    """Traces a twin of `part` without data, so that what a forward sets or keeps is the twin's."""
    memo: dict[int, Tensor] = {}
    for module in part.modules():
        for value in vars(module).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, Tensor):
                    data = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                    if isinstance(tensor, nn.Parameter):
                        data = nn.Parameter(data, tensor.requires_grad)
                    memo[id(tensor)] = data
    with _undisturbed():
        twin = copy.deepcopy(part, memo)
        for module in twin.modules():
            if isinstance(module, _LEAVES):
                module.forward = _called_past_the_module
        with one_way.only(optional):
            graph = _Tracer().trace(twin, dict.fromkeys(left_out))
        for node in graph.nodes:
            if "kept" in node.meta:
                node.meta["kept"] = node.meta["kept"]() is not None
    return graph


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True  # so that one may be indexed by a size

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        found = super().create_args_for_root(*args, **kwargs)
        # What is set on a module may be set to another value later: no way may depend on it.
        for path, module in self.root.named_modules():
            for name in one_way.settings(module):
                vars(module)[name] = self.create_proxy("placeholder", f"{path}.{name}", (), {})
        return found

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # What hooks see or replace is not in the graph: such a module is a part by itself.
        apart = isinstance(m, _LEAVES) or "forward" in vars(m) or _hooked(m, _SEE_ANY)
        return apart or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = super().call_module(m, *args, **kwargs)
        if isinstance(m, _LEAVES):
            output.node.meta |= {"grad": torch.is_grad_enabled(), "kept": weakref.ref(output)}
        return output


def _called_past_the_module(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the graph does not show that a layer's forward is called directly")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever runs within, random states stay as they are, and no warnings are shown."""
    state = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)
