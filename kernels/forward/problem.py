"""A forward product as its kernels are told of it."""

from typing import Any, NamedTuple

from torch import Tensor

from ..configs.config import Config, Target
from ..launching import launch, shared_sums


class ForwardProblem(NamedTuple):
    """output = activation(input @ weight.mT + bias), without the tensors.

    batch, n, k: layers, out_features and in_features; rows.size is M.
    rows: input.
    weight_strides, bias_strides: of (B, N, K) and (B, N), 0 over B where it is not there.
    constants: what every kernel has: HAS_BIAS, ACTIVATION, SAVE_PREACTIVATION, NESTED_INPUT and
        OFFSET_DTYPE.
    """

    batch: int
    n: int
    k: int
    rows: launch.Rows
    weight_strides: tuple[int, ...]
    bias_strides: tuple[int, ...]
    output: launch.Operand
    precision: str
    target: Target
    constants: dict[str, Any]

    @property
    def scalars(self) -> tuple[float, ...]:
        """The sizes and strides that every kernel takes after its pointers, in this order."""
        return (
            self.rows.size,
            self.n,
            self.k,
            0.0,
            self.rows.inner_size,
            self.rows.stride_batch,
            self.rows.stride_outer,
            self.rows.stride_inner,
            self.rows.stride_feature,
            *self.weight_strides,
            *self.bias_strides,
        )

    def constants_with(self, config: Config) -> dict[str, Any]:
        """All constexprs of a kernel with a matrix product, and Triton's options."""
        dtype = self.output.dtype
        product = launch.product_constants(dtype, self.precision, config, self.target)
        return self.constants | product


class ForwardLaunch(NamedTuple):
    """How a kind of kernel goes about a problem.

    kernel: takes pointers to input, weight, bias, output and the pre-activation, then those to
        `partial` and its counters if there is one, then `launch`'s scalars.
    partial: a workspace for parts of sums.
    counters: how many `shared_sums.counters` it takes with that.
    unsplit: what takes neither, for where there is no memory for them.
    """

    kernel: Any
    launch: launch.Launch
    partial: launch.Operand | None = None
    counters: int = 0
    unsplit: "ForwardLaunch | None" = None

    def run(self, pointers: tuple[Tensor | None, ...]) -> None:
        """Launches the kernel; `pointers` are those to input, weight, bias and the outputs."""
        kernel, launched, partial, counters, unsplit = self
        if unsplit is None:
            launch.run(kernel, launched, pointers)
        elif not shared_sums.run_split(kernel, launched, pointers, (partial,), counters):
            unsplit.run(pointers)
