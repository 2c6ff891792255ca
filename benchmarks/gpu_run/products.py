"""What the kernels compute, three times over: by their launchers, by PyTorch, and in float64.

`benchmarks.numerics` compares the three. A `Product` is one launcher with its operands. How exact
it has to be say the tests (`tests/helpers/oracle.py`), by the sizes of the sums on the way.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# The truth and the budget of an error are the tests'.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
from oracle import (
    exact_backward,
    exact_forward,
    matmul,
    native_backward,
    native_forward,
    normal,
    rounding_step,
    sum_scale,
)

from fastlinear.kernels.backward import elementwise
from fastlinear.kernels.backward import gated as gated_backward
from fastlinear.kernels.backward import grad_weight as backward_weight
from fastlinear.kernels.backward import linear as backward
from fastlinear.kernels.configs.config import Kernel
from fastlinear.kernels.forward import gated
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.launching import launch
from fastlinear.kernels.launching.operands import FROM_OUTPUT
from fastlinear.ops.elementwise import ACTIVATIONS, GRADIENTS

Results = tuple[Tensor, ...]


@dataclass
class Product:
    """One launcher, for operands that are given.

    name: the launcher's, with what it was told.
    call: runs it, in the configuration given or, with None, in the one that it chooses.
    native, exact: what PyTorch gives in the same dtype, and the truth in float64; made when called.
    kernel: whose configurations `call` takes, "backward" for pairs; None where it takes none.
    operands: those that decide which configurations are legal.
    applies: whether an activation is applied to the accumulators.
    scales: the sizes at which results are rounded on the way, as `oracle.assert_as_exact` has it.
    """

    name: str
    call: Callable[[Any], Results]
    native: Callable[[], Results]
    exact: Callable[[], Results]
    kernel: Kernel | Literal["backward"] | None = None
    operands: tuple[Tensor, ...] = ()
    applies: bool = False
    scales: Callable[[Results], list[float]] = lambda exact: [0.0] * len(exact)

    def budgets(self, native: Results, exact: Results) -> list[float]:
        """Of each result's largest error: twice PyTorch's, and one rounding step."""
        return [
            2 * largest_error(result, truth)
            + rounding_step(result.dtype) * max(scale, largest(truth))
            for result, truth, scale in zip(native, exact, self.scales(exact), strict=True)
        ]

    @property
    def aligned(self) -> bool:
        described = [launch.Operand(*launch.describe(one)[0]) for one in self.operands]
        whole = not (self.applies and described[1].shape[-2] % 16)  # as launch.aligned_product
        return whole and launch.aligned(*described)

    @property
    def describable(self) -> bool:
        if self.kernel != "forward":
            return False
        rows, weight = (launch.Operand(*fields) for fields in launch.describe(*self.operands)[:2])
        batched = len(weight.shape) == 3
        return launch.describable(launch.rows_of(rows, batched=batched), weight)


def operand(shape: tuple[int, ...], dtype: torch.dtype, device: str, fenced: bool) -> Tensor:
    """Normal random numbers; fenced, they lie in a buffer of NaN."""
    if fenced:
        return normal(shape, dtype, torch.device(device))
    return torch.randn(shape, device=device).to(dtype)


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def largest_error(result: Tensor, exact: Tensor) -> float:
    return largest(result.double() - exact)


def sizes_of(*tensors: Tensor) -> Results:
    """In float64, to sum terms that do not cancel."""
    return tuple(one.double().abs() for one in tensors)


def sizes_of_few(sizes: Results, exact: Results) -> list[float]:
    """How large sums get on the way, where their results are so few that all may end near 0."""
    return [
        largest(size) if one.numel() < 100 else 0.0 for size, one in zip(sizes, exact, strict=True)
    ]


def roundings(dtype: torch.dtype) -> float:
    """On the way through an activation; float64's truth is made in float64 itself."""
    return 16.0 if dtype == torch.float64 else 4.0


class Gradients:
    """All three gradients of a layer by PyTorch and in float64, each made when first asked for."""

    def __init__(self, g: Tensor, x: Tensor, w: Tensor) -> None:
        self.operands = g, x, w

    @functools.cached_property
    def native(self) -> Results:
        return native_backward(*self.operands)

    @functools.cached_property
    def exact(self) -> Results:
        return exact_backward(*self.operands)

    @functools.cached_property
    def bias_scale(self) -> float:
        g = self.operands[0]
        return sum_scale(g, g.dtype, dim=-2)

    def scales(self, which: slice, exact: Results) -> list[float]:
        """Of those that `which` picks, the `scales` of a Product."""
        sizes = native_backward(*sizes_of(*self.operands))[which]
        few = sizes_of_few(sizes, exact)
        return few if which.stop < 3 else [*few[:-1], max(few[-1], self.bias_scale)]


def linear(x: Tensor, w: Tensor, b: Tensor, g: Tensor, precision: str) -> Iterator[Product]:
    """The layer, or B of them, without an activation."""
    gradients = Gradients(g, x, w)
    yield Product(
        "linear_forward",
        lambda config: (forward.linear_forward(x, w, b, precision=precision, config=config),),
        lambda: (native_forward(x, w, b),),
        lambda: (exact_forward(x, w, b),),
        "forward",
        (x, w),
        scales=lambda exact: sizes_of_few((native_forward(*sizes_of(x, w, b)),), exact),
    )
    yield Product(
        "linear_backward_input",
        lambda config: (backward.linear_backward_input(g, w, precision=precision, config=config),),
        lambda: gradients.native[:1],
        lambda: gradients.exact[:1],
        "forward",
        (g, w),
        scales=functools.partial(gradients.scales, slice(0, 1)),
    )
    options = {"batched": w.dim() == 3, "precision": precision}
    for splits in (None, 3):
        yield Product(
            "linear_backward_weight" + (f", {splits} splits" if splits else ""),
            lambda config, splits=splits: backward_weight.linear_backward_weight(
                g, x, True, config=config, splits=splits, **options
            ),
            lambda: gradients.native[1:],
            lambda: gradients.exact[1:],
            "backward_weight",
            (g, x),
            scales=functools.partial(gradients.scales, slice(1, 3)),
        )
    yield from accumulated(gradients, options)
    for splits in (None, 3):
        yield Product(
            "linear_backward" + (f", {splits} splits" if splits else ""),
            lambda config, splits=splits: backward.linear_backward(
                g, x, w, True, config=config, splits=splits, **options
            ),
            lambda: gradients.native,
            lambda: gradients.exact,
            "backward",
            (g, x, w),
            scales=functools.partial(gradients.scales, slice(0, 3)),
        )


def accumulated(gradients: Gradients, options: dict[str, Any]) -> Iterator[Product]:
    """The weight's gradient added to what there is."""
    g, x, w = gradients.operands
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    start = torch.randn(w.shape, dtype=wide, device=w.device)

    def into_main_grad(config: Any, splits: int | None) -> Results:
        main_grad = start.clone()
        backward_weight.linear_backward_weight(
            g, x, main_grad=main_grad, config=config, splits=splits, **options
        )
        return (main_grad,)

    for splits in (None, 3):
        yield Product(
            "linear_backward_weight into main_grad" + (f", {splits} splits" if splits else ""),
            functools.partial(into_main_grad, splits=splits),
            lambda: (start + native_backward(g.to(wide), x.to(wide), w.to(wide))[1],),
            lambda: (start + gradients.exact[1],),
            "backward_weight",
            (g, x),
            scales=functools.partial(gradients.scales, slice(1, 2)),
        )


def activated(
    x: Tensor, w: Tensor, b: Tensor, g: Tensor, precision: str, name: str
) -> Iterator[Product]:
    """The layer with an activation: forward, and the pass through the activation back."""
    several = roundings(x.dtype)
    saves = name not in FROM_OUTPUT
    count = 2 if saves else 1  # of results

    def both(form: Callable[..., Tensor]) -> Results:
        preactivation = form(x, w, b)
        return ACTIVATIONS[name](preactivation), preactivation

    def scales(exact: Results) -> list[float]:
        size = native_forward(*sizes_of(x, w, b))
        few = sizes_of_few((size,) * count, exact)
        return [several * max(one, largest(truth)) for one, truth in zip(few, exact, strict=True)]

    yield Product(
        f"linear_activation_forward, {name}",
        lambda config: forward.linear_activation_forward(
            x, w, b, name, saves, precision=precision, config=config
        )[:count],
        lambda: both(native_forward)[:count],
        lambda: both(exact_forward)[:count],
        "forward",
        (x, w),
        applies=True,
        scales=scales,
    )
    output, preactivation = both(native_forward)
    saved = (output if name in FROM_OUTPUT else preactivation).contiguous()
    yield Product(
        f"activation_backward, {name}",
        lambda config: (elementwise.activation_backward(g, saved, name),),
        lambda: (GRADIENTS[name](g, saved),),
        lambda: (GRADIENTS[name](g.double(), saved.double()),),
        scales=lambda exact: [
            several * max(largest(exact[0]), *sizes_of_few((g.double(),), exact))
        ],
    )


def gated_pair(
    x: Tensor, w: Tensor, b: Tensor, g: Tensor, precision: str, name: str
) -> Iterator[Product]:
    """Two layers of which one gates the other; `w` and `b` hold those of both."""
    (wg, wu), (bg, bu) = w.chunk(2), b.chunk(2)
    several = roundings(x.dtype)
    act = ACTIVATIONS[name]
    saves = name not in FROM_OUTPUT  # inference saves nothing; either way is to be seen
    count = 3 if saves else 1  # of results

    def products(form: Callable[..., Tensor]) -> Results:
        gate, up = form(x, wg, bg), form(x, wu, bu)
        return act(gate) * up, gate, up

    def forward_scales(exact: Results) -> list[float]:
        gate, up = (native_forward(*sizes_of(x, *layer)) for layer in ((wg, bg), (wu, bu)))
        few = sizes_of_few((gate * up, gate, up)[:count], exact)
        return [several * max(one, largest(truth)) for one, truth in zip(few, exact, strict=True)]

    yield Product(
        f"gated_linear_forward, {name}",
        lambda config: gated.gated_linear_forward(
            x, wg, wu, bg, bu, name, saves, precision=precision, config=config
        )[:count],
        lambda: products(native_forward)[:count],
        lambda: products(exact_forward)[:count],
        "gated_forward",
        (x, wg, wu),
        applies=True,
        scales=forward_scales,
    )
    _, gate, up = (one.contiguous() for one in products(native_forward))
    yield gated_gradients(x, w, gate, up, g, precision, name)


def gated_gradients(
    x: Tensor, w: Tensor, gate: Tensor, up: Tensor, g: Tensor, precision: str, name: str
) -> Product:
    """All gradients of a gated pair, by what its forward has kept."""
    weights = w.chunk(2)

    def grad_products(wide: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradients of gate and up, side by side."""
        leaves = [wide(one).detach().requires_grad_() for one in (gate, up)]
        output = ACTIVATIONS[name](leaves[0]) * leaves[1]
        return torch.cat(torch.autograd.grad(output, leaves, wide(g)), -1)

    def native() -> Results:
        grad = grad_products(lambda one: one)
        return *native_backward(grad, x, w), grad

    def exact() -> Results:
        grad = grad_products(torch.Tensor.double)
        if x.dtype == torch.float64:
            return *exact_backward(grad, x, w), grad
        return *native_backward(grad, x.double(), w.double()), grad

    def scales(exact: Results) -> list[float]:
        grad = exact[-1].abs()
        sizes = *native_backward(grad, *sizes_of(x, w)), grad
        # In 16 bits PyTorch rounds the same terms, and its own error says how far that carries.
        if x.dtype.itemsize == 2:
            return [roundings(x.dtype) * one for one in sizes_of_few(sizes, exact)]
        return [roundings(x.dtype) * largest(one) for one in sizes]

    return Product(
        f"gated_linear_backward, {name}",
        lambda config: gated_backward.gated_linear_backward(
            g, gate, up, x, *weights, True, name, precision=precision, config=config
        ),
        native,
        exact,
        "backward",
        (g, x, *weights),
        scales=scales,
    )


def far_output(x: Tensor, w: Tensor) -> Iterator[Product]:
    """A forward with an output past 2**31 elements, of which the last rows are compared."""
    tail = x[-256:]
    yield Product(
        "linear_forward, far output",
        lambda config: (forward.linear_forward(x, w)[-256:].clone(),),
        lambda: (F.linear(tail, w),),
        lambda: (matmul(tail, w.mT),),
    )
