"""Calls like an earlier one go straight to their launch: only where nothing could tell.

Each test first makes a shortcut, by a call, and then a call that must not take it, or may.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from guards import SeenByDispatch
from oracle import normal
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastlinear
from fastlinear import functional
from fastlinear.choice import way
from fastlinear.ops.linear import linear_op

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture(autouse=True)
def shortcuts(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Those of one test."""
    shortcuts: dict[Any, Any] = {}
    monkeypatch.setattr(way, "_ways", shortcuts)
    return shortcuts


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that every call of the op from `linear` makes longer."""
    calls: list[str] = []

    def counted(*operands: Tensor | None) -> Tensor:
        calls.append("linear")
        return linear_op._op(*operands)

    monkeypatch.setattr(functional, "_linear", counted)
    return calls


Operands = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def operands(device: torch.device) -> Operands:
    """Operands that there is a shortcut for."""
    operands = (
        normal((4, 5), torch.float64, device),
        normal((3, 5), torch.float64, device).requires_grad_(),
        normal((3,), torch.float64, device).requires_grad_(),
    )
    fastlinear.linear(*operands)
    assert way.find(*operands) is not None
    return operands


def right(output: Tensor, *operands: Tensor | None) -> None:
    torch.testing.assert_close(output, F.linear(*operands))


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(4, 5), (5,), (2, 3, 5)], ids=str)
def test_the_second_call_takes_the_shortcut_and_is_right(
    shape: tuple[int, ...], biased: bool, dispatched: list[str], device: torch.device
) -> None:
    weight = normal((3, 5), torch.float64, device).requires_grad_()
    bias = normal((3,), torch.float64, device).requires_grad_() if biased else None
    for calls in range(4):
        input = normal(shape, torch.float64, device)
        output = fastlinear.linear(input, weight, bias)
        right(output, input, weight, bias)
        needed = [weight] if bias is None else [weight, bias]
        grad_output = torch.randn_like(output)
        ours = torch.autograd.grad(output, needed, grad_output)
        theirs = torch.autograd.grad(F.linear(input, weight, bias), needed, grad_output)
        torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            output = fastlinear.linear(input, weight, bias)
        assert not output.requires_grad
        right(output.requires_grad_(), input, weight, bias)
        assert len(dispatched) == 1, calls


@pytest.mark.parametrize("shape", [(0, 5), (2, 3, 4, 5)], ids=["no rows", "copied"])
def test_what_takes_more_than_a_launch_takes_a_shortcut_too(
    shape: tuple[int, ...], dispatched: list[str], device: torch.device
) -> None:
    layer = fastlinear.Linear(5, 3, device=device, dtype=torch.float64)
    for _ in range(3):
        input = normal(shape, torch.float64, device)
        if len(shape) == 4:
            input = input.permute(2, 1, 0, 3)
        right(layer(input), input, layer.weight, layer.bias)
    assert len(dispatched) == 1


def test_every_derivative_goes_through_a_shortcut(device: torch.device) -> None:
    tensors = [
        normal(shape, torch.float64, device).requires_grad_() for shape in ((4, 5), (3, 5), (3,))
    ]
    fastlinear.linear(*tensors)
    assert way.find(*tensors) is not None
    assert torch.autograd.gradcheck(fastlinear.linear, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(fastlinear.linear, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(
        fastlinear.linear, tensors, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )


def test_as_much_is_saved_as_is_needed(operands: Operands) -> None:
    input, weight, bias = operands
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fastlinear.linear(input, weight, bias)
    assert [one.data_ptr() for one in saved] == [input.data_ptr()]


def moved(tensor: Tensor) -> Tensor:
    """As `tensor`, at an address that does not divide by 16."""
    memory = torch.cat([tensor.detach().flatten()[:1], tensor.detach().flatten()])
    return memory[1:].view(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.detach().t().contiguous().t()


OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "input, unaligned": lambda input, weight, bias: (moved(input), weight, bias),
    "weight, unaligned": lambda input, weight, bias: (input, moved(weight), bias),
    "bias, unaligned": lambda input, weight, bias: (input, weight, moved(bias)),
    "input, transposed": lambda input, weight, bias: (transposed(input), weight, bias),
    "weight, transposed": lambda input, weight, bias: (input, transposed(weight), bias),
    "bias, one for all": lambda input, weight, bias: (input, weight, bias[:1].expand(3)),
    "input, sliced": lambda input, weight, bias: (
        torch.cat([input, input], 1)[:, :5],
        weight,
        bias,
    ),
    "input, negated": lambda input, weight, bias: (torch._neg_view(input), weight, bias),
    "weight, negated": lambda input, weight, bias: (input, torch._neg_view(weight), bias),
    "input, of implied zeros": lambda input, weight, bias: (
        torch._efficientzerotensor(input.shape, dtype=input.dtype, device=input.device),
        weight,
        bias,
    ),
    "dtype": lambda input, weight, bias: (input.float(), weight.float(), bias.float()),
    "input that requires a gradient": lambda input, weight, bias: (
        input.clone().requires_grad_(),
        weight,
        bias,
    ),
    "nothing requires a gradient": lambda input, weight, bias: (
        input,
        weight.detach(),
        bias.detach(),
    ),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_other_operands_of_the_same_shapes_are_told_apart(
    change: Callable[[Tensor, Tensor, Tensor], Operands],
    grad: bool,
    operands: Operands,
) -> None:
    for _ in range(2):  # the second may have a shortcut of its own
        others = change(*operands)
        with torch.set_grad_enabled(grad):
            output, theirs = fastlinear.linear(*others), F.linear(*others)
        torch.testing.assert_close(output, theirs)
        assert output.requires_grad == theirs.requires_grad
        assert output.dtype == theirs.dtype
        if output.requires_grad:
            needed = [one for one in others if one.requires_grad]
            grad_output = torch.randn_like(output)
            torch.testing.assert_close(
                torch.autograd.grad(output, needed, grad_output),
                torch.autograd.grad(theirs, needed, grad_output),
            )
        right(fastlinear.linear(*operands), *operands)


def test_a_plan_for_aligned_operands_is_not_followed_for_others(operands: Operands) -> None:
    for position in range(3):
        others = list(operands)
        others[position] = moved(others[position]).requires_grad_(position > 0)
        assert others[position].data_ptr() % 16
        assert way.find(*others) is None
        fastlinear.linear(*others)
        assert way.find(*others) is None


def test_other_dtypes_and_devices_are_refused_as_before(operands: Operands) -> None:
    input, weight, bias = operands
    with pytest.raises(RuntimeError):
        F.linear(input.float(), weight, bias)
    with pytest.raises(RuntimeError):
        fastlinear.linear(input.float(), weight, bias)
    with pytest.raises((TypeError, RuntimeError)):
        fastlinear.linear(input, weight.detach().to("meta"), bias)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_have_no_strides_are_refused_as_before(operands: Operands) -> None:
    input, weight, bias = operands
    for other in (input.to_sparse(), torch.nested.nested_tensor([input[0], input[1]])):
        with pytest.raises((TypeError, RuntimeError)):
            fastlinear.linear(other, weight, bias)
    with pytest.raises((TypeError, RuntimeError)):
        fastlinear.linear(input, weight, torch.nested.nested_tensor([bias]))


def test_products_follow_the_precision_that_is_set(device: torch.device) -> None:
    input, weight = (normal(shape, torch.float32, device) for shape in ((4, 5), (3, 5)))
    fastlinear.linear(input, weight)
    torch.set_float32_matmul_precision("high")
    assert way.find(input, weight, None) is None
    fastlinear.linear(input, weight)
    torch.set_float32_matmul_precision("highest")
    assert way.find(input, weight, None) is not None


class SeenByFunction(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.seen.append(function)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_modes_and_the_profiler_see_the_op(grad: bool, operands: Operands) -> None:
    with torch.set_grad_enabled(grad):
        with SeenByDispatch() as mode:
            fastlinear.linear(*operands)
        assert mode.seen.count(linear_op) == 1
        with SeenByFunction() as functions:
            fastlinear.linear(*operands)
        assert any("fastlinear" in str(one) for one in functions.seen)
        with FlopCounterMode(display=False) as counter:
            fastlinear.linear(*operands)
        assert counter.get_total_flops() == 2 * 4 * 5 * 3
        with torch.profiler.profile(acc_events=True) as profile:
            fastlinear.linear(*operands)
        assert "fastlinear::linear" in {event.name for event in profile.events()}
    assert way.find(*operands) is not None


def test_tracers_see_the_op(operands: Operands) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for options in ({}, {"tracing_mode": "fake"}, {"pre_dispatch": True}):
        graph = make_fx(lambda *given: fastlinear.linear(*given), **options)(*operands)
        assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
            linear_op
        ]
    exported = torch.export.export(fastlinear.Linear(5, 3).double(), operands[:1])
    assert linear_op in [node.target for node in exported.graph.nodes]
    with torch.no_grad():
        traced = torch.jit.trace(lambda *given: fastlinear.linear(*given), operands)
    assert "fastlinear::linear" in str(traced.graph)


def test_within_fake_tensors_mode_results_are_fake(operands: Operands) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(fastlinear.linear(*operands), FakeTensor)


def test_transforms_go_on_through_the_op(operands: Operands) -> None:
    input, weight, bias = operands
    right(torch.func.vmap(lambda row: fastlinear.linear(row, weight, bias))(input), *operands)
    jacobian = torch.func.jacrev(fastlinear.linear, 1)(input, weight, bias)
    torch.testing.assert_close(jacobian, torch.func.jacrev(F.linear, 1)(input, weight, bias))
    tangents = tuple(torch.randn_like(one) for one in operands)
    ours = torch.func.jvp(fastlinear.linear, operands, tangents)
    torch.testing.assert_close(ours, torch.func.jvp(F.linear, operands, tangents))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, tangents[0])
        output = fastlinear.linear(dual, weight, bias)
        torch.testing.assert_close(
            torch.autograd.forward_ad.unpack_dual(output).tangent, F.linear(tangents[0], weight)
        )
    functional_linear = torch.func.functionalize(fastlinear.linear)
    right(functional_linear(input, weight.detach(), bias.detach()), *operands)


def test_autocast_casts(device: torch.device) -> None:
    input, weight = (normal(shape, torch.float32, device) for shape in ((4, 5), (3, 5)))
    for _ in range(2):
        assert fastlinear.linear(input, weight).dtype == torch.float32
        with torch.autocast(device.type, torch.bfloat16):
            assert fastlinear.linear(input, weight).dtype == torch.bfloat16


def test_inference_mode_has_shortcuts_of_its_own(operands: Operands, dispatched: list[str]) -> None:
    for calls in (1, 1, 1):
        with torch.inference_mode():
            output = fastlinear.linear(*operands)
            with torch.enable_grad():
                assert not fastlinear.linear(*operands).requires_grad
        assert output.is_inference()
        assert not output.requires_grad
        assert len(dispatched) == calls
    assert fastlinear.linear(*operands).requires_grad
    assert len(dispatched) == 1


def test_below_autograd_nothing_is_recorded(operands: Operands) -> None:
    for _ in range(2):
        with torch._C._AutoDispatchBelowAutograd():
            assert not fastlinear.linear(*operands).requires_grad


def test_compiled_functions_hold_the_op(operands: Operands) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fastlinear.linear, backend=keep, fullgraph=True)
    right(compiled(*operands), *operands)
    (graph,) = graphs
    assert linear_op in [node.target for node in graph.graph.nodes]


def test_subclasses_are_let_be(operands: Operands) -> None:
    class Named(Tensor):
        pass

    input, weight, bias = operands
    for _ in range(2):
        with pytest.raises(TypeError, match="Named"):
            fastlinear.linear(input.as_subclass(Named), weight, bias)


def test_shortcuts_keep_no_tensor_alive(device: torch.device) -> None:
    layer = fastlinear.Linear(5, 3, device=device)
    input = torch.randn(4, 5, device=device, requires_grad=True)
    for _ in range(3):
        layer(input).sum().backward()
    assert way.find(input, layer.weight, layer.bias) is not None
    alive = [weakref.ref(tensor) for tensor in (input, *layer.parameters())]
    del layer, input
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


def test_shortcuts_are_bounded(
    shortcuts: dict[Any, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(way, "LARGEST_CACHE", 3)
    monkeypatch.setattr(way, "WAYS_A_SHAPE", 2)
    weight = torch.randn(3, 4, device=device)
    for rows in range(1, 8):
        for stride in range(1, 4):
            input = torch.randn(rows, 4 * stride, device=device)[:, ::stride]
            right(fastlinear.linear(input, weight), input, weight)
            assert len(shortcuts) <= 3
            assert all(len(one) <= 2 for one in shortcuts.values())


def test_a_layer_whose_weight_is_computed_computes_it(device: torch.device) -> None:
    layer = fastlinear.Linear(5, 3, device=device)
    input = torch.randn(4, 5, device=device)
    layer(input)

    class Doubled(fastlinear.Linear):
        @property
        def weight(self) -> Tensor:
            return 2 * self._parameters["weight"]

    weight, bias = layer.weight, layer.bias
    layer.__class__ = Doubled
    right(layer(input), input, 2 * weight, bias)
    layer.__class__ = fastlinear.Linear
    torch.nn.utils.parametrizations.weight_norm(layer)
    for _ in range(2):
        right(layer(input), input, layer.weight, layer.bias)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    values = {"weight": 3 * weight, "bias": bias}
    right(torch.func.functional_call(layer, values, (input,)), input, 3 * weight, bias)
