"""Modules: Linear, in place of `nn.Linear`, and what it is many or two of.

BatchedLinear is many layers at once, GatedLinear the two layers of a gated pair.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrize

from fastlinear import _torch_internals as internals
from fastlinear._torch_internals import Linear as TorchLinear
from fastlinear.choice import backend
from fastlinear.functional import batched_linear, gated_linear, linear
from fastlinear.kernels.launching.operands import check_activation
from fastlinear.main_grad import linear_into_main_grad
from fastlinear.ops.elementwise import ACTIVATIONS, activated


class _Activation:
    """`Linear.activation`: what the layer applies, or what a subclass has set of that name.

    A subclass, as many a `class Dense(nn.Linear)` is, may keep something of its own there, and
    apply it after `super().forward(input)`: Linear's is kept elsewhere.
    """

    def __get__(self, layer: Any, kind: type | None = None) -> Any:
        if layer is None:
            return None
        for registered in (layer._modules, layer._parameters, layer._buffers):
            if "activation" in registered:
                return registered["activation"]
        return layer._fastlinear_activation


class Linear(TorchLinear):
    """`output = activation(input @ weight.T + bias)`.

    Constructor, parameters, initial values, state_dict and errors are those of `nn.Linear`. Shapes,
    dtypes and the path that computes it are those of `fastlinear.linear`.

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear` takes them.
        activation: None, or the name of what is applied to the output, as in `fastlinear.linear`.
            A subclass gives it to this constructor; an attribute `activation` that it sets
            otherwise is its own, and nothing is applied by it.
        accumulate_into_main_grad: whether backward adds weight's gradient to `weight.main_grad`
            instead of giving it to autograd (main_grad.py), as Megatron-LM's layers do with
            `gradient_accumulation_fusion` and Transformer Engine's with `fuse_wgrad_accumulation`.
            main_grad is a contiguous tensor of weight's shape, in the dtype of sums: float32, or
            float64 for a float64 weight. To make it, zero it, sum it over ranks
            and take it to the optimizer is left to the training; `weight.grad` stays as it is.

    Raises:
        ValueError: activation is none of these.
        RuntimeError: on a call that is to be differentiated, accumulate_into_main_grad is set and
            `weight.main_grad` is not there, or not such a tensor; or `nn.Linear.forward` has been
            replaced, by whose replacement a layer computes else.
    """

    __constants__ = [*TorchLinear.__constants__, "_fastlinear_activation"]  # noqa: RUF012  TorchScript wants a list
    # On the class, so that a layer made as `nn.Linear` (fastlinear.convert) has it too.
    _fastlinear_activation: str | None = None
    activation = _Activation()
    accumulate_into_main_grad: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        accumulate_into_main_grad: bool = False,
    ) -> None:
        check_activation(activation)
        backend.expect_ranks()
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if activation is not None:
            self._fastlinear_activation = activation
        if accumulate_into_main_grad:
            self.accumulate_into_main_grad = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation" and (self._fastlinear_activation is not None or self._is_exact()):
            check_activation(value)
            name = "_fastlinear_activation"
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._is_exact() and "activation" in vars(self):  # pickled when that was its place
            self.activation = vars(self).pop("activation")

    def _is_exact(self) -> bool:
        return parametrize.type_before_parametrizations(self) is Linear

    def __prepare_scriptable__(self) -> "Linear":
        """What torch.jit.script takes in the place of this layer."""
        if self.accumulate_into_main_grad:
            raise RuntimeError(
                "torch.jit.script takes layers that leave gradients to autograd, but this one has "
                "accumulate_into_main_grad=True"
            )
        return self

    def forward(self, input: Tensor) -> Tensor:
        activation = self._fastlinear_activation
        if not internals.is_scripting():  # TorchScript does not compile this branch
            if internals.linear_is_patched():
                return self._by_the_replacement(input)
            if self.accumulate_into_main_grad:
                return linear_into_main_grad(input, self.weight, self.bias, activation)
            own = self.__dict__
            parameters = own["_parameters"]
            if (
                type(self) is Linear
                and "weight" in parameters
                and "bias" in parameters
                and not ("weight" in own or "bias" in own)
                and not (hasattr(Linear, "weight") or hasattr(Linear, "bias"))
                and not is_dynamo_compiling()
            ):
                # What Module.__getattr__ would find for self.weight, which takes 0.4 us.
                return linear(input, parameters["weight"], parameters["bias"], activation)
        return linear(input, self.weight, self.bias, activation)

    def _by_the_replacement(self, input: Tensor) -> Tensor:
        if self.accumulate_into_main_grad:
            raise RuntimeError(
                "accumulate_into_main_grad takes layers whose forward is theirs, but the forward "
                "of nn.Linear has been replaced on the class"
            )
        return activated(super().forward(input), self._fastlinear_activation)

    def extra_repr(self) -> str:
        applied = self._fastlinear_activation
        activation = "" if applied is None else f", activation={applied!r}"
        accumulate = ", accumulate_into_main_grad=True" if self.accumulate_into_main_grad else ""
        return super().extra_repr() + activation + accumulate


class _Activated(nn.Module):
    """A module with an `activation` that is a name."""

    __constants__ = ["activation"]  # noqa: RUF012  as in Linear
    _may_have_none: ClassVar[bool]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":  # a module of that name would be registered, and never called
            check_activation(value, optional=self._may_have_none)
        super().__setattr__(name, value)


class BatchedLinear(_Activated):
    """`num_linears` independent layers at once: `output[b] = layer_b(input[b])`.

    Layer b is `activation(input[b] @ weight[b].T + bias[b])`. Dtypes, strides, errors and the path
    that computes it are those of `fastlinear.batched_linear`; through the kernels all layers are
    one launch. One input (M, in_features) goes to every layer as `input.expand(num_linears, -1,
    -1)`, without a copy.

    The initial values are those that as many `nn.Linear`, made one after another, would have drawn.

    Args:
        num_linears: how many layers.
        in_features, out_features: the sizes of each.
        bias: whether each has a bias.
        device, dtype: of the parameters.
        activation: None, or the name of what is applied to the output, as in `fastlinear.linear`.

    Attributes:
        weight: (num_linears, out_features, in_features).
        bias: (num_linears, out_features), or None.

    Raises:
        ValueError: activation is none of these.
    """

    _may_have_none = True

    def __init__(
        self,
        num_linears: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.num_linears = num_linears
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        shape = (num_linears, out_features)
        self.weight = nn.Parameter(torch.empty((*shape, in_features), device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws each layer's weight, then its bias, as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
        for layer in range(self.num_linears):
            nn.init.kaiming_uniform_(self.weight[layer], a=math.sqrt(5))
            if self.bias is not None:
                nn.init.uniform_(self.bias[layer], -bound, bound)

    @classmethod
    def from_linears(cls, linears: Iterable[nn.Linear]) -> "BatchedLinear":
        """Puts copies of the parameters of `linears` together in one module.

        Whether parameters require gradients, and an activation that they are `fastlinear.Linear`
        with, stay as they are. Like `torch.stack`, it copies: the layers may change afterwards.

        Args:
            linears: one or more layers, alike in the shapes, dtypes, devices and requires_grad of
                their parameters, and in their activation.

        Returns:
            A module whose `weight[b]` and `bias[b]` are those of the b-th layer.

        Raises:
            TypeError: one of them is not an `nn.Linear`.
            ValueError: there are none, or two are not alike, the message says in what; or one
                accumulates into main_grad.
        """
        layers: list[Any] = list(linears)
        if not layers:
            raise ValueError("from_linears() takes one or more layers, but linears has none")
        for position, layer in enumerate(layers):
            if not isinstance(layer, TorchLinear):
                raise TypeError(
                    f"from_linears() takes nn.Linear, but layer {position} is "
                    f"{type(layer).__name__}"
                )
            first, own = _traits(layers[0]), _traits(layer)
            for what in own:
                if own[what] != first[what]:
                    raise ValueError(
                        f"from_linears() takes layers that are alike, but {what} of layer 0 is "
                        f"{first[what]} and of layer {position} {own[what]}"
                    )
            if getattr(layer, "accumulate_into_main_grad", False):
                raise ValueError(
                    "from_linears() takes layers that leave gradients to autograd, "
                    f"but layer {position} accumulates into main_grad"
                )
        weight = torch.stack([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        # On "meta" nothing is drawn or filled.
        options: Any = {"bias": bool(biases), "device": "meta", "dtype": weight.dtype}
        options["activation"] = activation_of(layers[0])
        batch = cls(len(layers), weight.shape[2], weight.shape[1], **options)
        _fill(batch, weight, torch.stack(biases) if biases else None, like=layers[0])
        return batch

    def to_linears(self) -> list[Linear]:
        """The layers one by one, with copies of their parameters."""
        options: Any = {"bias": self.bias is not None, "dtype": self.weight.dtype}
        options |= {"device": "meta", "activation": self.activation}
        layers = [
            Linear(self.in_features, self.out_features, **options) for _ in range(self.num_linears)
        ]
        for index, layer in enumerate(layers):
            bias = None if self.bias is None else self.bias[index].clone()
            _fill(layer, self.weight[index].clone(), bias, like=self)
        return layers

    def forward(self, input: Tensor) -> Tensor:
        return batched_linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return (
            f"num_linears={self.num_linears}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}{activation}"
        )


class GatedLinear(_Activated):
    """`output = activation(gate_proj(input)) * up_proj(input)`.

    With "silu" that is SwiGLU, with "gelu" GEGLU. Dtypes, errors and the path that computes it are
    those of `fastlinear.gated_linear`; through the kernels both layers are one launch that reads
    input once.

    The layers are two modules under the names that Llama and its kin give them, so that their
    checkpoints load. Where one of them is no plain layer any more (an adapter, a hook, a
    parametrization), or their weights are of two shapes, both are called as the modules that they
    are.

    Args:
        in_features, out_features, bias, device, dtype: of each layer, as `nn.Linear` takes them.
        activation: the name of what is applied to the gate, as in `fastlinear.linear`.

    Attributes:
        gate_proj, up_proj: `fastlinear.Linear`, initialised in this order.

    Raises:
        ValueError: activation is none of these.
    """

    _may_have_none = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.up_proj = Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if not internals.is_scripting():  # noqa: SIM102  as in Linear, and TorchScript wants it so
            if not is_pair(gate, up):
                return ACTIVATIONS[self.activation](gate(input)) * up(input)
        return gated_linear(input, gate.weight, up.weight, gate.bias, up.bias, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def is_as_written(kind: type[nn.Module]) -> bool:
    """Whether `kind` has the forward of its source file, and none that was set on it since."""
    code = getattr(kind.forward, "__code__", None)
    return code is not None and code.co_filename == sys.modules[kind.__module__].__file__


def is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` does nothing but its linear product."""
    return (
        type(layer) is Linear
        and layer._fastlinear_activation is None
        and not layer.accumulate_into_main_grad
        and not internals.linear_is_patched()
        and Linear.__call__ is nn.Module.__call__
        and "forward" not in vars(layer)
        and not internals.has_hooks(layer)
        and is_as_written(Linear)
    )


def is_pair(gate: nn.Module, up: nn.Module) -> bool:
    """Whether `gated_linear` computes what the layers would, called one after the other."""
    if not is_plain(gate) or not is_plain(up) or internals.tracing() is not None:
        return False  # torch.jit.trace would write down, and warn, that shapes are compared
    # torch.fx has a proxy for `gate.weight`, of a shape that it does not know.
    one, other = (vars(of).get("weight", of._parameters.get("weight")) for of in (gate, up))
    # Of other shapes, one feature may be multiplied with many.
    return one is not None and other is not None and one.shape == other.shape


def activation_of(layer: TorchLinear) -> str | None:
    """What `layer` applies itself; a subclass may have something else as `activation`."""
    return layer._fastlinear_activation if isinstance(layer, Linear) else None


def _traits(layer: TorchLinear) -> dict[str, Any]:
    """What layers have to have in common to become one BatchedLinear, by its name in the error."""
    traits: dict[str, Any] = {}
    for name, tensor in (("weight", layer.weight), ("bias", layer.bias)):
        absent = tensor is None
        traits |= {
            f"the shape of {name}": None if absent else tuple(tensor.shape),
            f"the dtype of {name}": None if absent else tensor.dtype,
            f"the device of {name}": None if absent else tensor.device,
            f"requires_grad of {name}": None if absent else tensor.requires_grad,
        }
    return traits | {"the activation": activation_of(layer)}


def _fill(layer: Any, weight: Tensor, bias: Tensor | None, like: Any) -> None:
    """Has `layer` take these for its parameters, and be in the mode of the layer `like`."""
    layer.weight = nn.Parameter(weight.detach(), requires_grad=like.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=like.bias.requires_grad)
    layer.train(like.training)
