"""Transforms of torch.func: every derivative, vmap over any operand, and functional calls."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Function, operands, twins
from oracle import normal
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import fastlinear

pytestmark = pytest.mark.usefixtures("triton_backend")


# torch.func

TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2)),
    "grad of grad": lambda f: torch.func.grad(
        lambda *a: torch.func.grad(lambda *b: f(*b).sum())(*a).pow(2).sum(), argnums=(0, 1, 2)
    ),
    "vjp": lambda f: lambda *a: torch.func.vjp(f, *a)[1](f(*a)),
    "jvp": lambda f: lambda *a: torch.func.jvp(f, a, a),
    "jvp of the bias": lambda f: lambda x, w, b: torch.func.jvp(lambda b: f(x, w, b), (b,), (b,)),
    "linearize": lambda f: lambda *a: torch.func.linearize(f, *a)[1](*a),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2)),
    "jacrev in chunks": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2), chunk_size=3),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(0, 1, 2)),
    "hessian": lambda f: torch.func.hessian(lambda *a: f(*a).sum(), argnums=(0, 1)),
    "jvp of grad": lambda f: (
        lambda *a: torch.func.jvp(torch.func.grad(lambda *b: f(*b).sum(), argnums=(0, 1, 2)), a, a)
    ),
    "per-sample grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2)), in_dims=(0, None, None)
    ),
    "per-sample grad in chunks": lambda f: torch.func.vmap(
        torch.func.grad(lambda *a: f(*a).sum(), argnums=(1, 2)),
        in_dims=(0, None, None),
        chunk_size=3,
    ),
}


# torch.func.linearize's own graph.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_functional_transform(
    transform: Function, kernels_ran: Function, device: torch.device
) -> None:
    inputs = operands(device, requires_grad=False)
    ours = transform(lambda *a: fastlinear.linear(*a).pow(3))(*inputs)
    assert kernels_ran()
    torch.testing.assert_close(ours, transform(lambda *a: F.linear(*a).pow(3))(*inputs))


VMAPPED = [(0, None, None), (1, 0, None), (None, 0, 0), (None, None, 0), (1, 1, 1), (None, 1, None)]


@pytest.mark.parametrize("in_dims", VMAPPED, ids=str)
@pytest.mark.parametrize("transform", ["values", "gradients"])
def test_vmap_over_any_operand(
    in_dims: tuple[int | None, ...], transform: str, device: torch.device
) -> None:
    shapes = []
    for shape, dim in zip([(4, 5), (3, 5), (3,)], in_dims, strict=True):
        shapes.append(shape if dim is None else (*shape[:dim], 6, *shape[dim:]))
    inputs = [normal(shape, torch.float64, device) for shape in shapes]

    def mapped(linear: Function) -> Any:
        function = (
            linear
            if transform == "values"
            else torch.func.grad(lambda *a: linear(*a).pow(2).sum(), (0, 1, 2))
        )
        return torch.func.vmap(function, in_dims=in_dims)(*inputs)

    torch.testing.assert_close(mapped(fastlinear.linear), mapped(F.linear))


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_vmap_in_chunks(chunk_size: int | None, device: torch.device) -> None:
    input, weight = (normal((6, *shape, 5), torch.float64, device) for shape in ((4,), (3,)))

    def mapped(linear: Function) -> Tensor:
        return torch.func.vmap(linear, chunk_size=chunk_size)(input, weight)

    torch.testing.assert_close(mapped(fastlinear.linear), mapped(F.linear))


@pytest.mark.parametrize("transform", ["values", "gradients"])
def test_vmap_twice(transform: str, device: torch.device) -> None:
    input = normal((2, 3, 4, 5), torch.float64, device)
    weight = normal((3, 2, 2, 5), torch.float64, device)

    def mapped(linear: Function) -> Any:
        function = (
            linear
            if transform == "values"
            else torch.func.grad(lambda *a: linear(*a).pow(2).sum(), (0, 1))
        )
        return torch.func.vmap(torch.func.vmap(function), in_dims=(0, 1))(input, weight)

    torch.testing.assert_close(mapped(fastlinear.linear), mapped(F.linear))


def squared_error(
    model: nn.Module, parameters: dict[str, Tensor], input: Tensor, target: Tensor
) -> Tensor:
    return (functional_call(model, parameters, (input,)) - target).square().mean()


def test_functional_call_per_sample_gradients(device: torch.device) -> None:
    inputs, targets = (normal((6, size), torch.float64, device) for size in (3, 2))

    def per_sample(model: nn.Module) -> Any:
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        gradient = torch.func.grad(lambda *a: squared_error(model, *a))
        return torch.func.vmap(gradient, in_dims=(None, 0, 0))(parameters, inputs, targets)

    ours, theirs = map(per_sample, twins(device))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch", [None, 0], ids=["one batch", "a batch each"])
def test_functional_call_trains_an_ensemble(batch: int | None, device: torch.device) -> None:
    members = [twins(device) for _ in range(3)]
    leading = () if batch is None else (3,)
    input, target = (normal((*leading, 4, size), torch.float64, device) for size in (3, 2))

    def step(models: list[nn.Module]) -> dict[str, Tensor]:
        parameters, _ = stack_module_state(models)
        gradient = torch.func.grad(lambda *a: squared_error(models[0], *a))
        gradients = torch.func.vmap(gradient, in_dims=(0, batch, batch))(parameters, input, target)
        return {name: value.detach() - gradients[name] for name, value in parameters.items()}

    ours, theirs = (step(list(models)) for models in zip(*members, strict=True))
    torch.testing.assert_close(ours, theirs)
