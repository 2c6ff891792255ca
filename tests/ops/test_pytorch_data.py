"""PyTorch's own samples of `F.linear` and `nn.Linear`, in every dtype that it lists.

torch makes them anew in each run, and a newer torch may make others. What the kernels can take goes
through them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, assert_as_exact
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastlinear

pytest.importorskip("expecttest")  # the next three import it
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like

(OP,) = [op for op in op_db if op.name == "nn.functional.linear"]
(MODULE,) = [module for module in module_db if module.module_cls is nn.Linear]
# In one order, so that every worker of a parallel run collects the same tests.
OTHER_DTYPES = sorted(set(OP.dtypes) - set(DTYPES), key=str)

layouts = pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "noncontiguous"])

Operands = tuple[Tensor | None, ...]


def samples(
    dtype: torch.dtype, device: torch.device, contiguous: bool = True, requires_grad: bool = False
) -> list[Operands]:
    """(input, weight) or (input, weight, bias) of every sample."""
    found = []
    for sample in OP.sample_inputs(device, dtype, requires_grad=requires_grad):
        sample = sample if contiguous else sample.noncontiguous()
        assert sample.kwargs == {}, "samples have arguments now that these tests do not know of"
        found.append((sample.input, *sample.args))
    assert found, "torch has no samples any more"
    return found


def of_matrices(found: list[Operands]) -> list[Operands]:
    """The samples that the kernels take: torch 2.15 has some where weight is a vector."""
    return [operands for operands in found if operands[1] is not None and operands[1].dim() == 2]


def derivatives(linear: Callable[..., Tensor], operands: list[Tensor], seeds: list[Tensor]) -> Any:
    """The output, its gradients, and the gradients of a weighted sum of those.

    The second gradients are those by the operands and by the gradient of the output. `seeds` are
    the numbers that outputs and gradients are weighted with.
    """
    operands = [operand.detach().requires_grad_() for operand in operands]
    grad_output, *weights = seeds
    grad_output = grad_output.detach().requires_grad_()
    output = linear(*operands)
    first = torch.autograd.grad(output, operands, grad_output, create_graph=True)
    second = torch.autograd.grad(first, (grad_output, *operands), weights, allow_unused=True)
    return [output, *first, *(gradient for gradient in second if gradient is not None)]


def assert_as_pytorch_s_in_every_order(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], operands: list[Tensor]
) -> None:
    """Fails unless values, first and second gradients are as near to float64 as PyTorch's."""
    with torch.no_grad():
        output = theirs(*operands)
    seeds = [torch.randn_like(tensor) for tensor in (output, *operands)]
    found, native = derivatives(ours, operands, seeds), derivatives(theirs, operands, seeds)
    if output.dtype == torch.float64:
        torch.testing.assert_close(found, native)
        return
    wide = [[tensor.double() for tensor in tensors] for tensors in (operands, seeds)]
    exact = derivatives(theirs, *wide)
    # The same of absolute values: how large sums get on the way to results where they cancel.
    sizes = derivatives(theirs, *([tensor.abs() for tensor in tensors] for tensors in wide))
    for index, (result, *others, size) in enumerate(zip(found, native, exact, sizes, strict=True)):
        scale = size.max().item() if size.numel() else 0.0
        what = f"result {index} for {shapes(operands)}"
        assert_as_exact(result, *others, what=what, scale=scale)


def shapes(operands: Any) -> list[tuple[int, ...] | None]:
    return [None if operand is None else tuple(operand.shape) for operand in operands]


def test_dtypes_of_the_kernels_are_among_pytorch_s() -> None:
    assert set(DTYPES) <= set(OP.dtypes)
    assert OTHER_DTYPES
    assert set(MODULE.dtypes) & set(DTYPES)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_the_op(
    dtype: torch.dtype, contiguous: bool, triton_backend: None, device: torch.device
) -> None:
    for operands in of_matrices(samples(dtype, device, contiguous)):
        assert_as_pytorch_s_in_every_order(fastlinear.linear, F.linear, list(operands))


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_the_op_in_auto(
    dtype: torch.dtype, contiguous: bool, device: torch.device
) -> None:
    for operands in samples(dtype, device, contiguous):
        assert torch.equal(fastlinear.linear(*operands), F.linear(*operands))


@layouts
@pytest.mark.parametrize(
    ("check", "options"),
    [(gradcheck, {"check_forward_ad": True}), (gradgradcheck, {})],
    ids=["gradcheck", "gradgradcheck"],
)
def test_gradcheck_of_samples(
    check: Callable[..., bool],
    options: dict[str, bool],
    contiguous: bool,
    triton_backend: None,
    device: torch.device,
) -> None:
    # The slow mode, and every kind of derivative, test_gradients has at fewer shapes.
    options = options | {"fast_mode": True, "check_undefined_grad": False}
    for operands in of_matrices(samples(torch.float64, device, contiguous, requires_grad=True)):
        assert check(fastlinear.linear, operands, **options), shapes(operands)


def outcome(linear: Callable[..., Tensor], operands: Operands) -> Tensor | tuple[type, str]:
    try:
        return linear(*operands)
    except Exception as error:
        return type(error), str(error)


@layouts
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_samples_of_dtypes_that_only_pytorch_takes(
    dtype: torch.dtype, contiguous: bool, device: torch.device
) -> None:
    for operands in samples(dtype, device, contiguous):
        native = outcome(F.linear, operands)
        found = outcome(fastlinear.linear, operands)
        with fastlinear.use_backend("triton"):
            refused = outcome(fastlinear.linear, operands)
        if isinstance(native, Tensor):
            assert isinstance(found, Tensor)
            assert torch.equal(found, native)
            assert refused == (
                TypeError,
                "backend 'triton' takes float16, bfloat16, float32 and float64, "
                f"but input is {dtype}; backend 'auto' hands this call to PyTorch",
            )
        else:
            assert found == refused == native


def module_inputs(
    dtype: torch.dtype, device: torch.device, training: bool
) -> list[tuple[Any, Any, Callable[..., Tensor]]]:
    """(how to make the layer, what to call it with, torch's reference) of every module input."""
    found = [
        (one.constructor_input, one.forward_input, one.reference_fn)
        for one in MODULE.module_inputs_func(
            MODULE, device=device, dtype=dtype, requires_grad=False, training=training
        )
    ]
    assert found, "torch has no inputs any more"
    return found


def called_with(layer: nn.Linear, input: Tensor, *parameters: Tensor) -> Tensor:
    names = [name for name, _ in layer.named_parameters()]
    values = dict(zip(names, parameters, strict=True))
    return torch.func.functional_call(layer, values, (input,))


@layouts
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", sorted(MODULE.dtypes, key=str), ids=str)
@pytest.mark.usefixtures("backend")
def test_inputs_of_the_module(
    dtype: torch.dtype, training: bool, contiguous: bool, device: torch.device
) -> None:
    for made, called, reference in module_inputs(dtype, device, training):
        options = made.kwargs | {"dtype": dtype, "device": device}
        ours = fastlinear.Linear(*made.args, **options).train(training)
        theirs = nn.Linear(*made.args, **options).train(training)
        theirs.load_state_dict(ours.state_dict())
        (input,) = (*called.args, *called.kwargs.values())
        input = input if contiguous else noncontiguous_like(input)
        torch.testing.assert_close(ours(input), reference(theirs, input))
        assert_as_pytorch_s_in_every_order(
            partial(called_with, ours), partial(called_with, theirs), [input, *ours.parameters()]
        )
