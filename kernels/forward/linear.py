"""Forward: output = activation(input @ weight.T + bias), for any strides.

There may be a batch of independent layers. The kernels are in files of their own, one a kind.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..configs.choose import choose
from ..configs.config import Config, Traits, resolved_precision
from ..launching import launch
from ..launching.operands import (
    LAYER,
    Activation,
    check_activation,
    check_same_kind,
    check_shapes,
)
from ..launching.shared_sums import KernelLaunch
from . import gemv, persistent, split_k, tiled
from .problem import ForwardProblem

KINDS = {
    "tiled": tiled.plan,
    "gemv": gemv.plan,
    "split_k": split_k.plan,
    "persistent": persistent.plan,
}


class ForwardPlan(NamedTuple):
    """What `linear_forward` does, for operands of one description.

    config, launch: what is launched.
    output: what is returned.
    copy_input: whether input is copied first.
    """

    config: Config
    launch: KernelLaunch
    output: launch.Operand
    copy_input: bool


@functools.lru_cache(maxsize=4096)
def plan_forward(
    operands: tuple[launch.Fields, launch.Fields, launch.Fields | None],
    precision: str,
    activation: Activation | None,
    save_preactivation: bool,
    config: Config | None,
    batch_invariant: bool = False,
) -> ForwardPlan:
    """How `linear_forward` goes about tensors like these: `launch.describe(input, weight, bias)`.

    Cached, because it takes longer than all the rest of a call; by whether the pre-activation is
    saved too, as a launch is of the pointers that are there.
    """
    input, weight = launch.Operand(*operands[0]), launch.Operand(*operands[1])
    bias = launch.operand(operands[2])
    check_activation(activation)
    check_same_kind(input=input, weight=weight, bias=bias)
    check_shapes("linear", LAYER, input.shape, weight.shape, bias and bias.shape)

    target = launch.target_of(input.device)
    batched = len(weight.shape) == 3
    n, k = weight.shape[-2:]
    rows = launch.rows_of(input, batched=batched)
    precision = resolved_precision(
        precision, input.dtype, None if batch_invariant else rows.size, k, target
    )
    output = input.contiguous(*input.shape[:-1], n)
    wide = launch.wide(rows.operand, weight, bias, output)
    problem = ForwardProblem(
        batch=weight.shape[0] if batched else 1,
        n=n,
        k=k,
        rows=rows,
        weight=launch.matrix_of(weight),
        bias=launch.vector_of(bias),
        output=output,
        options=launch.options_of(input.dtype, precision, wide, activation),
        target=target,
    )
    if config is None:
        applies = activation is not None
        operands_read = (rows.operand, weight)
        traits = Traits(
            input.dtype,
            precision,
            launch.aligned_product(*operands_read, features=(n,), whole=applies or wide),
            target,
            activation=applies,
            descriptors=launch.describable(rows, weight),
            wide=wide,
        )
        config = choose(
            "forward",
            *(problem.batch, rows.size, n, k),
            traits,
            reads_outputs=weight.strides[-1] != 1 and weight.strides[-2] == 1,
            batch_invariant=batch_invariant,
        )
    return ForwardPlan(config, KINDS[config.kind](problem, config), output, rows.copied)


def linear_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    precision: str = "ieee",
    config: Config | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Computes `input @ weight.mT + bias` in one launch.

    Accumulates in float32 (float64 for float64) and adds the bias there, before the one rounding to
    the output dtype.

    Args:
        input: (*, K), or (B, M, K) where weight is batched; float16, bfloat16, float32 or float64;
            any strides.
        weight: (N, K), or (B, N, K) for B independent layers; dtype and device of input; any
            strides.
        bias: None, (N,), or (B, N) where weight is batched; dtype and device of input.
        precision: how float32 products are formed: "ieee", in float32; "tf32"; "bf16x6", of
            pieces (`precision.prepare_operand`); "long bf16x6", of pieces or "ieee"
            (`configs.resolved_precision`). Other dtypes ignore it.
        config: block sizes to use; None chooses by shape, dtype and device.
        batch_invariant: whether the choice, and so a row's bits, may not depend on the other rows.

    Returns:
        (*, N) or (B, M, N), contiguous, in input's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices are none of these, or the kernels cannot run on the
            device.
    """
    return _run(input, weight, bias, None, False, precision, config, batch_invariant)[0]


def linear_activation_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    save_preactivation: bool,
    *,
    precision: str = "ieee",
    config: Config | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Computes `activation(input @ weight.mT + bias)` in one launch.

    The activation is applied in the accumulator, before the one rounding to the output dtype, so
    that the pre-activation is neither rounded nor, unless it is to be saved, written: against a
    product followed by the activation that spares a write and a read of (*, N), or a read.

    Args:
        activation: one of `operands.ACTIVATIONS`.
        save_preactivation: whether it is wanted too, for the backward of what needs it.
        input, weight, bias, precision, config, batch_invariant: as in `linear_forward`.

    Returns:
        The output and the pre-activation or None, as `linear_forward` returns its output.

    Raises:
        RuntimeError: as in `linear_forward`.
    """
    given = (activation, save_preactivation, precision, config, batch_invariant)
    return _run(input, weight, bias, *given)


def _run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    save_preactivation: bool,
    precision: str,
    config: Config | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output, and the pre-activation or None."""
    given = (precision, activation, save_preactivation, config, batch_invariant)
    plan = plan_forward(launch.describe(input, weight, bias), *given)
    if plan.copy_input:
        input = input.contiguous()
    output = launch.allocate(input, plan.output)
    preactivation = launch.allocate(input, plan.output) if save_preactivation else None
    plan.launch.run((input, weight, bias, output, preactivation))
    return output, preactivation


def as_planned(plan: ForwardPlan) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """`linear_forward` for operands like those of `plan`, with nothing left to find out.

    The plan is one with something to launch, no copy of input and no pre-activation.
    """
    described, (kernel, launched, *shared) = plan.output, plan.launch
    split = any(shared)

    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = launch.allocate(input, described)
        pointers = (input, weight, bias, output, None)
        if split:
            plan.launch.run(pointers)
        else:
            launch.run(kernel, launched, pointers)
        return output

    return forward
