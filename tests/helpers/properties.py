"""The property that every call has: values and gradients near float64, and what else it promises.

tests/api/test_properties.py tries some cases, tests/fuzz.py as many as there is time for.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import guards
import torch
from bounds import Arithmetic, Bounded
from cases import LAYOUTS, Case, sizes
from oracle import fenced, traits_of
from torch import Tensor

import fastlinear
from fastlinear.kernels.backward.elementwise import activation_backward
from fastlinear.kernels.backward.gated import gated_linear_backward
from fastlinear.kernels.backward.linear import linear_backward
from fastlinear.kernels.configs.config import BackwardConfig, Config
from fastlinear.kernels.configs.legality import why_illegal
from fastlinear.kernels.configs.tiles import legal_configs
from fastlinear.kernels.forward.gated import gated_linear_forward
from fastlinear.kernels.forward.linear import linear_activation_forward
from fastlinear.kernels.launching import launch
from fastlinear.kernels.launching.operands import FROM_OUTPUT
from fastlinear.main_grad import linear_into_main_grad

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class Operands(NamedTuple):
    """The tensors of a call; of one layer there are no `up`s.

    main_grad: what weight's gradient is added to, as it is before, or None.
    """

    input: Tensor
    weight: Tensor
    up_weight: Tensor | None
    bias: Tensor | None
    up_bias: Tensor | None
    grad_output: Tensor
    main_grad: Tensor | None

    def differentiable(self, case: Case) -> dict[str, Tensor | None]:
        """By name, what may need a gradient, in the order of `Case.needed`."""
        names = ("input", "weight", "up_weight", "bias", "up_bias")
        return {
            name: getattr(self, name) for name in names if case.gated or not name.startswith("up_")
        }


def operands_of(case: Case) -> Operands:
    """Normal random numbers, laid out as the case says, between NaN."""
    torch.manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def laid_out(
        layout: str, *shape: int, scale: float = case.scale, dtype: torch.dtype = dtype
    ) -> Tensor:
        def normal(*sizes: int) -> Tensor:
            return (torch.randn(sizes, dtype=torch.float64) * scale).to(DEVICE, dtype)

        name, offset = layout.split("+")
        return fenced(LAYOUTS[name](shape, normal), offset=64 + int(offset))

    def bias(layout: str) -> Tensor | None:
        if layout == "none":
            return None
        if layout == "one":
            return laid_out("contiguous+0", *layers, 1)
        return laid_out(f"{layout}+1", *layers, case.N)

    layers = case.shape[:1] if case.batched else ()
    weight_shape = (*layers, case.N, case.K)
    output_shape = (*case.shape, case.N)
    return Operands(
        laid_out(case.input, *case.shape, case.K),
        laid_out(case.weight, *weight_shape),
        laid_out(case.up_weight, *weight_shape) if case.gated else None,
        bias(case.bias),
        bias(case.up_bias),
        laid_out(case.grad_output, *output_shape, scale=1.0, dtype=case.computed_in),
        None
        if case.main_grad == "none"
        else laid_out(case.main_grad, *weight_shape, scale=1.0, dtype=summed_in(case)),
    )


def summed_in(case: Case) -> torch.dtype:
    """The dtype of main_grad."""
    return torch.float64 if case.dtype == "float64" else torch.float32


def main_grad_of(case: Case, operands: Operands) -> Tensor | None:
    """One that lies as the operand does, for a call to add to."""
    if operands.main_grad is None:
        return None
    return fenced(operands.main_grad, offset=64 + int(case.main_grad[-1]))


def called(case: Case, operands: Operands) -> dict[str, Tensor]:
    """The output and the gradients that are needed, by the public function."""
    given = operands.differentiable(case)
    activation = None if case.activation == "none" else case.activation
    for tensor, needed in zip(given.values(), case.needed, strict=True):
        if tensor is not None:
            tensor.requires_grad_(needed == "1")
    function = getattr(fastlinear, case.function)
    main_grad = main_grad_of(case, operands)
    if main_grad is not None:
        function = linear_into_main_grad
        operands.weight.main_grad = main_grad  # type: ignore[attr-defined]
    autocast = getattr(torch, "bfloat16" if case.autocast == "none" else case.autocast)
    with torch.autocast(DEVICE.type, autocast, enabled=case.autocast != "none"):
        output = function(*given.values(), activation)
    wanted = {
        f"grad_{name}": tensor
        for name, tensor in given.items()
        if tensor is not None and tensor.requires_grad
    }
    assert output.requires_grad == bool(wanted), "the output does not say who needs a gradient"
    results = {"output": output.detach()}
    if wanted:
        gradients = torch.autograd.grad(
            output,
            tuple(wanted.values()),
            operands.grad_output,
            allow_unused=main_grad is not None,
        )
        results |= dict(zip(wanted, gradients, strict=True))
    if main_grad is not None and "grad_weight" in results:
        assert results.pop("grad_weight") is None, "weight's gradient is given to autograd too"
        results["main_grad"] = main_grad
    elif main_grad is not None:
        assert torch.equal(main_grad, operands.main_grad), "what nobody asked for is added"
    return results


def launched(case: Case, operands: Operands) -> dict[str, Tensor]:
    """The output and the gradients that are needed, by the launchers and in the case's tiles."""
    input, weight, up_weight, bias, up_bias, grad_output, _ = operands
    main_grad = main_grad_of(case, operands)
    needed = dict(zip(operands.differentiable(case), case.needed, strict=True))
    some_weight = "1" in (needed["weight"], needed.get("up_weight"))
    some_bias = (needed["bias"] == "1" and bias is not None) or (
        needed.get("up_bias") == "1" and up_bias is not None
    )
    bias, up_bias = (
        one if one is None else one.expand(weight.shape[:-1]) for one in (bias, up_bias)
    )
    activation: Any = None if case.activation == "none" else case.activation
    given: dict[str, Any] = {"precision": case.precision}
    asked = (input if some_weight else None, weight if needed["input"] == "1" else None)
    if case.gated:
        assert up_weight is not None
        products: Any
        output, *products = gated_linear_forward(
            *(input, weight, up_weight, bias, up_bias, activation, True),
            **given,
            config=tiles(case, "gated_forward", input, weight),
        )
        up_asked = up_weight if needed["input"] == "1" else None
        *gradients, _ = gated_linear_backward(
            *(grad_output, *products, *asked, up_asked, some_bias, activation),
            **given,
            config=pair_of_tiles(case),
        )
    else:
        saves = activation is not None and activation not in FROM_OUTPUT
        output, preactivation = linear_activation_forward(
            *(input, weight, bias, activation, saves),
            **given,
            config=tiles(case, "forward", input, weight),
        )
        grad = grad_output
        if activation is not None:
            saved = output if preactivation is None else preactivation
            grad = activation_backward(grad_output, saved, activation)
        gradients = list(
            linear_backward(
                *(grad, *asked, some_bias),
                batched=case.batched,
                main_grad=main_grad,
                **given,
                config=pair_of_tiles(case),
                splits=case.splits,
            )
        )
    names = ("grad_input", "grad_weight", "grad_bias")
    if main_grad is not None and some_weight:
        assert gradients[1] is None, "weight's gradient is given besides"
        gradients[1] = main_grad
        names = ("grad_input", "main_grad", "grad_bias")
    elif main_grad is not None:
        assert torch.equal(main_grad, operands.main_grad), "what nobody asked for is added"
    wanted = (needed["input"] == "1", some_weight, some_weight and some_bias)
    assert [one is not None for one in gradients] == list(wanted), "what is given is not wanted"
    if case.gated:
        names = ("grad_input", "grad_weights", "grad_biases")
    found = zip(names, gradients, strict=True)
    return {"output": output} | {name: one for name, one in found if one is not None}


def tiles(case: Case, kernel: Any, input: Tensor, weight: Tensor) -> Config | None:
    """The case's configuration, or None where its kind is illegal for such operands.

    A GPU has its own, of the case's kind.
    """
    kind: Any = case.kind
    traits = traits_of(input, weight, case.precision)
    legal = legal_configs(kernel, traits, kind)
    if not launch.INTERPRETING:
        return legal[case.seed % len(legal)] if legal else None
    parts = 4 if kind == "persistent" else 1
    config = Config(*sizes(case.blocks), 1, 1, kind=kind, splits=case.splits, epilogue_parts=parts)
    return config if why_illegal(kernel, config, traits) is None else None


def pair_of_tiles(case: Case) -> BackwardConfig | None:
    """Tiles of both products in one launch; a GPU chooses."""
    m, n, k = sizes(case.blocks)
    pair = BackwardConfig(Config(m, n, k, 1, 1), Config(k, m, n, 1, 1))
    return pair if launch.INTERPRETING else None


def truth_of(case: Case, operands: Operands) -> dict[str, Bounded]:
    """The output and every gradient in float64, with what rounding may add."""
    arithmetic = Arithmetic(case.computed_in, case.precision)
    dtype = getattr(torch, case.dtype)
    input, weight, grad_output = (
        arithmetic.exactly(one) for one in (operands.input, operands.weight, operands.grad_output)
    )

    def layer(weight: Bounded, bias: Tensor | None) -> Bounded:
        sums = arithmetic.product(input, weight.mT)
        if bias is None:
            return sums
        rows = arithmetic.exactly(bias.unsqueeze(1) if case.batched else bias)
        return arithmetic.plus(sums, rows)

    def by_row(tensor: Bounded) -> Bounded:
        return tensor if case.batched else tensor.rows()

    def given_back(grad: Bounded) -> Bounded:
        """A gradient in its operand's dtype, which autocast may not compute in."""
        grad = arithmetic.rounded(grad)
        return grad if case.computed_in == dtype else Arithmetic(dtype).rounded(grad)

    def of_parameters(grad: Bounded, prefix: str, bias: str) -> dict[str, Bounded]:
        product = arithmetic.product(by_row(grad).mT, by_row(input))
        grad_bias = given_back(arithmetic.total(by_row(grad)))
        if bias == "one" and case.kind == "chosen":
            expanded = grad_bias.shaped((*grad_bias.value.shape, 1))
            grad_bias = Arithmetic(dtype).rounded(Arithmetic(dtype).total(expanded))
        gradients = {f"grad_{prefix}weight": given_back(product), f"grad_{prefix}bias": grad_bias}
        if operands.main_grad is not None:
            start = Arithmetic(summed_in(case)).exactly(operands.main_grad)
            gradients["main_grad"] = arithmetic.plus(product, start)
        return gradients

    sums = layer(weight, operands.bias)
    if not case.gated:
        output, grad = arithmetic.rounded(sums), grad_output
        if case.activation != "none":
            output = arithmetic.rounded(arithmetic.activated(sums, case.activation))
            saved = output if case.activation in FROM_OUTPUT else arithmetic.rounded(sums)
            grad = arithmetic.through(grad_output, sums, case.activation, saved)
            grad = arithmetic.rounded(grad)
        grad_input = given_back(arithmetic.product(grad, weight))
        gradients = of_parameters(grad, "", case.bias)
        return {"output": output, "grad_input": grad_input} | gradients

    assert operands.up_weight is not None
    up_weight = arithmetic.exactly(operands.up_weight)
    up = layer(up_weight, operands.up_bias)
    activated = arithmetic.activated(sums, case.activation)
    output = arithmetic.rounded(arithmetic.times(activated, up))
    gate, up = arithmetic.rounded(sums), arithmetic.rounded(up)
    activated = arithmetic.activated(gate, case.activation)
    saved = activated if case.activation in FROM_OUTPUT else gate
    grad_up = arithmetic.rounded(arithmetic.times(grad_output, activated))
    of_activated = arithmetic.times(grad_output, up)
    grad_gate = arithmetic.through(of_activated, gate, case.activation, saved)
    grad_gate = arithmetic.rounded(grad_gate)
    grad_input = arithmetic.plus(
        arithmetic.product(grad_gate, weight), arithmetic.product(grad_up, up_weight)
    )
    truth = {"output": output, "grad_input": given_back(grad_input)}
    truth |= of_parameters(grad_gate, "", case.bias)
    truth |= of_parameters(grad_up, "up_", case.up_bias)
    # As the launchers give them: the gate's before up's.
    for both, one in (("grad_weights", "weight"), ("grad_biases", "bias")):
        halves = truth[f"grad_{one}"], truth[f"grad_up_{one}"]
        truth[both] = Bounded(*(torch.cat(parts) for parts in zip(*halves, strict=True)))
    return truth


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # of no elements any strides are contiguous


def memory(operands: Operands) -> list[Tensor]:
    """Every byte of the operands' storages."""
    empty = torch.empty(0, dtype=torch.uint8, device=DEVICE)
    return [
        empty.new_empty(0).set_(one.untyped_storage()).clone()  # type: ignore[call-overload]
        for one in operands
        if one is not None
    ]


@contextlib.contextmanager
def settings(case: Case) -> Iterator[None]:
    """The process's settings that the case is about."""
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    products = "bf16x6" if case.precision == "bf16x6" else "ieee"
    invariant = fastlinear.batch_invariant() if case.batch_invariant else contextlib.nullcontext()
    try:
        with fastlinear.use_backend("triton"), fastlinear.use_float32_products(products), invariant:
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def check(case: Case) -> None:
    """Fails unless the call, made twice, keeps what is promised of every call."""
    operands = operands_of(case)
    before = memory(operands)
    with settings(case), guards.poisoned_outputs(), guards.watched_addresses():
        call = called if case.kind == "chosen" else launched
        results, again = call(case, operands), call(case, operands)
    for one, other in zip(memory(operands), before, strict=True):
        assert torch.equal(one, other), "an operand has changed"
    truth = truth_of(case, operands)
    for name, result in results.items():
        value, error = truth[name]
        dtypes = {"output": case.computed_in, "main_grad": summed_in(case)}
        dtype = dtypes.get(name, getattr(torch, case.dtype))
        assert result.shape == value.shape, f"{name} has shape {tuple(result.shape)}"
        assert result.dtype == dtype, f"{name} is {result.dtype}"
        assert result.is_contiguous(), f"{name} has strides {result.stride()}"
        assert torch.equal(bits(result), bits(again[name])), f"{name} differs in the second call"
        known = torch.isfinite(error)
        off = (result.double() - value).abs()
        right = (off <= error) | ~known
        assert right.all(), (
            f"{name} is off by {off[~right].max().item():.3g} "
            f"where {error[~right].max().item():.3g} are allowed"
        )
