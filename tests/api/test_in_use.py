"""What people do with linear layers, done with ours and with PyTorch's.

Gradients that are blocked, or asked for one by one; many calls under autocast."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from in_use import by_pytorch, every_layer
from side_by_side import assert_alike, assert_same
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import fastlinear

pytestmark = pytest.mark.usefixtures("backend")

Deed = Callable[[Any], Any]


class Blocked(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return input.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@every_layer
@pytest.mark.parametrize("create_graph", [False, True])
def test_blocked_gradient_leaves_none(
    make: Callable[[], nn.Module], create_graph: bool, device: torch.device
) -> None:
    layer = make().to(device)
    input = torch.randn(2, 5, 4, device=device, requires_grad=True)
    leaves = [input, *layer.parameters()]
    for call in (layer, by_pytorch(layer)):
        output = Blocked.apply(call(input)).sum()
        gradients = torch.autograd.grad(
            output, leaves, allow_unused=True, create_graph=create_graph
        )
        assert gradients == (None,) * len(leaves)


def test_blocked_gradient_leaves_none_to_the_optimizer(device: torch.device) -> None:
    def step(Linear: Any) -> Any:
        layer = Linear(4, 3).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
        Blocked.apply(layer(torch.randn(5, 4).to(device))).sum().backward()
        optimizer.step()
        return layer, layer.weight.grad

    assert_same(step)


@every_layer
def test_blocked_gradient_under_vmap(make: Callable[[], nn.Module], device: torch.device) -> None:
    layer = make().to(device)

    def loss(call: Callable[[Tensor], Tensor]) -> Any:
        return torch.func.vmap(torch.func.grad(lambda row: Blocked.apply(call(row)).sum()))

    input = torch.randn(6, 2, 5, 4, device=device)
    assert_alike(loss(layer)(input), loss(by_pytorch(layer))(input))


def subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(names) + 1):
        yield from itertools.combinations(names, size)


def counted(call: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


@every_layer
@pytest.mark.parametrize("way", ["grad", "grad of grad", "backward"])
def test_backward_computes_what_is_asked_for(
    make: Callable[[], nn.Module], way: str, device: torch.device
) -> None:
    """As many operations as PyTorch's backward, for the gradients of any of the operands."""
    layer = make().to(device)
    input = torch.randn(2, 5, 4, device=device, requires_grad=True)
    leaves = {"input": input, **dict(layer.named_parameters())}

    def gradients(call: Callable[[Tensor], Tensor], wanted: list[Tensor]) -> tuple[Any, int]:
        loss = call(input).square().sum()
        if way == "backward":
            for leaf in leaves.values():
                leaf.grad = None
            _, flops = counted(lambda: loss.backward(inputs=wanted))
            return [leaf.grad for leaf in leaves.values()], flops
        return counted(
            lambda: torch.autograd.grad(loss, wanted, create_graph=way == "grad of grad")
        )

    for names in subsets(list(leaves)):
        wanted = [leaves[name] for name in names]
        ours, our_flops = gradients(layer, wanted)
        theirs, their_flops = gradients(by_pytorch(layer), wanted)
        assert our_flops == their_flops, names
        torch.testing.assert_close([*ours], [*theirs])


@every_layer
def test_backward_computes_what_is_trained(
    make: Callable[[], nn.Module], device: torch.device
) -> None:
    """As before, with all but some of the operands frozen."""
    layer = make().to(device)
    input = torch.randn(2, 5, 4, device=device)
    leaves = {"input": input, **dict(layer.named_parameters())}
    for names in subsets(list(leaves)):
        outcomes = []
        for call in (layer, by_pytorch(layer)):
            for name, leaf in leaves.items():
                leaf.requires_grad_(name in names).grad = None
            loss = call(input).square().sum()
            _, flops = counted(loss.backward)
            outcomes.append(([leaf.grad for leaf in leaves.values()], flops))
        (ours, our_flops), (theirs, their_flops) = outcomes
        assert our_flops == their_flops, names
        torch.testing.assert_close(ours, theirs)


def test_backward_into_main_grad_computes_what_is_asked_for(device: torch.device) -> None:
    layer = fastlinear.Linear(4, 3, device=device, accumulate_into_main_grad=True)
    layer.weight.main_grad = torch.zeros(3, 4, device=device)
    input = torch.randn(5, 4, device=device, requires_grad=True)
    for call in (layer, by_pytorch(layer)):
        loss = call(input).square().sum()
        _, flops = counted(lambda loss=loss: torch.autograd.grad(loss, [input, layer.bias]))
        assert flops in (0, 2 * 5 * 4 * 3)  # kernels without an op are not counted
        Blocked.apply(call(input)).sum().backward()
    assert not layer.weight.main_grad.any()
    assert (input.grad, layer.bias.grad) == (None, None)


# Copies of weights under autocast.


@every_layer
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_autocast_makes_one_copy_of_a_weight(
    make: Callable[[], nn.Module], grad: bool, device: torch.device
) -> None:
    """What 20 calls in one region keep is no more than PyTorch's keep."""
    layer = make().to(device)
    input = torch.randn(2, 5, 4, device=device, requires_grad=True)

    def region(call: Callable[[Tensor], Tensor]) -> tuple[int, Any]:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # nor can it be another's then
            return tensor

        layer.zero_grad()
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(device.type, torch.bfloat16),
        ):
            with torch.set_grad_enabled(grad):
                by_pytorch(layer)(input)  # fills the cache
            losses = [call(input).float().square().sum() for _ in range(20)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
        torch.stack(losses).sum().backward()
        return size, [parameter.grad for parameter in layer.parameters()]

    (ours, gradients), (theirs, native) = region(layer), region(by_pytorch(layer))
    if grad:
        assert ours <= theirs
    for mine, one in zip(gradients, native, strict=True):
        torch.testing.assert_close(mine, one, rtol=0.05, atol=0.05 * one.abs().max().item())


def test_autocast_reads_each_weight_once_for_inference(device: torch.device) -> None:
    layer = fastlinear.Linear(4, 3, device=device)
    addresses = set()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), torch.autocast(device.type, torch.bfloat16):
            for _ in range(2):
                copied = fastlinear._torch_internals.autocast_copy(layer.weight, torch.bfloat16)
                addresses.add(copied.data_ptr())
                assert copied.dtype == torch.bfloat16
            assert len(addresses) == 1
        addresses.clear()


def test_autocast_region_of_another_dtype_within(device: torch.device) -> None:
    layer = fastlinear.Linear(4, 3, device=device)
    input = torch.randn(5, 4, device=device)
    with fastlinear.use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
        assert layer(input).dtype == torch.bfloat16
        with torch.autocast(device.type, torch.float16):
            assert layer(input).dtype == torch.float16  # nn.Linear raises: its copy is the other's
