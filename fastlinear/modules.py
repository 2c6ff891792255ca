"""Modules: Linear, in place of `nn.Linear`."""

from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from fastlinear import _torch_internals as internals
from fastlinear.functional import linear
from fastlinear.kernels.operands import check_activation

# torch.fx.symbolic_trace writes a layer down as one call of `linear`: its arguments then are no
# tensors that a path could be chosen for.
torch.fx.wrap("linear")


class Linear(nn.Linear):
    """`output = activation(input @ weight.T + bias)`.

    Constructor, parameters, initial values, state_dict and errors are those of `nn.Linear`. Shapes,
    dtypes and the path that computes it are those of `fastlinear.linear`.

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear` takes them.
        activation: None, or the name of what is applied to the output, as in `fastlinear.linear`.

    Raises:
        ValueError: activation is none of these.
    """

    __constants__ = [*nn.Linear.__constants__, "activation"]  # noqa: RUF012  TorchScript wants a list
    # On the class, so that a layer made as `nn.Linear` (fastlinear.convert) has it too.
    activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if activation is not None:
            self.activation = activation

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":  # a module of that name would be registered, and never called
            check_activation(value)
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        if internals.is_scripting():  # TorchScript compiles this branch alone
            if self.activation is not None:
                raise NotImplementedError("torch.jit.script takes Linear with activation=None only")
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + activation
