"""grad_weight as its kernels are told of it, and how programs share it."""

from typing import NamedTuple

import torch
import triton

from ..configs.choose import choose_splits
from ..configs.config import Config, Target, resolved_precision
from ..launching import launch


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
    def rows(self) -> tuple[launch.Operand, launch.Operand]:
        """What is read."""
        return self.grad_output.operand, self.input.operand

    @property
    def result(self) -> launch.Operand:
        """grad_weight."""
        if self.main_grad is not None:
            return self.main_grad
        return self.input.operand.contiguous(*self.layers, self.n, self.k)

    @property
    def grad_bias(self) -> launch.Operand:
        return self.input.operand.contiguous(*self.layers, self.n)


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
    scalars: the kernels' from M to `zero`, after None for each workspace of one split.
    partials, counters: the workspaces of more splits than one, of grad_weight and of grad_bias.
    """

    splits: int
    programs: int
    scalars: tuple[float | None, ...]
    partials: tuple[launch.Operand | None, ...]
    counters: int


def share_weight(
    problem: WeightProblem, config: Config, splits: int | None, products: int = 1
) -> WeightShares:
    """Shares out grad_weight's tiles and rows; `splits` may ask for more than there are blocks.

    products: layers side by side in grad_output, for which the kernel's N is that of one.
    """
    input = problem.input
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
    scalars = (rows, n // products, k, splits, rows_per_split, batch, 0.0)
    if splits == 1:
        return WeightShares(1, tiles, (None, None, None, *scalars), (), 0)
    dtype = torch.float64 if input.operand.dtype == torch.float64 else torch.float32
    partial = input.operand._replace(dtype=dtype)
    of_bias = partial.contiguous(splits, *problem.layers, n) if problem.bias else None
    partials = partial.contiguous(splits, *problem.layers, n, k), of_bias
    return WeightShares(splits, splits * tiles, scalars, partials, tiles)
