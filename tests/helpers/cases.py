"""Calls that hypothesis may draw: shapes, strides, dtypes, settings and configurations.

A case is a value that prints as one line, from which it is made again, so that a failure needs
nothing kept to be repeated.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from torch import Tensor

from fastlinear.kernels.configs.config import KINDS
from fastlinear.kernels.launching.operands import ACTIVATIONS

# Else it leaves what it finds in the sources beside them.
set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))

FUNCTIONS = ("linear", "batched_linear", "gated_linear")
DTYPES = ("float32", "float64", "float16", "bfloat16")


class Case(NamedTuple):
    """One call, forward and backward; the defaults are the simplest.

    leading: input's dimensions but the last, as in "3x5"; those of batched_linear are B and M.
    N, K: out_features and in_features.
    bias, up_bias: "none", one of LAYOUTS, or "one", which is expanded over the features.
    needed: whether input, weight and bias need a gradient; of gated_linear input, both weights and
        both biases.
    input, weight, up_weight, grad_output: one of LAYOUTS, and "+" how many elements its first lies
        from an aligned address.
    main_grad: "none", or "contiguous+" and such a number, for what weight's gradient is added to.
    precision: how float32 products are formed.
    kind: "chosen" calls the public function; a kind of kernel calls the launchers, with tiles of
        `blocks` for M, N and K where nothing forbids them, and sums in `splits` parts.
    """

    function: str = "linear"
    leading: str = ""
    N: int = 1
    K: int = 1
    dtype: str = "float32"
    activation: str = "none"
    bias: str = "none"
    up_bias: str = "none"
    needed: str = "111"
    input: str = "contiguous+0"
    weight: str = "contiguous+0"
    up_weight: str = "contiguous+0"
    grad_output: str = "contiguous+0"
    main_grad: str = "none"
    scale: float = 1.0
    precision: str = "ieee"
    autocast: str = "none"
    batch_invariant: int = 0
    kind: str = "chosen"
    blocks: str = "32x32x32"
    splits: int = 1
    seed: int = 0

    def __str__(self) -> str:
        """What differs from the defaults, as `parse` reads it."""
        fields = self._asdict().items()
        return " ".join(
            f"{name}={value}" for name, value in fields if value != self._field_defaults[name]
        )

    @classmethod
    def parse(cls, text: str) -> "Case":
        given = dict(part.split("=", 1) for part in text.split())
        kinds = {name: type(default) for name, default in cls._field_defaults.items()}
        return cls(**{name: kinds[name](value) for name, value in given.items()})

    @property
    def gated(self) -> bool:
        return self.function == "gated_linear"

    @property
    def batched(self) -> bool:
        return self.function == "batched_linear"

    @property
    def shape(self) -> tuple[int, ...]:
        """`leading` in numbers."""
        return sizes(self.leading)

    @property
    def computed_in(self) -> torch.dtype:
        """The dtype of the output, which autocast may choose."""
        cast = self.autocast != "none" and self.dtype != "float64"
        return getattr(torch, self.autocast if cast else self.dtype)


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x")) if text else ()


def windows(shape: tuple[int, ...], normal: Callable[..., Tensor]) -> Tensor:
    """Rows that start an element after one another, and overlap."""
    if len(shape) < 2 or math.prod(shape) == 0:
        return normal(*shape)
    *leading, rows, columns = shape
    base = normal(*leading, rows + columns - 1)
    return base.as_strided(shape, (*base.stride()[:-1], 1, 1))


# By name, strided tensors of a shape, from what makes contiguous ones.
LAYOUTS: dict[str, Callable[[tuple[int, ...], Callable[..., Tensor]], Tensor]] = {
    "contiguous": lambda shape, normal: normal(*shape),
    "transposed": lambda shape, normal: normal(*shape[::-1]).permute(*range(len(shape))[::-1]),
    "columns_first": lambda shape, normal: normal(*shape[-1:], *shape[:-1]).movedim(0, -1),
    "last_row_first": lambda shape, normal: (
        normal(shape[-2], *shape[:-2], shape[-1]).movedim(0, -2)
        if len(shape) > 1
        else normal(*shape)
    ),
    "stepped": lambda shape, normal: normal(*(2 * size for size in shape))[
        tuple(slice(None, None, 2) for _ in shape)
    ],
    "sliced": lambda shape, normal: normal(*(size + 3 for size in shape))[
        tuple(slice(1, 1 + size) for size in shape)
    ],
    "one_row": lambda shape, normal: normal(*(1 for _ in shape[:-1]), *shape[-1:]).expand(shape),
    "one_layer": lambda shape, normal: normal(*shape[1:]).expand(shape),
    "one_column": lambda shape, normal: normal(*shape[:-1], 1).expand(shape),
    "one_number": lambda shape, normal: normal().expand(shape),
    "windows": windows,
}

_EDGES = (1, 0, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65)


def size(most: int) -> st.SearchStrategy[int]:
    return st.sampled_from([edge for edge in _EDGES if edge <= most]) | st.integers(0, most)


@st.composite
def cases(draw: st.DrawFn, function: str) -> Case:
    """Any case of the function that takes less than a second or so to interpret."""
    if function == "batched_linear":
        leading = (draw(st.integers(0, 3)), draw(size(33)))
    else:
        several = st.tuples(size(9), size(9)) | st.tuples(size(4), size(4), size(4))
        leading = draw(st.tuples(size(70)) | several | st.sampled_from(((), (130,), (260,))))
    rows = math.prod(leading)
    n = draw(size(70 if rows <= 33 else 33 if rows <= 70 else 17))
    k = draw(size(70) | st.just(200) if rows * n <= 700 else size(33))
    gated = function == "gated_linear"
    layout = st.builds("{}+{}".format, st.sampled_from(tuple(LAYOUTS)), st.integers(0, 3))
    dtypes = DTYPES
    activation = st.sampled_from(ACTIVATIONS)
    biases = st.sampled_from(("none", "contiguous", "stepped", "one_number", "one"))
    kinds = ("chosen", "tiled") if gated else ("chosen", *KINDS)
    kind = draw(st.sampled_from(kinds))
    if kind == "persistent":  # it takes what lies well and nothing else
        leading, n, k = tuple(-8 * (-one // 8) for one in leading), -8 * (-n // 8), -8 * (-k // 8)
        layout = st.sampled_from(("contiguous+0", "transposed+0"))
        dtypes = DTYPES[2:]
    dtype = draw(st.sampled_from(dtypes))
    chosen = kind == "chosen"
    autocast = draw(st.sampled_from(("none", "bfloat16", "float16"))) if chosen else "none"
    # Float16 has no room for more.
    scales = (1.0, 1e-2) if "float16" in (dtype, autocast) else (1.0, 1e-3, 1e3)
    block = st.sampled_from(("16", "32", "64"))
    # The public function for it is one of a single layer.
    accumulates = function == "linear" or (function == "batched_linear" and not chosen)
    main_grads = st.just("none") | st.builds("contiguous+{}".format, st.integers(0, 3))
    return Case(
        function=function,
        leading="x".join(map(str, leading)),
        N=n,
        K=k,
        dtype=dtype,
        activation=draw(activation if gated else st.just("none") | activation),
        bias=draw(biases),
        up_bias=draw(biases) if gated else "none",
        needed="".join(draw(st.sampled_from("10")) for _ in range(5 if gated else 3)),
        input=draw(layout),
        weight=draw(layout),
        up_weight=draw(layout) if gated else Case().up_weight,
        grad_output=draw(layout),
        main_grad=draw(main_grads) if accumulates else "none",
        scale=draw(st.sampled_from(scales)),
        precision=(
            draw(st.sampled_from(("ieee", "tf32", "bf16x6"))) if dtype == "float32" else "ieee"
        ),
        autocast=autocast,
        batch_invariant=draw(st.integers(0, 1)) if chosen else 0,
        kind=kind,
        blocks=Case().blocks if chosen else "x".join(draw(block) for _ in range(3)),
        splits=1 if chosen else draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )
