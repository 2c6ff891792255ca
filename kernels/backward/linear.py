"""Backward: grad_input, grad_weight and grad_bias, together in one launch.

grad_input is a forward through the transposed weight; grad_weight and grad_bias come from one pass.
"""

import functools
from typing import NamedTuple

import triton
from torch import Tensor

from ..configs.choose_pair import choose_backward, choose_pair, starts_with_input
from ..configs.config import BackwardConfig, Config, Traits, resolved_precision
from ..forward.linear import linear_forward
from ..launching import launch
from ..launching.operands import (
    BACKWARD,
    BACKWARD_BATCHED,
    check_main_grad,
    check_same_kind,
    check_shapes,
)
from ..launching.shared_sums import KernelLaunch
from .grad_weight import linear_backward_weight
from .grad_weight_problem import WeightProblem, share_weight, weight_problem
from .grouped import linear_backward_kernel


def linear_backward_input(
    grad_output: Tensor,
    weight: Tensor,
    *,
    precision: str = "ieee",
    config: Config | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Computes `grad_input = grad_output @ weight`.

    This is the forward product with the roles of in_features and out_features exchanged, and
    strides make that free.

    Args:
        grad_output: (*, N), or (B, M, N) where weight is batched; any strides.
        weight: (N, K) or (B, N, K); dtype and device of grad_output; any strides.
        precision, config, batch_invariant: as in `linear_forward`, whose N is this K.

    Returns:
        (*, K) or (B, M, K), contiguous, accumulated in float32 (float64 for float64).
    """
    return linear_forward(
        grad_output,
        weight.mT,
        precision=precision,
        config=config,
        batch_invariant=batch_invariant,
    )


class BackwardPlan(NamedTuple):
    """What `linear_backward` does for all three gradients, for operands of one description.

    config, launch: what is launched; None where each product takes a launch of its own.
    splits: programs that share each of grad_weight's tiles.
    grad_input, grad_weight, grad_bias: what is returned.
    copy_grad_output, copy_input: whether each is copied first.
    """

    config: BackwardConfig | None
    launch: KernelLaunch
    splits: int
    grad_input: launch.Operand
    grad_weight: launch.Operand
    grad_bias: launch.Operand
    copy_grad_output: bool
    copy_input: bool


class BackwardProblem(NamedTuple):
    """The products of a launch of both gradients, without the tensors.

    of_weight: grad_weight's, of both layers where there are two; without input nobody asks for it,
        and its rows are grad_input's all the same.
    weight, second: the operands.
    grad_input: the result.
    alone: whether grad_input is all that is wanted.
    agreed: whether all products are formed in the way that was asked for; if not, as "ieee".
    traits: of both products.
    """

    of_weight: WeightProblem
    weight: launch.Operand
    second: launch.Operand | None
    grad_input: launch.Operand
    alone: bool
    agreed: bool
    traits: Traits

    @property
    def products(self) -> int:
        """Layers side by side in grad_output."""
        return 1 if self.second is None else 2

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Layers of a batch, rows, out_features of both layers, in_features."""
        of_weight = self.of_weight
        return of_weight.batch, of_weight.input.size, of_weight.n, of_weight.k


def backward_problem(
    operands: tuple[launch.Fields, launch.Fields, launch.Fields | None],
    second_weight: launch.Fields | None,
    main_grad: launch.Fields | None,
    bias: bool,
    batched: bool,
    precision: str,
    batch_invariant: bool,
) -> BackwardProblem:
    """The problem for operands like these; arguments as in `plan_backward`.

    Raises RuntimeError unless they belong together.
    """
    grad_output, weight = launch.Operand(*operands[0]), launch.Operand(*operands[1])
    second, main = launch.operand(second_weight), launch.operand(main_grad)
    products = 1 if second is None else 2
    out_features, in_features = weight.shape[-2:]
    leading = grad_output.shape[:-1]
    grad_input = grad_output.contiguous(*leading, in_features)
    input = grad_input if operands[2] is None else launch.Operand(*operands[2])
    check_same_kind(grad_output=grad_output, input=input, weight=weight, second_weight=second)
    both = (*weight.shape[:-2], products * out_features, in_features)
    taken = BACKWARD_BATCHED if batched else BACKWARD
    check_shapes("linear_backward", taken, grad_output.shape, input.shape, both)

    of_weight = weight_problem(grad_output, input, main, bias, batched, precision)
    alone = operands[2] is None
    # A launch forms all its products in one way; if batch_invariant, other rows have no say in it.
    resolved = resolved_precision(
        precision, input.dtype, of_weight.input.size, of_weight.n, of_weight.target
    )
    agreed = alone or resolved == of_weight.precision
    if batch_invariant and precision == "long bf16x6":
        agreed = False
    precision = resolved if agreed else "ieee"
    rows, input_rows = of_weight.grad_output.operand, of_weight.input.operand
    read = [rows._replace(shape=(*leading, out_features)), input_rows, weight]
    read += [] if second is None else [second]
    every = (rows, input_rows, weight, second, grad_input, of_weight.result)
    wide = launch.wide(*every)
    aligned = launch.aligned_product(*read, features=(out_features, in_features), whole=wide)
    traits = Traits(
        input.dtype,
        precision,
        aligned=aligned and (main is None or main.aligned),
        target=of_weight.target,
        wide=wide,
        second_product=second is not None,
    )
    of_weight = of_weight._replace(precision=precision)
    return BackwardProblem(of_weight, weight, second, grad_input, alone, agreed, traits)


def _together_or_apart(problem: BackwardProblem) -> BackwardConfig | None:
    """`choose_backward`: None where each product is better off in a launch of its own."""
    weight = problem.weight
    transposed = weight._replace(
        shape=weight.shape[:-2] + weight.shape[:-3:-1],
        strides=weight.strides[:-2] + weight.strides[:-3:-1],
    )
    described = launch.describable(problem.of_weight.grad_output, transposed)
    return choose_backward(*problem.sizes, problem.traits._replace(descriptors=described))


@functools.lru_cache(maxsize=4096)
def plan_backward(
    operands: tuple[launch.Fields, launch.Fields, launch.Fields | None],
    second_weight: launch.Fields | None,
    bias: bool,
    batched: bool,
    precision: str,
    config: BackwardConfig | None,
    splits: int | None,
    batch_invariant: bool = False,
    main_grad: launch.Fields | None = None,
) -> BackwardPlan:
    """How `linear_backward` goes about tensors like these.

    Args:
        operands: `launch.describe(grad_output, weight, input)`; without input there is no
            grad_weight.
        second_weight, main_grad: their fields, or None.
        bias, batched, precision, config, splits, batch_invariant: as in `linear_backward`.
    """
    settings = (bias, batched, precision, batch_invariant)
    problem = backward_problem(operands, second_weight, main_grad, *settings)
    of_weight, sizes, traits = problem.of_weight, problem.sizes, problem.traits
    chosen = config
    if chosen is None and problem.second is None and problem.agreed and not batch_invariant:
        chosen = _together_or_apart(problem)
    pair = chosen or choose_pair(*sizes, traits, batch_invariant)
    splits = 1 if problem.alone or batch_invariant else splits
    shares = share_weight(of_weight, pair.weight, splits, problem.products)
    row_tiles = triton.cdiv(of_weight.input.size, pair.input.block_m)
    column_tiles = triton.cdiv(of_weight.k, pair.input.block_n)
    input_programs = of_weight.batch * row_tiles * column_tiles
    weight_programs = 0 if problem.alone else shares.programs
    first_program = 0
    if input_programs and starts_with_input(pair, shares.splits, *sizes[1:], traits):
        first_program = weight_programs
    reads = (*of_weight.rows, problem.weight, problem.second)
    wide = launch.wide(*reads, problem.grad_input, of_weight.result, *shares.partials)
    weight = launch.matrix_of(problem.weight)
    constants = {
        "ACCUMULATE": of_weight.main_grad is not None,
        "OPTIONS": launch.options_of(traits.dtype, traits.precision, wide),
        "INPUT_TILE": pair.input.blocks,
        "WEIGHT_TILE": pair.weight.blocks,
    }

    def unsplit() -> KernelLaunch:
        given = (bias, batched, precision, pair, 1, batch_invariant)
        return plan_backward(operands, second_weight, *given, main_grad).launch

    return BackwardPlan(
        chosen if problem.second is None else pair,
        KernelLaunch(
            linear_backward_kernel,
            launch.Launch(
                (weight_programs + input_programs,),
                (*shares.scalars, weight_programs, first_program),
                constants | pair.input.compile_options(traits.target),
                (
                    of_weight.grad_output.matrix,
                    of_weight.input.matrix,
                    weight._replace(
                        stride_row=weight.stride_column, stride_column=weight.stride_row
                    ),
                ),
            ),
            shares.partials,
            shares.counters,
            unsplit if shares.partials else None,
        ),
        shares.splits,
        grad_input=problem.grad_input,
        grad_weight=of_weight.result,
        grad_bias=of_weight.grad_bias,
        copy_grad_output=of_weight.grad_output.copied,
        copy_input=of_weight.input.copied,
    )


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    *,
    second_weight: Tensor | None = None,
    main_grad: Tensor | None = None,
    batched: bool = False,
    precision: str = "ieee",
    config: BackwardConfig | None = None,
    splits: int | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients of a layer together.

    In one launch, unless there is so much to do that two launches, each with the kernel that is
    best for its product, cost no more (`choose_backward`).

    Args:
        grad_output: (*, N), or (B, M, N) if batched; any strides.
        input: (*, K) or (B, M, K); None where no grad_weight is wanted.
        weight: (N, K) or (B, N, K); None where no grad_input is wanted.
        bias: whether grad_bias is wanted; it comes with grad_weight only.
        second_weight: (N, K), lying as weight does: that of a second layer with the same input,
            whose features follow the first's in grad_output (*, 2 N). grad_input is then the sum
            of both products, in one accumulator.
        main_grad: as in `linear_backward_weight`.
        batched, precision: as in `linear_backward_weight`.
        config: block sizes of a launch for all; None chooses by shape, dtype and device.
        splits: as in `linear_backward_weight`.
        batch_invariant: whether a row's grad_input may not depend on the other rows, nor on whether
            grad_weight is wanted too, and rows are summed in their order, with no splits.

    Returns:
        grad_input, grad_weight and grad_bias, as `linear_backward_input` and
        `linear_backward_weight` give them; None for what is not wanted.

    Raises:
        RuntimeError: shapes, dtypes or devices are none of these, or the kernels cannot run on the
            device.
    """
    apart = (bias, main_grad, batched, precision, splits, batch_invariant)
    if weight is None or (input is None and second_weight is None):
        return _backward_apart(grad_output, input, weight, *apart)

    main_grad = None if input is None else main_grad
    if main_grad is not None:
        both = (*weight.shape[:-2], grad_output.shape[-1], weight.shape[-1])
        check_main_grad(main_grad, both, weight)
    operands = launch.describe(grad_output, weight, input)
    second = None if second_weight is None else launch.describe(second_weight)[0]
    main = None if main_grad is None else launch.describe(main_grad)[0]
    bias = bias and input is not None
    given = (bias, batched, precision, config, splits, batch_invariant)
    plan = plan_backward(operands, second, *given, main)
    if plan.copy_grad_output:
        grad_output = grad_output.contiguous()
    if input is not None and plan.copy_input:
        input = input.contiguous()
    if plan.config is None:
        return _backward_apart(grad_output, input, weight, *apart)

    grad_input = launch.allocate(weight, plan.grad_input)
    grad_weight = None if input is None else main_grad
    if grad_weight is None and input is not None:
        grad_weight = launch.allocate(weight, plan.grad_weight)
    grad_bias = launch.allocate(weight, plan.grad_bias) if bias else None
    pointers = (
        grad_output,
        grad_output if input is None else input,  # no program looks at what stands in
        weight,
        second_weight,
        grad_input,
        grad_input if grad_weight is None else grad_weight,
        grad_bias,
    )
    plan.launch.run(pointers)
    return grad_input, (grad_weight if main_grad is None else None), grad_bias


def _backward_apart(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    main_grad: Tensor | None,
    batched: bool,
    precision: str,
    splits: int | None,
    batch_invariant: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`linear_backward` with a launch for each product that is wanted."""
    grad_input = grad_weight = grad_bias = None
    if input is not None:
        grad_weight, grad_bias = linear_backward_weight(
            grad_output,
            input,
            bias,
            main_grad=main_grad,
            batched=batched,
            precision=precision,
            splits=1 if batch_invariant else splits,
        )
    if weight is not None:
        grad_input = linear_backward_input(
            grad_output, weight, precision=precision, batch_invariant=batch_invariant
        )
    return grad_input, grad_weight, grad_bias
