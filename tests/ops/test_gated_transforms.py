"""Derivatives of every order of a gated pair, and what PyTorch does to its call."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from gated import Function, many, operands, reference
from oracle import (
    normal,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastlinear
from fastlinear.kernels.launching import launch
from fastlinear.ops.gated import backward_op, forward_op, gated_linear_op

pytestmark = pytest.mark.usefixtures("triton_backend")


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
