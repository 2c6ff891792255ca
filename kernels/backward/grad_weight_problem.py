"""grad_weight as its kernels are told of it, and how programs share it."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..configs.choose import choose_splits
from ..configs.config import Config, Target, resolved_precision
from ..launching import launch, shared_sums


class WeightProblem(NamedTuple):
    """grad_weight = grad_output.mT @ input, without the tensors.

    layers: (B,) where there is a batch of them, else ().
    n, k: out_features and in_features; the size of either's rows is M.
    main_grad: what grad_weight is added to; None where it is to be a tensor of its own.
    bias: whether grad_bias is wanted.
    precision: a resolved one.
    """

    grad_output: launch.Rows
    input: launch.Rows
    layers: tuple[int, ...]
    n: int
    k: int
    main_grad: launch.Operand | None
    bias: bool
    precision: str
    target: Target

    @property
    def batch(self) -> int:
        return self.layers[0] if self.layers else 1

    @property
    def result(self) -> launch.Operand:
        """grad_weight."""
        if self.main_grad is not None:
            return self.main_grad
        return self.input.operand.contiguous(*self.layers, self.n, self.k)


def weight_problem(
    grad_output: launch.Operand,
    input: launch.Operand,
    main_grad: launch.Operand | None,
    bias: bool,
    batched: bool,
    precision: str,
) -> WeightProblem:
    """The problem for such operands, which belong together."""
    target, rows = launch.target_of(input.device), launch.rows_of(input, batched=batched)
    return WeightProblem(
        launch.rows_of(grad_output, batched=batched),
        rows,
        input.shape[:1] if batched else (),
        grad_output.shape[-1],
        input.shape[-1],
        main_grad,
        bias,
        resolved_precision(precision, input.dtype, grad_output.shape[-1], rows.size, target),
        target,
    )


class WeightShares(NamedTuple):
    """How programs share a grad_weight.

    splits: those that share each tile's rows; none has no rows, unless there are none at all.
    programs: all of them.
    scalars: the kernels' from M to the strides of input, with `zero` between.
    constants: HAS_BIAS, SPLIT and the like; the problem's, without a configuration's.
    partial_weight, partial_bias, counters: the workspaces of more splits than one.
    """

    splits: int
    programs: int
    scalars: tuple[float, ...]
    constants: dict[str, Any]
    partial_weight: launch.Operand
    partial_bias: launch.Operand
    counters: int

    def run(
        self, kernel: Any, launched: launch.Launch, pointers: tuple[Tensor | None, ...]
    ) -> bool:
        """`shared_sums.run_split` with partial_weight, partial_bias and the counters.

        With one split there is none of them, and it is always launched.
        """
        if self.splits == 1:
            launch.run(kernel, launched, (*pointers, None, None, None))
            return True
        partials = (self.partial_weight, self.partial_bias if self.constants["HAS_BIAS"] else None)
        return shared_sums.run_split(kernel, launched, pointers, partials, self.counters)


def share_weight(
    problem: WeightProblem, config: Config, splits: int | None, products: int = 1
) -> WeightShares:
    """Shares out grad_weight's tiles and rows; `splits` may ask for more than there are blocks.

    products: layers side by side in grad_output, for which the kernel's N is that of one.
    """
    grad_output, input = problem.grad_output, problem.input
    rows, batch, n, k = input.size, problem.batch, problem.n, problem.k
    if splits is None:
        how = problem.target, problem.precision
        splits = choose_splits(config, batch, rows, n, k, *how)
    # Splits hold whole blocks, which can leave fewer of them than was asked for.
    rows_per_split = config.block_m * triton.cdiv(rows, config.block_m * splits)
    splits = max(1, triton.cdiv(rows, rows_per_split)) if rows else 1
    # in_features = 0 leaves no tile of grad_weight, and still a grad_bias to compute:
    # one column of tiles at least.
    tiles = batch * triton.cdiv(n, config.block_n) * max(1, triton.cdiv(k, config.block_k))
    dtype = input.operand.dtype
    partial = input.operand._replace(
        dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    partial_weight = partial.contiguous(splits, *problem.layers, n, k)
    return WeightShares(
        splits=splits,
        programs=splits * tiles,
        scalars=(
            rows,
            n // products,
            k,
            splits,
            rows_per_split,
            batch,
            0.0,
            grad_output.inner_size,
            input.inner_size,
            grad_output.stride_batch,
            grad_output.stride_outer,
            grad_output.stride_inner,
            grad_output.stride_feature,
            input.stride_batch,
            input.stride_outer,
            input.stride_inner,
            input.stride_feature,
        ),
        constants={
            "HAS_BIAS": problem.bias,
            "SPLIT": splits > 1,
            "ACCUMULATE": problem.main_grad is not None,
            "NESTED_GRAD_OUTPUT": grad_output.nested,
            "NESTED_INPUT": input.nested,
            "SUM_BY_DOT": dtype.itemsize == 2,
        },
        partial_weight=partial_weight,
        partial_bias=partial.contiguous(splits, *problem.layers, n),
        counters=tiles,
    )
