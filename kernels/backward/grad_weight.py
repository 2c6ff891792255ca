"""grad_weight and grad_bias, in one launch of their own."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..configs.choose import choose
from ..configs.config import Config, Traits
from ..launching import launch
from ..launching.operands import (
    BACKWARD,
    BACKWARD_BATCHED,
    check_main_grad,
    check_same_kind,
    check_shapes,
)
from ..launching.shared_sums import KernelLaunch
from .grad_weight_problem import share_weight, weight_problem
from .grad_weight_tile import backward_weight_tile


@triton.jit
def linear_backward_weight_kernel(
    grad_output,
    input,
    grad_weight_ptr,
    grad_bias_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    counter_ptr,
    M,
    N,
    K,
    splits,
    rows_per_split,
    batches,
    zero,
    ACCUMULATE: tl.constexpr,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`backward_weight_tile`, one a program."""
    backward_weight_tile(
        tl.program_id(0),
        grad_output,
        input,
        grad_weight_ptr,
        grad_bias_ptr,
        partial_weight_ptr,
        partial_bias_ptr,
        counter_ptr,
        M,
        N,
        K,
        splits,
        rows_per_split,
        batches,
        zero,
        ACCUMULATE,
        OPTIONS,
        TILE,
    )


class BackwardWeightPlan(NamedTuple):
    """What `linear_backward_weight` launches and returns, for operands of one description."""

    config: Config
    splits: int
    launch: KernelLaunch
    grad_weight: launch.Operand
    grad_bias: launch.Operand
    copy_grad_output: bool
    copy_input: bool


@functools.lru_cache(maxsize=4096)
def plan_backward_weight(
    operands: tuple[launch.Fields, launch.Fields, launch.Fields | None],
    bias: bool,
    batched: bool,
    precision: str,
    config: Config | None,
    splits: int | None,
) -> BackwardWeightPlan:
    """How `linear_backward_weight` goes about tensors like these.

    Args:
        operands: `launch.describe(grad_output, input, main_grad)`.
        bias, batched, precision, config, splits: as it takes them.
    """
    grad_output, input = launch.Operand(*operands[0]), launch.Operand(*operands[1])
    main_grad = launch.operand(operands[2])
    check_same_kind(grad_output=grad_output, input=input)
    taken = BACKWARD_BATCHED if batched else BACKWARD
    check_shapes("linear_backward", taken, grad_output.shape, input.shape, None)

    problem = weight_problem(grad_output, input, main_grad, bias, batched, precision)
    rows, sizes = problem.rows, (problem.n, problem.k)
    if config is None:
        wide = launch.wide(*rows, problem.result)
        aligned = launch.aligned_product(*rows, features=sizes, whole=wide)
        traits = Traits(
            input.dtype,
            problem.precision,
            aligned=aligned and (main_grad is None or main_grad.aligned),
            target=problem.target,
            wide=wide,
        )
        config = choose("backward_weight", problem.batch, problem.input.size, *sizes, traits)
    shares = share_weight(problem, config, splits)
    wide = launch.wide(*rows, problem.result, *shares.partials)
    constants = {
        "ACCUMULATE": main_grad is not None,
        "OPTIONS": launch.options_of(input.dtype, problem.precision, wide),
        "TILE": config.blocks,
    }

    def unsplit() -> KernelLaunch:
        return plan_backward_weight(operands, bias, batched, precision, config, 1).launch

    return BackwardWeightPlan(
        config,
        shares.splits,
        KernelLaunch(
            linear_backward_weight_kernel,
            launch.Launch(
                (shares.programs,),
                shares.scalars,
                constants | config.compile_options(problem.target),
                (problem.grad_output.matrix, problem.input.matrix),
            ),
            shares.partials,
            shares.counters,
            unsplit if shares.partials else None,
        ),
        grad_weight=problem.result,
        grad_bias=problem.grad_bias,
        copy_grad_output=problem.grad_output.copied,
        copy_input=problem.input.copied,
    )


def linear_backward_weight(
    grad_output: Tensor,
    input: Tensor,
    bias: bool = False,
    *,
    main_grad: Tensor | None = None,
    batched: bool = False,
    precision: str = "ieee",
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Computes `grad_weight = grad_output.mT @ input` and `grad_bias = grad_output.sum(rows)`.

    Both come from the same pass, in one launch.

    Accumulates in float32 (float64 for float64) and rounds once. Where few tiles meet many rows,
    the rows are split over programs, and the last one to finish a tile adds the partial sums in a
    fixed order: the same call gives the same bits.

    Args:
        grad_output: (*, N), or (B, M, N) if batched; float16, bfloat16, float32 or float64; any
            strides.
        input: (*, K) or (B, M, K), with grad_output's leading dimensions, dtype and device; any
            strides.
        bias: whether grad_bias is wanted.
        main_grad: None, or (N, K), contiguous, in float32 (float64 for float64), which grad_weight
            is added to, unrounded, instead of being returned.
        batched: whether the first dimension counts independent layers.
        precision: how float32 products are formed, as in `linear_forward`. grad_bias is a plain
            sum in any case.
        config: block sizes to use; None chooses by shape, dtype and device.
        splits: programs that share each tile's rows; None chooses.

    Returns:
        grad_weight (N, K) or (B, N, K), None where it went into main_grad, and grad_bias (N,) or
            (B, N), or None; contiguous, in input's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices are none of these, or the kernels cannot run on the
            device.
    """
    if main_grad is not None:
        layers = input.shape[:1] if batched else ()
        check_main_grad(main_grad, (*layers, grad_output.shape[-1], input.shape[-1]), input)
    operands = launch.describe(grad_output, input, main_grad)
    plan = plan_backward_weight(operands, bias, batched, precision, config, splits)
    if plan.copy_grad_output:
        grad_output = grad_output.contiguous()
    if plan.copy_input:
        input = input.contiguous()
    grad_weight = launch.allocate(input, plan.grad_weight) if main_grad is None else main_grad
    grad_bias = launch.allocate(input, plan.grad_bias) if bias else None
    plan.launch.run((grad_output, input, grad_weight, grad_bias))
    return (grad_weight if main_grad is None else None), grad_bias
