"""Gated pairs of layers: values, derivatives, what is kept and launched, and the module."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from oracle import (
    DTYPES,
    assert_as_exact,
    exact_backward,
    fenced,
    matmul,
    normal,
    shipped_configs,
    total,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastlinear
from fastlinear.kernels.backward.elementwise import plan_elementwise_backward
from fastlinear.kernels.configs.config import Config
from fastlinear.kernels.forward.gated import gated_linear_forward, plan_gated_forward
from fastlinear.kernels.launching import launch
from fastlinear.ops.elementwise import ACTIVATIONS
from fastlinear.ops.gated import backward_op, forward_op, gated_linear_op

pytestmark = pytest.mark.usefixtures("triton_backend")

Function = Callable[..., Any]

SHAPES = {  # M, N, K
    "one of each": (1, 1, 1),
    "several blocks, none whole": (70, 50, 45),
    "split sums": (300, 10, 20),
    "no rows": (0, 5, 7),
    "no output features": (5, 0, 7),
    "no input features": (5, 7, 0),
}


def reference(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    gate = F.linear(input, gate_weight, gate_bias)
    return ACTIVATIONS[activation](gate) * F.linear(input, up_weight, up_bias)


def operands(
    device: torch.device,
    shape: tuple[int, int, int] = (4, 3, 5),
    dtype: torch.dtype = torch.float64,
    mask: str = "11111",
) -> list[Tensor]:
    """input (M, K), two weights (N, K) and two biases (N,)."""
    m, n, k = shape
    sizes = ((m, k), (n, k), (n, k), (n,), (n,))
    return [
        normal(size, dtype, device).requires_grad_(needed == "1")
        for size, needed in zip(sizes, mask, strict=True)
    ]


def gradients(function: Function, inputs: list[Tensor], grad_output: Tensor) -> Any:
    return torch.autograd.grad(function(*inputs), inputs, grad_output)


# Values and gradients.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gated_values_and_gradients_are_as_exact_as_pytorch_s(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    ours = operands(device, shape, dtype)
    theirs = [one.detach().clone().requires_grad_() for one in ours]
    grad_output = normal(shape[:2], dtype, device)
    output, native = fastlinear.gated_linear(*ours), reference(*theirs)
    input, gate_weight, up_weight, gate_bias, up_bias = (one.detach().double() for one in ours)
    gate = matmul(input, gate_weight.mT) + gate_bias
    up = matmul(input, up_weight.mT) + up_bias
    several = 16.0 if dtype == torch.float64 else 4.0  # roundings: float64's truth is no better
    truth = F.silu(gate) * up
    # How large gate and up get on the way, where their sums cancel: what is rounded is that.
    gate_size = matmul(input.abs(), gate_weight.abs().mT) + gate_bias.abs()
    up_size = matmul(input.abs(), up_weight.abs().mT) + up_bias.abs()
    size = (gate_size * up_size).max().item() if truth.numel() else 0.0
    assert_as_exact(output, native, truth, "output", scale=several * size)
    assert output.is_contiguous()

    sigmoid = torch.sigmoid(gate)
    grad_gate = grad_output.double() * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad_output.double() * gate * sigmoid
    of_gate = exact_backward(grad_gate, input, gate_weight)
    of_up = exact_backward(grad_up, input, up_weight)
    truths = (of_gate[0] + of_up[0], of_gate[1], of_up[1], of_gate[2], of_up[2])
    # The same of every term of each sum; silu's slope is at most 1.1, and its slope's 0.5.
    grad_size = grad_output.double().abs()
    grad_gate_size, grad_up_size = grad_size * up_size * (1 + gate_size), grad_size * gate_size
    sizes = (
        matmul(grad_gate_size, gate_weight.abs()) + matmul(grad_up_size, up_weight.abs()),
        matmul(grad_gate_size.mT, input.abs()),
        matmul(grad_up_size.mT, input.abs()),
        total(grad_gate_size, 0),
        total(grad_up_size, 0),
    )
    names = ("grad_input", "grad_gate_weight", "grad_up_weight", "grad_gate_bias", "grad_up_bias")
    for name, result, native_gradient, truth, size in zip(
        names,
        torch.autograd.grad(output, ours, grad_output),
        torch.autograd.grad(native, theirs, grad_output),
        truths,
        sizes,
        strict=True,
    ):
        # In 16 bits the terms are rounded, not their additions, and they may cancel.
        terms = max(shape[1] if name == "grad_input" else shape[0], 1)
        roundings = several if dtype.itemsize > 2 else terms**-0.5
        scale = size.max().item() if size.numel() else 0.0
        assert_as_exact(result, native_gradient, truth, name, scale=roundings * scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(activation: str, device: torch.device) -> None:
    inputs = operands(device)
    grad_output = normal((4, 3), torch.float64, device)
    ours = gradients(lambda *a: fastlinear.gated_linear(*a, activation), inputs, grad_output)
    theirs = gradients(lambda *a: reference(*a, activation), inputs, grad_output)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        fastlinear.gated_linear(*inputs, activation), reference(*inputs, activation)
    )


@pytest.mark.parametrize(
    ("dtype", "precision", "config"), shipped_configs("gated_forward"), ids=str
)
def test_gated_configuration(
    dtype: str, precision: str, config: Config, device: torch.device
) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    shape = (config.block_m + 1, config.block_n + 1, config.block_k + 1)
    inputs = operands(device, shape, getattr(torch, dtype), "00000")
    output, gate, up = gated_linear_forward(
        *inputs, "silu", True, precision=precision, config=config
    )
    assert gate is not None
    assert up is not None
    input, gate_weight, up_weight, gate_bias, up_bias = inputs
    exact_gate = matmul(input, gate_weight.mT) + gate_bias.double()
    exact_up = matmul(input, up_weight.mT) + up_bias.double()
    assert_as_exact(gate, F.linear(input, gate_weight, gate_bias), exact_gate, "gate")
    assert_as_exact(up, F.linear(input, up_weight, up_bias), exact_up, "up")
    truth = F.silu(exact_gate) * exact_up
    two_factors = 2.0 * truth.abs().max().item()  # a rounding each
    assert_as_exact(output, reference(*inputs), truth, "output", scale=two_factors)


EDGES = [0.0, -0.0, 1e-8, -1e-8, 1.0, -1.0, 88.0, -88.0, 1e4, -1e4]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gated_extreme_gates_neither_overflow_nor_become_nan(
    activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    input = torch.tensor(EDGES, dtype=dtype, device=device).unsqueeze(1).requires_grad_()
    one, zero = torch.ones(1, 1, dtype=dtype, device=device), torch.zeros(1, 1, device=device)
    half = torch.full((1,), 0.5, dtype=dtype, device=device)
    output = fastlinear.gated_linear(input, one, zero.to(dtype), None, half, activation)
    truth = 0.5 * ACTIVATIONS[activation](input.detach().double())
    close = {"rtol": 2e-3, "atol": 1e-3, "check_dtype": False}
    torch.testing.assert_close(output, truth, **close)
    output.sum().backward()
    assert input.grad is not None
    assert input.grad.isfinite().all()


def many(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


STRIDES: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "transposed": lambda: (many(5, 4).t(), many(5, 3).t(), many(5, 3).t(), many(3), many(3)),
    "weights that lie differently": lambda: (many(4, 5), many(5, 3).t(), many(3, 5)),
    "halves of one weight": lambda: (many(4, 5), *many(6, 5).chunk(2), *many(6).chunk(2)),
    "every other element": lambda: (
        many(8, 10)[::2, ::2],
        many(6, 10)[::2, ::2],
        many(6, 10)[::2, ::2],
        many(6)[::2],
        many(1).expand(3),
    ),
    "rows on two strides": lambda: (many(3, 2, 4, 5).transpose(0, 1), many(3, 5), many(3, 5)),
    "rows on three strides": lambda: (
        many(2, 1, 2, 3, 5).permute(3, 0, 1, 2, 4)[::2],
        many(3, 5),
        many(3, 5),
    ),
    "one row": lambda: (many(5), many(3, 5), many(3, 5), many(3), many(3)),
    "one bias alone": lambda: (many(4, 5), many(3, 5), many(3, 5), many(3)),
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
def test_gated_operands_of_every_stride(
    make: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> None:
    inputs = [fenced(operand.to(device)).requires_grad_() for operand in make()]
    output = reference(*inputs)
    torch.testing.assert_close(fastlinear.gated_linear(*inputs), output)
    grad_output = torch.randn_like(output)
    ours = gradients(fastlinear.gated_linear, inputs, grad_output)
    torch.testing.assert_close(ours, gradients(reference, inputs, grad_output))


REDUCTIONS: dict[str, Function] = {
    "sum: stride 0": lambda y: y.sum(),
    "mean over rows": lambda y: y.mean(0).pow(2).sum(),
    "every other column": lambda y: y[..., ::2].pow(2).sum(),
    "three strides": lambda y: y.view(10, 1, 2, 1, 6).permute(2, 1, 0, 3, 4).pow(2).sum(),
}


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_gated_gradients_of_every_stride(reduce: Function, device: torch.device) -> None:
    inputs = [many(10, 2, 5), many(6, 5), many(6, 5)]
    inputs = [one.to(device).requires_grad_() for one in inputs]
    ours = torch.autograd.grad(reduce(fastlinear.gated_linear(*inputs)), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(reduce(reference(*inputs)), inputs))


MASKS = ["".join(mask) for mask in itertools.product("01", repeat=5)]


@pytest.mark.parametrize("mask", MASKS)
def test_gated_mask_of_requires_grad_saves_no_more_than_pytorch(
    mask: str, device: torch.device
) -> None:
    def step(function: Function, inputs: list[Tensor]) -> int:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = function(*inputs)
        assert output.requires_grad == ("1" in mask)
        if output.requires_grad:
            output.sum().backward()
        # What is saved twice is kept once.
        return sum({one.data_ptr(): one.nbytes for one in saved}.values())

    ours = operands(device, dtype=torch.float32, mask=mask)
    theirs = [one.detach().clone().requires_grad_(one.requires_grad) for one in ours]
    bytes_saved = step(fastlinear.gated_linear, ours), step(reference, theirs)
    if mask[0] == "1" or (set(mask[1:]) & {"1"} and mask[1::2] != "00" != mask[2::2]):
        assert bytes_saved[0] < bytes_saved[1]  # by activation(gate)
    for one, native in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, native.grad)


def test_gated_without_gradients_saves_nothing(device: torch.device) -> None:
    inputs = operands(device)
    with torch.no_grad():
        assert fastlinear.gated_linear(*inputs).grad_fn is None
    with torch.inference_mode():
        output = fastlinear.gated_linear(*inputs)
        assert output.is_inference()
    torch.testing.assert_close(output.clone(), reference(*inputs).detach())


# Derivatives of every order, and what transforms them.


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
def test_gated_gradcheck_and_gradgradcheck(activation: str, device: torch.device) -> None:
    inputs = operands(device, (2, 2, 1))

    def function(*tensors: Tensor) -> Tensor:
        return fastlinear.gated_linear(*tensors, activation=activation)

    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert gradcheck(function, inputs[:3], check_forward_ad=True)
    # What a batch of gradients takes is the same for every activation.
    assert gradgradcheck(
        function,
        inputs,
        check_fwd_over_rev=True,
        check_batched_grad=activation == "silu",
        fast_mode=True,
    )


FUNCTIONALS: dict[str, Function] = {
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(0, 1, 2, 3, 4)),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2, 3, 4)),
    "hessian": lambda f: torch.func.hessian(lambda *a: f(*a).pow(2).sum(), argnums=(0, 1, 2)),
    "jacfwd twice": lambda f: torch.func.jacfwd(torch.func.jacfwd(f, (0, 1)), (0, 1)),
    "jvp twice": lambda f: lambda *a: torch.func.jvp(lambda *b: torch.func.jvp(f, b, a)[1], a, a),
    "per-sample grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2, 3, 4)),
        in_dims=(0, None, None, None, None),
    ),
    "grad of vmap": lambda f: torch.func.grad(
        lambda *a: torch.func.vmap(f, in_dims=(0, None, None, None, None))(*a).pow(2).sum(), (0, 1)
    ),
}


@pytest.mark.parametrize("transform", FUNCTIONALS.values(), ids=FUNCTIONALS)
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_gated_under_torch_func(transform: Function, activation: str, device: torch.device) -> None:
    tensors = operands(device, (2, 2, 3), mask="00000")
    ours = transform(lambda *a: fastlinear.gated_linear(*a, activation))(*tensors)
    theirs = transform(lambda *a: reference(*a, activation))(*tensors)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None, None, None), (None, 0, 1, 0, None), (1, None, 0, None, 0), (0, 0, 0, 0, 0)],
    ids=str,
)
def test_gated_vmapped_over_any_operand(
    in_dims: tuple[int | None, ...], device: torch.device
) -> None:
    shapes = [(4, 5), (3, 5), (3, 5), (3,), (3,)]
    tensors = [
        normal(shape if dim is None else (*shape[:dim], 6, *shape[dim:]), torch.float64, device)
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]

    def mapped(function: Function) -> Any:
        gradient = torch.func.grad(lambda *a: function(*a).pow(2).sum(), (0, 1, 2, 3, 4))
        return torch.func.vmap(gradient, in_dims=in_dims)(*tensors), torch.func.vmap(
            function, in_dims=in_dims
        )(*tensors)

    torch.testing.assert_close(mapped(fastlinear.gated_linear), mapped(reference))


# opcheck reads .grad of its own copies, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_gated_opcheck(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    # The suite's guarded outputs start inside their storage, which fake tensors do not.
    monkeypatch.setattr(
        launch, "allocate", lambda like, output: like.new_empty(output.shape, dtype=output.dtype)
    )
    shapes = ((2, 4, 5), (3, 5), (3, 5), (3,), (3,))
    tensors = [many(*shape).to(device).requires_grad_() for shape in shapes]
    torch.library.opcheck(gated_linear_op, (*tensors, "silu"))
    torch.library.opcheck(forward_op, (*tensors, "silu"))
    grad_output, gate, up = (many(2, 4, 3).to(device).requires_grad_() for _ in range(3))
    torch.library.opcheck(backward_op, (grad_output, gate, up, *tensors[:3], True, "silu"))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_gated_module_compiled_for_any_number_of_rows(compiler: str, device: torch.device) -> None:
    torch._dynamo.reset()
    layer = fastlinear.GatedLinear(5, 3, device=device)
    frames = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, fullgraph=True, backend=frames, dynamic=True)
    for rows in (2, 7, 4):
        input = normal((rows, 5), torch.float32, device).requires_grad_()
        output, expected = compiled(input), layer(input)
        torch.testing.assert_close(output, expected)
        wanted = (input, *layer.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(output.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted),
        )
    assert frames.frame_count == 1


def test_gated_module_exported(device: torch.device) -> None:
    layer = fastlinear.GatedLinear(5, 3, device=device)
    rows = torch.export.Dim("rows", min=2, max=64)
    input = normal((4, 5), torch.float32, device)
    program = torch.export.export(layer, (input,), dynamic_shapes=({0: rows},))
    another = normal((9, 5), torch.float32, device)
    torch.testing.assert_close(program.module()(another), layer(another))


def test_gated_under_autocast(device: torch.device) -> None:
    inputs = operands(device, dtype=torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output, native = fastlinear.gated_linear(*inputs), reference(*inputs)
    assert output.dtype == native.dtype == torch.bfloat16
    torch.testing.assert_close(output, native, rtol=3e-2, atol=3e-2)
    output.float().sum().backward()
    assert all(one.grad is not None and one.grad.dtype == torch.float32 for one in inputs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gated_under_checkpoint(use_reentrant: bool, device: torch.device) -> None:
    layer = fastlinear.GatedLinear(5, 3, dtype=torch.float64, device=device)
    input = normal((4, 5), torch.float64, device).requires_grad_()
    wanted = (input, *layer.parameters())
    expected = torch.autograd.grad(layer(input).sum(), wanted)
    checkpoint(layer, input, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(tuple(one.grad for one in wanted), expected)


def test_gated_operations_are_counted_as_pytorch_s(device: torch.device) -> None:
    counts = []
    for function in (fastlinear.gated_linear, reference):
        inputs = operands(device, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            function(*inputs).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 2 * 4 * 3 * 5


# What is launched.


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    run_kernel = launch.run

    def run(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        run_kernel(kernel, *arguments)

    monkeypatch.setattr(launch, "run", run)
    return names


LAUNCHES = {
    "all, sums in parts": ("111", (300, 10, 20), "linear_backward_kernel"),
    "all": ("111", (4, 3, 5), "linear_backward_kernel"),
    "all, in many waves": ("111", (600, 40, 200), "linear_backward_kernel"),
    "weights alone": ("011", (4, 3, 5), "linear_backward_weight_kernel"),
    "weights, sums in parts": ("011", (300, 10, 20), "linear_backward_weight_kernel"),
    "input alone": ("100", (4, 3, 5), "linear_backward_kernel"),
    "input alone, sums in parts": ("100", (300, 10, 20), "linear_backward_kernel"),
}


@pytest.mark.parametrize(("mask", "shape", "backward"), LAUNCHES.values(), ids=LAUNCHES)
def test_gated_takes_one_launch_and_two(
    mask: str,
    shape: tuple[int, int, int],
    backward: str,
    launched: list[str],
    device: torch.device,
) -> None:
    inputs = operands(device, shape, torch.float32, f"{mask}00")
    output = fastlinear.gated_linear(*inputs)
    assert launched == ["gated_linear_forward_kernel"]
    output.sum().backward()
    assert launched[1:] == ["elementwise_backward_kernel", backward]


FAR = 2**31  # the stride of an operand of two rows or features, whose second is that far off


@pytest.mark.parametrize("far", range(5), ids=["input", "gate", "up", "gate_bias", "up_bias"])
def test_gated_offsets_are_64_bits_wide_where_an_operand_is_far(
    far: int, device: torch.device
) -> None:
    shapes = ((2, 3), (2, 3), (2, 3), (2,), (2,))
    near = [(shape, (3, 1)[-len(shape) :], torch.float32, device, True) for shape in shapes]
    operands = [
        (*one[:1], (FAR, 1)[: len(one[0])], *one[2:]) if index == far else one
        for index, one in enumerate(near)
    ]
    for given, wide in ((near, False), (operands, True)):
        plan = plan_gated_forward(tuple(given), "ieee", "silu", True, None)
        assert plan.kernel.constants["OPTIONS"].wide is wide


def test_gated_gradients_take_64_bits_for_both_side_by_side(device: torch.device) -> None:
    shape = (2**19, 2**11)  # 2**30 elements, and twice as many for both gradients
    one = (shape, (2**11, 1), torch.float32, device, True)
    plan, products, _ = plan_elementwise_backward((one, one, one), "silu")
    assert products.shape == (2**19, 2**12)
    assert not plan.constants["OPTIONS"].wide
    one = ((2**19 + 1, 2**11), *one[1:])
    plan, *_ = plan_elementwise_backward((one, one, one), "silu")
    assert plan.constants["OPTIONS"].wide


# What cannot be taken.


def test_gated_activation_is_one_of_those_that_there_are(device: torch.device) -> None:
    said = r"activation must be one of 'relu', .* but is 'softmax'"
    inputs = operands(device)
    with pytest.raises(ValueError, match=said):
        fastlinear.gated_linear(*inputs, "softmax")
    with pytest.raises(ValueError, match=said):
        fastlinear.GatedLinear(5, 3, activation="softmax")
    with pytest.raises(ValueError, match="but is None"):
        fastlinear.GatedLinear(5, 3).activation = None
    with pytest.raises(ValueError, match=said):
        gated_linear_op(*inputs, "softmax")


def W(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD = {
    "gate's in_features": (W(2, 5), W(3, 4), W(3, 5)),
    "up's in_features": (W(2, 5), W(3, 5), W(3, 4)),
    "gate_bias": (W(2, 5), W(3, 5), W(3, 5), W(4)),
    "up's dtype": (W(2, 5), W(3, 5), W(3, 5, dtype=torch.float64)),
    "no tensor": (None, W(3, 5), W(3, 5)),
    "3-D weight": (W(2, 5), W(1, 3, 5), W(1, 3, 5)),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_gated_bad_arguments_raise_what_pytorch_raises(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((RuntimeError, TypeError)) as expected:
        reference(*arguments)
    for backend in ("auto", "triton"):
        with fastlinear.use_backend(backend), pytest.raises(expected.type) as raised:
            fastlinear.gated_linear(*arguments)
        assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("features", [(3, 1), (3, 4)], ids=["one would broadcast", "others"])
def test_gated_weights_of_other_features_are_named(backend: str, features: tuple[int, int]) -> None:
    gate, up = (W(size, 5) for size in features)
    said = rf"same out_features, but gate_weight is \(3, 5\) and up_weight \({features[1]}, 5\)"
    with fastlinear.use_backend(backend), pytest.raises(RuntimeError, match=said):
        fastlinear.gated_linear(W(2, 5), gate, up)


def test_gated_complex_is_pytorch_s_alone(device: torch.device) -> None:
    inputs = [W(*shape, dtype=torch.complex64).to(device) for shape in ((2, 5), (3, 5), (3, 5))]
    with pytest.raises(TypeError, match=r"takes float16, .* but input is .*complex"):
        fastlinear.gated_linear(*inputs, activation="sigmoid")
    with fastlinear.use_backend("auto"):
        output = fastlinear.gated_linear(*inputs, activation="sigmoid")
    torch.testing.assert_close(output, reference(*inputs, activation="sigmoid"))


def test_gated_bias_of_one_number_is_expanded(device: torch.device) -> None:
    input, gate, up, _, up_bias = operands(device)
    one = normal((1,), torch.float64, device)
    torch.testing.assert_close(
        fastlinear.gated_linear(input, gate, up, one, up_bias),
        reference(input, gate, up, one, up_bias),
    )


# The module.


class PlainPair(nn.Module):
    """A gated pair as models write it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(5, 3, bias=bias)
        self.up_proj = nn.Linear(5, 3, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(self.gate_proj(input)) * self.up_proj(input)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gated_module_is_the_pair_that_models_write(bias: bool, seed: int) -> None:
    plain = PlainPair(bias)
    torch.manual_seed(seed)
    ours = fastlinear.GatedLinear(5, 3, bias=bias)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    input = torch.randn(4, 5)
    torch.testing.assert_close(ours(input), plain(input))


def test_gated_module_starts_as_two_layers_made_one_after_another(seed: int) -> None:
    torch.manual_seed(seed)
    plain = PlainPair()
    torch.manual_seed(seed)
    ours = fastlinear.GatedLinear(5, 3)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gated_module_says_what_it_is() -> None:
    layer = fastlinear.GatedLinear(5, 3, bias=False, activation="gelu", device="meta")
    assert str(layer) == (
        "GatedLinear(\n"
        "  activation='gelu'\n"
        "  (gate_proj): Linear(in_features=5, out_features=3, bias=False)\n"
        "  (up_proj): Linear(in_features=5, out_features=3, bias=False)\n"
        ")"
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_gated_module_copied_is_the_same(duplicate: Function) -> None:
    layer = fastlinear.GatedLinear(5, 3, activation="gelu")
    twin, input = duplicate(layer), torch.randn(4, 5)
    assert torch.equal(twin(input), layer(input))
    assert twin.activation == "gelu"


class Adapted(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + 1


def with_hook(layer: fastlinear.GatedLinear) -> None:
    layer.up_proj.register_forward_hook(lambda module, inputs, output: output + 1)


def with_adapter(layer: fastlinear.GatedLinear) -> None:
    layer.up_proj = Adapted(layer.up_proj)


def with_forward(layer: fastlinear.GatedLinear) -> None:
    plain = layer.up_proj.forward
    layer.up_proj.forward = lambda input: plain(input) + 1  # type: ignore[method-assign]


def with_parametrization(layer: fastlinear.GatedLinear) -> None:
    class Plus(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return bias + 1

    nn.utils.parametrize.register_parametrization(layer.up_proj, "bias", Plus())


@pytest.mark.parametrize("change", [with_hook, with_adapter, with_forward, with_parametrization])
def test_gated_module_calls_what_its_layers_have_become(change: Function) -> None:
    layer = fastlinear.GatedLinear(5, 3)
    input = torch.randn(4, 5)
    expected = F.silu(layer.gate_proj(input)) * (layer.up_proj(input) + 1)
    change(layer)
    torch.testing.assert_close(layer(input), expected)


def test_gated_module_of_layers_with_activations_applies_them() -> None:
    layer = fastlinear.GatedLinear(5, 3)
    layer.up_proj.activation = "relu"
    input = torch.randn(4, 5)
    expected = F.silu(layer.gate_proj(input)) * layer.up_proj(input)
    torch.testing.assert_close(layer(input), expected)
    assert (layer(input) == 0).any() or (layer.up_proj(input) > 0).all()


def test_gated_module_under_symbolic_trace_is_one_call() -> None:
    layer = fastlinear.GatedLinear(5, 3)
    traced = torch.fx.symbolic_trace(layer)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [fastlinear.gated_linear]
    input = torch.randn(4, 5)
    assert torch.equal(traced(input), layer(input))
