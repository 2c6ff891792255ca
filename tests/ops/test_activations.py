"""Layers with their activation, by the kernels: values, derivatives, what is kept and launched."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    FORWARD_KERNELS,
    assert_as_exact,
    exact_backward,
    matmul,
    normal,
    rounding_step,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastlinear
from fastlinear.kernels.launching import launch
from fastlinear.kernels.launching.operands import FROM_OUTPUT
from fastlinear.ops.elementwise import ACTIVATIONS, GRADIENTS
from fastlinear.ops.linear import activation_backward_op as backward_op
from fastlinear.ops.linear import activation_forward_op as forward_op
from fastlinear.ops.linear import linear_activation_op

pytestmark = pytest.mark.usefixtures("triton_backend")

SHAPES = {  # M, N, K
    "off a block": (33, 40, 31),
    "one of each": (1, 1, 1),
    "split sums": (517, 10, 20),
    "no rows": (0, 5, 7),
    "no input features": (5, 7, 0),
}


def exact(activation: str, input: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the pre-activation in float64."""
    preactivation = matmul(input, weight.mT) + bias.detach().double()
    return ACTIVATIONS[activation](preactivation), preactivation


def steps(dtype: torch.dtype) -> int:
    """Roundings on the way to a float64 result, whose reference is no more exact; else one."""
    return 16 if dtype == torch.float64 else 1


def operands(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, mask: str = "111"
) -> list[Tensor]:
    m, n, k = shape
    return [
        normal(size, dtype, device).requires_grad_(needed == "1")
        for size, needed in zip(((m, k), (n, k), (n,)), mask, strict=True)
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_is_as_exact_as_pytorch_s(
    activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    input, weight, bias = operands(SHAPES["off a block"], dtype, device, "000")
    output = fastlinear.linear(input, weight, bias, activation)
    native = ACTIVATIONS[activation](F.linear(input, weight, bias))
    truth, _ = exact(activation, input, weight, bias)
    scale = steps(dtype) * truth.abs().max().item()
    assert_as_exact(output, native, truth, scale=scale)


CASES = [(torch.float32, shape) for shape in SHAPES]
CASES += [(torch.float16, "off a block"), (torch.bfloat16, "off a block")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_activation_gradients_are_as_exact_as_pytorch_s(
    activation: str, dtype: torch.dtype, shape: str, device: torch.device
) -> None:
    m, n, k = SHAPES[shape]
    ours = operands((m, n, k), dtype, device)
    theirs = [operand.detach().clone().requires_grad_() for operand in ours]
    grad_output = normal((m, n), dtype, device)
    fastlinear.linear(*ours, activation).backward(grad_output)
    ACTIVATIONS[activation](F.linear(*theirs)).backward(grad_output)

    wide = [operand.detach().double().requires_grad_() for operand in ours]
    preactivation = F.linear(*wide)
    output = ACTIVATIONS[activation](preactivation)
    *truths, slopes = torch.autograd.grad(output, [*wide, preactivation], grad_output.double())
    # In float32 every term is rounded a few times, at the size of grad_output where the slope is
    # near 0, and so is every addition.
    sizes = exact_backward(
        slopes.abs() + 4.0 * grad_output.abs(), wide[0].detach().abs(), wide[1].detach().abs()
    )
    for name, operand, native, truth, size in zip(
        ("input", "weight", "bias"), ours, theirs, truths, sizes, strict=True
    ):
        assert operand.grad is not None
        assert native.grad is not None
        scale = size.max().item() if dtype == torch.float32 and size.numel() else 0.0
        assert_as_exact(operand.grad, native.grad, truth, f"grad_{name}", scale=scale)


MASKS = ["".join(mask) for mask in itertools.product("01", repeat=3)][1:]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", [SHAPES["off a block"], SHAPES["split sums"]], ids=["", "splits"])
def test_activation_with_every_mask_of_requires_grad(
    activation: str, mask: str, shape: tuple[int, int, int], device: torch.device
) -> None:
    ours = operands(shape, torch.float64, device, mask)
    theirs = [operand.detach().clone().requires_grad_(operand.requires_grad) for operand in ours]
    grad_output = normal((shape[0], shape[1]), torch.float64, device)
    fastlinear.linear(*ours, activation).backward(grad_output)
    ACTIVATIONS[activation](F.linear(*theirs)).backward(grad_output)
    for operand, native in zip(ours, theirs, strict=True):
        assert (operand.grad is None) == (native.grad is None)
        if operand.grad is not None:
            torch.testing.assert_close(operand.grad, native.grad)


REDUCTIONS = {
    "sum: stride 0": lambda y: y.sum(),
    "mean over rows": lambda y: y.mean(0).pow(2).sum(),
    "transposed": lambda y: (
        y.transpose(0, 1).contiguous() * torch.arange(y.numel(), device=y.device).view(2, 10, 40)
    ).sum(),
    "every other column": lambda y: y[..., ::2].pow(2).sum(),
    "three strides": lambda y: y.view(10, 1, 2, 1, 40).permute(2, 1, 0, 3, 4).pow(2).sum(),
}


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_activation_gradients_of_every_stride(reduce, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    shapes = ((10, 2, 33), (40, 33), (40,))
    tensors = [normal(shape, torch.float64, device).requires_grad_() for shape in shapes]
    ours = torch.autograd.grad(reduce(fastlinear.linear(*tensors, "silu")), tensors)
    theirs = torch.autograd.grad(reduce(F.silu(F.linear(*tensors))), tensors)
    for gradient, native in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, native)


EDGES = [0.0, -0.0, 1e-8, -1e-8, 1e-4, -1e-4, 0.2499, 0.25, -0.25, 1.0, -1.0, 5.0, -5.0]
EDGES += [88.0, -88.0, 1e4, -1e4, float("nan"), float("inf"), -float("inf")]


# What NaN and infinities do is what is tested.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_activation_of_extreme_values(
    activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    input = torch.tensor(EDGES, dtype=dtype, device=device).unsqueeze(1).requires_grad_()
    one = torch.ones(1, 1, dtype=dtype, device=device)
    output = fastlinear.linear(input, one, None, activation)
    native_input = input.detach().double().requires_grad_()
    native = ACTIVATIONS[activation](native_input)
    finite = torch.isfinite(input.detach()).squeeze(1)
    close = {"rtol": 8 * rounding_step(dtype), "atol": 4 * rounding_step(dtype)}
    torch.testing.assert_close(output[finite], native[finite].to(dtype), **close)
    # Near 0, as exact as the value itself, as far as it is a normal number.
    tiny = input.detach().abs().squeeze(1) <= 0.25
    smallest = torch.finfo(dtype).tiny
    torch.testing.assert_close(
        output[tiny], native[tiny].to(dtype), rtol=close["rtol"], atol=smallest
    )
    assert output[-3].isnan().all()
    assert not output[finite].isnan().any()
    output.sum().backward()
    native.sum().backward()
    assert input.grad is not None
    assert native_input.grad is not None
    torch.testing.assert_close(input.grad[finite], native_input.grad[finite].to(dtype), **close)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_gradcheck(activation: str, device: torch.device) -> None:
    assert gradcheck(
        lambda *a: fastlinear.linear(*a, activation),
        operands((2, 2, 1), torch.float64, device),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_gradgradcheck(activation: str, device: torch.device) -> None:
    assert gradgradcheck(
        lambda *a: fastlinear.linear(*a, activation),
        operands((2, 1, 1), torch.float64, device),
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activation_of_a_batch_of_layers(activation: str, device: torch.device) -> None:
    shapes = ((2, 2, 2), (2, 1, 2), (2, 1))
    tensors = [normal(shape, torch.float64, device).requires_grad_() for shape in shapes]
    output = linear_activation_op(*tensors, activation)
    native = ACTIVATIONS[activation](
        torch.baddbmm(tensors[2].unsqueeze(1), tensors[0], tensors[1].mT)
    )
    torch.testing.assert_close(output, native)
    assert gradcheck(linear_activation_op, (*tensors, activation), check_forward_ad=True)


FUNCTIONALS = {
    "jacfwd twice": lambda f: torch.func.jacfwd(torch.func.jacfwd(f, argnums=(0, 1)), (0, 1)),
    "jvp twice": lambda f: lambda *a: torch.func.jvp(lambda *b: torch.func.jvp(f, b, a)[1], a, a),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(0, 1, 2)),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2)),
    "hessian": lambda f: torch.func.hessian(lambda *a: f(*a).pow(2).sum(), argnums=(0, 1)),
    "per-sample grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2)), in_dims=(0, None, None)
    ),
    "grad of vmap": lambda f: torch.func.grad(
        lambda *a: torch.func.vmap(f, in_dims=(0, None, None))(*a).pow(2).sum(), argnums=(0, 1)
    ),
    "jvp": lambda f: lambda *a: torch.func.jvp(f, a, a),
}


@pytest.mark.parametrize("transform", FUNCTIONALS.values(), ids=FUNCTIONALS)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
def test_activation_under_torch_func(transform, activation: str, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    tensors = operands((4, 3, 5), torch.float64, device, "000")
    ours = transform(lambda *a: fastlinear.linear(*a, activation))(*tensors)
    theirs = transform(lambda *a: ACTIVATIONS[activation](F.linear(*a)))(*tensors)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("in_dims", [(0, 0, None), (None, 1, 0), (1, None, 0)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activation_vmapped_over_any_operand(
    in_dims: tuple[int | None, ...], activation: str, device: torch.device
) -> None:
    shapes = []
    for shape, dim in zip([(4, 5), (3, 5), (3,)], in_dims, strict=True):
        shapes.append(shape if dim is None else (*shape[:dim], 6, *shape[dim:]))
    tensors = [normal(shape, torch.float64, device) for shape in shapes]

    def mapped(linear):  # type: ignore[no-untyped-def]
        gradient = torch.func.grad(lambda *a: linear(*a).pow(2).sum(), (0, 1, 2))
        return torch.func.vmap(gradient, in_dims=in_dims)(*tensors)

    torch.testing.assert_close(
        mapped(lambda *a: fastlinear.linear(*a, activation)),
        mapped(lambda *a: ACTIVATIONS[activation](F.linear(*a))),
    )


# opcheck reads .grad of its own copies, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activation_opcheck(
    activation: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    # The suite's guarded outputs start inside their storage, which fake tensors do not.
    monkeypatch.setattr(
        launch, "allocate", lambda like, output: like.new_empty(output.shape, dtype=output.dtype)
    )
    tensors = [
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((2, 4, 5), (3, 5), (3,))
    ]
    torch.library.opcheck(linear_activation_op, (*tensors, activation))
    torch.library.opcheck(forward_op, (*tensors, activation))
    grad_output = torch.randn(2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    saved = torch.rand_like(grad_output).requires_grad_()
    torch.library.opcheck(backward_op, (grad_output, saved, *tensors[:2], True, False, activation))


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activation_compiled_without_graph_breaks(
    activation: str, dynamic: bool, device: torch.device
) -> None:
    torch._dynamo.reset()
    tensors = operands((4, 3, 5), torch.float64, device)
    compiled = torch.compile(
        lambda *a: fastlinear.linear(*a, activation).square().sum(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    ours = torch.autograd.grad(compiled(*tensors), tensors)
    loss = ACTIVATIONS[activation](F.linear(*tensors)).square().sum()
    torch.testing.assert_close(ours, torch.autograd.grad(loss, tensors))


def test_activation_under_autocast(device: torch.device) -> None:
    tensors = operands((4, 3, 5), torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = fastlinear.linear(*tensors, "gelu")
        native = F.gelu(F.linear(*tensors))
    assert output.dtype == native.dtype == torch.bfloat16
    torch.testing.assert_close(output, native, rtol=3e-2, atol=2e-2)
    output.float().sum().backward()
    assert all(tensor.grad is not None for tensor in tensors)


def test_activation_of_lazily_negated_operands(device: torch.device) -> None:
    input, weight, bias = operands((4, 3, 5), torch.float64, device)
    output = fastlinear.linear(torch._neg_view(input), weight, bias, "gelu")
    grad_output = torch._neg_view(normal((4, 3), torch.float64, device))
    native = F.gelu(F.linear(-input, weight, bias))
    torch.testing.assert_close(output, native)
    torch.testing.assert_close(
        torch.autograd.grad(output, (input, weight, bias), grad_output),
        torch.autograd.grad(native, (input, weight, bias), grad_output),
    )


def test_activation_gradient_of_an_expanded_saved_tensor(device: torch.device) -> None:
    grad_output = normal((4, 3), torch.float64, device)
    saved = normal((1, 3), torch.float64, device).expand(4, 3)
    input, weight = normal((4, 5), torch.float64, device), normal((3, 5), torch.float64, device)
    grad_input, grad_weight, grad_bias = backward_op(
        grad_output, saved, input, weight, True, False, "silu"
    )
    grad = GRADIENTS["silu"](grad_output, saved)
    torch.testing.assert_close(grad_input, grad @ weight)
    torch.testing.assert_close(grad_weight, grad.T @ input)
    torch.testing.assert_close(grad_bias, grad.sum(0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [SHAPES["off a block"], SHAPES["split sums"]], ids=["", "splits"])
def test_activation_takes_one_launch_and_two(
    activation: str,
    shape: tuple[int, int, int],
    launched: list[tuple[str, list[int]]],
    device: torch.device,
) -> None:
    output = fastlinear.linear(*operands(shape, torch.float32, device), activation)
    assert len(launched) == 1
    assert launched.pop()[0] in FORWARD_KERNELS
    output.backward(torch.ones_like(output))
    names = [name for name, _ in launched]
    assert names == ["elementwise_backward_kernel", "linear_backward_kernel"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_activation_keeps_no_more_than_pytorch(
    activation: str, mask: str, training: bool, device: torch.device
) -> None:
    def kept(layer: torch.nn.Module, input: Tensor) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(input)
        return total

    layer = fastlinear.Linear(5, 3, device=device, activation=activation).train(training)
    layer.weight.requires_grad_(mask[1] == "1")
    layer.bias.requires_grad_(mask[2] == "1")
    input = normal((7, 5), torch.float32, device).requires_grad_(mask[0] == "1")
    ours = kept(layer, input)
    with fastlinear.use_backend("torch"):
        theirs = kept(layer, input)
    assert ours <= theirs
    operands_kept = 4 * (7 * 5 * (mask[1] == "1") + 3 * 5 * (mask[0] == "1"))
    assert ours == operands_kept + 4 * 7 * 3
    with torch.no_grad():
        assert kept(layer, input) == 0


def test_activation_keeps_the_output_or_the_preactivation(device: torch.device) -> None:
    for activation in ACTIVATIONS:
        tensors = operands((4, 3, 5), torch.float64, device)
        output = fastlinear.linear(*tensors, activation)
        if activation in FROM_OUTPUT:
            with torch.no_grad():
                output.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()
        else:
            output.mul_(2).sum().backward()


def test_unknown_activation_of_the_op_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"activation must be .* but is 'swish'"):
        linear_activation_op(*operands((4, 3, 5), torch.float64, device), "swish")


# The interpreter multiplies infinity with the zeros of masked columns.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_activation_cuts_off_infinite_gradients(device: torch.device) -> None:
    input = torch.tensor([[-1.0], [2.0]], device=device, requires_grad=True)
    output = fastlinear.linear(input, torch.ones(1, 1, device=device), None, "relu_squared")
    output.backward(torch.full((2, 1), float("inf"), device=device))
    assert input.grad is not None
    assert input.grad.flatten().tolist() == [0.0, float("inf")]
