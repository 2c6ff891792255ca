"""What the launchers would do with a call, for `explain`: kernels, configurations and times."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlinear.choice import backend, known, way
from fastlinear.choice.known import Found
from fastlinear.choice.launchers import launchers
from fastlinear.choice.table import PYTORCH
from fastlinear.kernels.configs.config import BackwardConfig, Config, Traits
from fastlinear.kernels.configs.model import modelled_time
from fastlinear.kernels.configs.pair_model import pair_time
from fastlinear.kernels.configs.products import KERNEL_OF

BOTH = "linear_backward_kernel"  # computes both gradients


class Plan(NamedTuple):
    """What computes a product: a kernel, a library (choice/table.py) or, with None, PyTorch."""

    kernel: str | None
    config: Config | None
    splits: int = 1
    precision: str | None = None
    microseconds: float | None = None
    table: str | None = None


def plans_of(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> dict[str, Plan]:
    """What computes each product of a call that does not go PyTorch's way, by product."""
    rows = _rows_of(input, weight, bias, activation, dtype)
    together = rows.pop("gradients", None)
    pair = None if together is None else together.row.candidate
    if together is not None and isinstance(pair, BackwardConfig):
        rows |= {"grad_input": together, "grad_weight": together}
    else:
        pair = None
    auto = backend.current == "auto"
    candidates: dict[str, Any] = {
        product: rows[product].row.candidate if product in rows else PYTORCH if auto else None
        for product in ("output", "grad_preactivation", "grad_input", "grad_weight")
    }
    if auto and input.device.type != "cpu":
        candidates["grad_preactivation"] = None  # in one pass, whatever computes the products
    plans = {
        product: Plan(None if candidate == PYTORCH else candidate, None)
        for product, candidate in candidates.items()
        if isinstance(candidate, str)
    }
    if len(plans) < len(candidates):
        plans |= _by_kernels(input, weight, bias, activation, dtype, candidates, pair)
    for product, plan in plans.items():
        found = rows.get(product)
        if found is not None:
            row = found.row
            table = f"{found.file} of {found.date}, PyTorch {row.pytorch_device_us:.4g} us"
            plans[product] = plan._replace(microseconds=row.device_us, table=table)
        elif plan.config is not None:
            modelled = _modelled(product, plans, input, weight, dtype)
            plans[product] = plan._replace(microseconds=modelled)
    return plans


def _rows_of(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dtype: torch.dtype
) -> dict[str, Found]:
    """The rows that a call goes by, by product."""
    if not known.available or backend.invariant:
        return {}
    of_bias = bias is not None and bias.requires_grad
    asked: dict[str, tuple[str | None, bool]] = {
        "output": (activation, bias is not None),
        "grad_input": (None, False),
        "grad_weight": (None, of_bias),
    }
    if input.requires_grad and weight.requires_grad:
        asked["gradients"] = None, of_bias
    n, k = weight.shape
    found = (
        way.Asked(product, input, weight, n, k, *what, dtype).row()
        for product, what in asked.items()
    )
    return {one: row for one, row in zip(asked, found, strict=True) if row is not None}


def _operand(tensor: Tensor, dtype: torch.dtype) -> Any:
    """As the op would get it: under autocast a copy, which lies as torch likes it."""
    launch = launchers().forward.launch
    if tensor.dtype != dtype:
        like = torch.empty_like(tensor, dtype=dtype, device="meta")
        return launch.Operand(like.shape, like.stride(), dtype, tensor.device, True)
    return launch.Operand(*launch.describe(tensor)[0])


def _by_kernels(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    candidates: dict[str, Any],
    pair: BackwardConfig | None,
) -> dict[str, Plan]:
    """The launchers' plans for the products whose candidate is a kernel, chosen or not."""
    kernels, precision = launchers(), backend.float32_precision()
    operands = [_operand(input, dtype), _operand(weight, dtype), None]
    if bias is not None:
        rows = _operand(bias, dtype)
        # One element stands for every feature.
        one = rows._replace(shape=weight.shape[:1], strides=(0,))
        operands[2] = one if bias.numel() == 1 else rows
    grad_output = operands[0].contiguous(*input.shape[:-1], weight.shape[0])
    transposed = operands[1]._replace(shape=weight.shape[::-1], strides=operands[1].strides[::-1])
    plans: dict[str, Plan] = {}
    if not isinstance(config := candidates["output"], str):
        given = tuple(operands)
        plans["output"] = _of_forward(
            kernels.forward.plan_forward(
                given, precision, activation, False, config, backend.invariant
            )
        )
    if candidates["grad_preactivation"] is None:
        plans["grad_preactivation"] = Plan("elementwise_backward_kernel", None, precision="ieee")
    bias_wanted = bias is not None and bias.requires_grad
    splits = 1 if backend.invariant else None
    # One launch for both gradients, where a table says so or none has a say.
    apart = candidates["grad_input"] is not None or candidates["grad_weight"] is not None
    both = None
    wanted = input.requires_grad and weight.requires_grad and not backend.invariant
    if wanted and (pair is not None or not apart):
        given = (grad_output, operands[1], operands[0])
        both = kernels.backward.plan_backward(
            given, None, bias_wanted, False, precision, pair, splits
        )
    if both is not None and both.config is not None:
        formed = _formed(both.launch.launch)
        plans["grad_input"] = Plan(BOTH, both.config.input, 1, formed)
        plans["grad_weight"] = Plan(BOTH, both.config.weight, both.splits, formed)
        return plans
    if not isinstance(config := candidates["grad_input"], str):
        given = (grad_output, transposed, None)
        plans["grad_input"] = _of_forward(
            kernels.forward.plan_forward(given, precision, None, False, config, backend.invariant)
        )
    if not isinstance(config := candidates["grad_weight"], str):
        given = (grad_output, operands[0], None)
        plan = kernels.backward_weight.plan_backward_weight(
            given, bias_wanted, False, precision, config, splits
        )
        plans["grad_weight"] = Plan(
            "linear_backward_weight_kernel", plan.config, plan.splits, _formed(plan.launch.launch)
        )
    return plans


def _of_forward(planned: Any) -> Plan:
    """That of `plan_forward`."""
    kernel, config = planned.launch.kernel.__name__, planned.config
    return Plan(kernel, config, config.splits, _formed(planned.launch.launch))


def _formed(launch: Any) -> str:
    """How a launch forms products."""
    return str(launch.constants["OPTIONS"].precision)


def _modelled(
    product: str,
    plans: dict[str, Plan],
    input: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
) -> float | None:
    """The model's microseconds for a kernel; None in the interpreter, and of what is no product."""
    launch, plan = launchers().forward.launch, plans[product]
    target = launch.target_of(input.device)
    if plan.config is None or plan.precision is None or target.family == "interpreter":
        return None
    m, (n, k) = math.prod(input.shape[:-1]), weight.shape
    traits = Traits(
        dtype,
        plan.precision,
        launch.aligned(_operand(input, dtype), _operand(weight, dtype)),
        target,
    )
    if plan.kernel == BOTH:
        of_input, of_weight = plans["grad_input"], plans["grad_weight"]
        assert of_input.config is not None
        assert of_weight.config is not None
        return pair_time(
            BackwardConfig(of_input.config, of_weight.config),
            of_weight.splits,
            1,
            m,
            n,
            k,
            traits,
        )
    return modelled_time(
        KERNEL_OF[product],
        plan.config,
        1,
        m,
        *((k, n) if product == "grad_input" else (n, k)),
        traits,
        product == "grad_input",
        plan.splits if product == "grad_weight" else 1,
    )
