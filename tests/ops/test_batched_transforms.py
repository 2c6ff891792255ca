"""What PyTorch does to a call of `fastlinear.batched_linear`: compiling, vmap, autocast."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batched import (
    Function,
    assert_alike,
    members,
    one_by_one,
    operands,
    reference,
    through_the_kernels,
    with_gradients,
)
from oracle import (
    normal,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlinear

pytestmark = pytest.mark.usefixtures("backend")


def assert_modules_alike(
    call: Function, batch: fastlinear.BatchedLinear, linears: list[nn.Linear], rows: int
) -> None:
    """`call` gives what the layers give one by one, and their gradients."""
    input = normal((len(linears), rows, 5), torch.float64, batch.weight.device).requires_grad_()
    ours, theirs = call(input), one_by_one(linears)(input)
    torch.testing.assert_close(ours, theirs)
    gradients = torch.autograd.grad(ours.pow(2).sum(), (input, *batch.parameters()))
    native = torch.autograd.grad(
        theirs.pow(2).sum(), [input, *(one for layer in linears for one in layer.parameters())]
    )
    stacked = (native[0], torch.stack(native[1::2]), torch.stack(native[2::2]))
    torch.testing.assert_close(gradients, stacked)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_compile_takes_any_number_of_rows(
    dynamic: bool | None, dynamo: Any, device: torch.device
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    batch, linears = members(device)
    compiled = torch.compile(batch, backend=counter, fullgraph=True, dynamic=dynamic)
    for rows in (4, 6, 9):
        assert_modules_alike(compiled, batch, linears, rows)
    assert counter.frame_count == (2 if dynamic is None else 1)


def test_compile_function_with_activation_and_expanded_input(
    dynamo: Any, device: torch.device
) -> None:
    def ours(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastlinear.batched_linear(input[0].expand(2, -1, -1), weight, bias, "gelu")

    def theirs(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(reference(input[0].expand(2, -1, -1), weight, bias))

    inputs = operands(device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    grad_output = torch.randn_like(theirs(*inputs))
    torch.testing.assert_close(
        with_gradients(compiled, inputs, grad_output), with_gradients(theirs, inputs, grad_output)
    )


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_takes_any_number_of_rows(strict: bool, dynamo: Any, device: torch.device) -> None:
    batch, linears = members(device)
    program = torch.export.export(
        batch,
        (normal((3, 4, 5), torch.float64, device),),
        dynamic_shapes=({1: torch.export.Dim("rows")},),
        strict=strict,
    )
    for rows in (4, 7):
        input = normal((3, rows, 5), torch.float64, device)
        torch.testing.assert_close(program.module()(input), one_by_one(linears)(input))


def test_symbolic_trace_has_one_call(device: torch.device) -> None:
    batch, linears = members(device)
    traced = torch.fx.symbolic_trace(nn.Sequential(batch, nn.Identity()))
    assert [node.target for node in traced.graph.nodes].count(fastlinear.batched_linear) == 1
    for graph in (traced, pickle.loads(pickle.dumps(traced))):
        input = normal((3, 4, 5), torch.float64, device)
        torch.testing.assert_close(graph(input), one_by_one(linears)(input))


VMAPPED = [
    (0, None, None),
    (1, None, None),
    (None, 0, None),
    (None, None, 0),
    (0, 0, None),
    (0, None, 0),
    (None, 1, 1),
    (2, 1, 0),
]


@pytest.mark.parametrize("in_dims", VMAPPED, ids=str)
def test_vmap_over_any_operand(in_dims: tuple[int | None, ...], device: torch.device) -> None:
    shapes = [
        shape if dim is None else (*shape[:dim], 6, *shape[dim:])
        for shape, dim in zip([(2, 4, 5), (2, 3, 5), (2, 3)], in_dims, strict=True)
    ]
    inputs = [normal(shape, torch.float64, device) for shape in shapes]

    def mapped(function: Function) -> Any:
        gradients = torch.func.grad(lambda *a: function(*a).pow(2).sum(), (0, 1, 2))
        return [torch.vmap(one, in_dims=in_dims)(*inputs) for one in (function, gradients)]

    torch.testing.assert_close(mapped(fastlinear.batched_linear), mapped(reference))


@through_the_kernels
def test_vmap_over_inputs_copies_no_layer(
    launched: list[tuple[str, list[int]]], device: torch.device
) -> None:
    _, weight, bias = operands(device, requires_grad=False)
    inputs = normal((2, 6, 4, 5), torch.float64, device).transpose(0, 1)
    torch.vmap(fastlinear.batched_linear, in_dims=(0, None, None))(inputs, weight, bias)
    assert [addresses[:3] for _, addresses in launched] == [
        [inputs.data_ptr(), weight.data_ptr(), bias.data_ptr()]
    ]


@pytest.mark.parametrize("empty", range(4), ids=["B", "M", "N", "K"])
def test_vmap_of_zero_sizes(empty: int, device: torch.device) -> None:
    sizes = [2, 4, 3, 5]
    sizes[empty] = 0
    inputs = operands(device, tuple(sizes), requires_grad=False)  # type: ignore[arg-type]
    inputs[0] = normal((6, *inputs[0].shape), torch.float64, device)
    for in_dims in ((0, None, None), (0, None, 0)):
        if in_dims[2] == 0:
            inputs[2] = normal((6, *inputs[2].shape), torch.float64, device)
        ours, theirs = (
            torch.vmap(one, in_dims=in_dims)(*inputs)
            for one in (fastlinear.batched_linear, reference)
        )
        torch.testing.assert_close(ours, theirs)


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "jvp": lambda f: lambda *a: torch.func.jvp(f, a, a),
    "jvp of the bias": lambda f: lambda x, w, b: torch.func.jvp(lambda b: f(x, w, b), (b,), (b,)),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2)),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(0, 1, 2)),
    "hessian": lambda f: torch.func.hessian(lambda *a: f(*a).pow(3).sum(), argnums=(0, 1)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_functional_transform(
    transform: Callable[[Function], Function], device: torch.device
) -> None:
    inputs = operands(device, (2, 2, 1, 2), requires_grad=False)
    ours, theirs = (transform(one)(*inputs) for one in (fastlinear.batched_linear, reference))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint_recomputes_the_same(use_reentrant: bool, device: torch.device) -> None:
    batch, linears = members(device)
    assert_modules_alike(
        lambda input: checkpoint(batch, input, use_reentrant=False), batch, linears, 4
    )
    input = normal((3, 4, 5), torch.float64, device).requires_grad_()
    checkpoint(batch, input, use_reentrant=use_reentrant).sum().backward()
    assert input.grad is not None
    assert batch.weight.grad is not None


def test_functional_call_takes_other_parameters(device: torch.device) -> None:
    batch, _ = members(device)
    values = {name: value.detach() * 2 for name, value in batch.named_parameters()}
    input = normal((3, 4, 5), torch.float64, device)
    torch.testing.assert_close(
        torch.func.functional_call(batch, values, (input,)),
        reference(input, values["weight"], values["bias"]),
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_takes_dtypes_as_pytorch_does(
    dtype: torch.dtype, bias: bool, device: torch.device
) -> None:
    inputs = operands(device, dtype=torch.float32)[: 2 + bias]
    inputs[1] = inputs[1].detach().to(torch.bfloat16).requires_grad_()
    grad_output = torch.randn(2, 4, 3, device=device)
    with torch.autocast(device.type, dtype):
        ours = with_gradients(fastlinear.batched_linear, inputs, grad_output)
        theirs = with_gradients(reference, inputs, grad_output)
    assert ours[0].dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=6e-2)


def test_autocast_leaves_float64(device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16):
        assert_alike(operands(device))
