"""What people do with linear layers, done with ours and with PyTorch's.

Gradients that are blocked, or asked for one by one; attributes and methods that are replaced;
subclasses; many calls under autocast; tools that trace. Either comes to the same.
"""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from side_by_side import assert_alike, assert_same
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import fastlinear
from fastlinear.ops.elementwise import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("backend")

Deed = Callable[[Any], Any]


# Each layer of ours, and the same by PyTorch's functions.

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: fastlinear.Linear(4, 3),
    "no bias": lambda: fastlinear.Linear(4, 3, bias=False),
    "relu": lambda: fastlinear.Linear(4, 3, activation="relu"),
    "gelu": lambda: fastlinear.Linear(4, 3, activation="gelu"),
    "batched": lambda: fastlinear.BatchedLinear(2, 4, 3),
    "batched, silu": lambda: fastlinear.BatchedLinear(2, 4, 3, activation="silu"),
    "gated": lambda: fastlinear.GatedLinear(4, 3),
    "gated, no bias": lambda: fastlinear.GatedLinear(4, 3, bias=False),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def by_pytorch(layer: Any) -> Callable[[Tensor], Tensor]:
    """`layer` by PyTorch's functions, with the same parameters."""
    if isinstance(layer, fastlinear.GatedLinear):
        gate, up = layer.gate_proj, layer.up_proj
        return lambda input: (
            ACTIVATIONS[layer.activation](F.linear(input, gate.weight, gate.bias))
            * F.linear(input, up.weight, up.bias)
        )
    act = (lambda output: output) if layer.activation is None else ACTIVATIONS[layer.activation]
    if isinstance(layer, fastlinear.BatchedLinear):
        return lambda input: act(
            torch.baddbmm(layer.bias.unsqueeze(1), input, layer.weight.transpose(1, 2))
        )
    return lambda input: act(F.linear(input, layer.weight, layer.bias))


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


# Attributes and methods.


def called(layer: Any, device: torch.device) -> Any:
    """The layer's output, and the gradients of whatever it was computed from."""
    input = torch.randn(5, 4, device=device, requires_grad=True)
    output = layer(input)
    output.square().sum().backward()
    return output, input.grad, [parameter.grad for parameter in layer.parameters()]


def with_tensors_in_dict(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    weight = torch.randn(3, 4, device=device, requires_grad=True)
    bias = torch.randn(3, device=device, requires_grad=True)
    layer.__dict__["weight"], layer.__dict__["bias"] = weight * 2, bias.exp()
    return called(layer, device), weight.grad, bias.grad


def with_a_weight_in_dict_only(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    weight = layer.weight
    del layer.weight
    layer.__dict__["weight"] = weight.detach() + 1
    return called(layer, device)


def with_a_property(Linear: Any, device: torch.device) -> Any:
    class Normalized(Linear):  # type: ignore[misc]
        @property
        def weight(self) -> Tensor:
            return F.normalize(self._parameters["weight"])

        @weight.setter
        def weight(self, value: Tensor) -> None:
            self.register_parameter("weight", value)

        @weight.deleter
        def weight(self) -> None:
            del self._parameters["weight"]

    layer = Normalized.__new__(Normalized)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = 4, 3
    layer._parameters["weight"] = nn.Parameter(torch.randn(3, 4, device=device))
    layer._parameters["bias"] = nn.Parameter(torch.randn(3, device=device))
    return called(layer, device)


def with_a_property_on_the_class(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    Linear.bias = property(lambda self: self._parameters["bias"] * 3)
    try:
        return called(layer, device)
    finally:
        del Linear.bias


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def with_the_result_of_a_function(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    weight = layer.weight
    layer.__dict__["weight"] = Double.apply(weight)
    return called(layer, device), weight.grad


def with_a_bias_taken_away(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    layer.__dict__["bias"] = None
    return called(layer, device)


def with_a_buffer_for_a_weight(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return called(layer, device)


def with_a_forward_of_its_own(Linear: Any, device: torch.device) -> Any:
    layer = Linear(4, 3).to(device)
    layer.forward = lambda input: type(layer).forward(layer, input) + 1
    return called(layer, device)


REPLACED: dict[str, Callable[[Any, torch.device], Any]] = {
    one.__name__: one
    for one in (
        with_tensors_in_dict,
        with_a_weight_in_dict_only,
        with_a_property,
        with_a_property_on_the_class,
        with_the_result_of_a_function,
        with_a_bias_taken_away,
        with_a_buffer_for_a_weight,
        with_a_forward_of_its_own,
    )
}


@pytest.mark.parametrize("deed", REPLACED.values(), ids=REPLACED)
def test_attribute_counts(deed: Callable[[Any, torch.device], Any], device: torch.device) -> None:
    assert_same(lambda Linear: deed(Linear, device))


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Has `nn.Linear.forward` add 1, as loaders of LoRA have it add theirs; whom it was for."""
    forward, layers = nn.Linear.forward, []

    def plus_1(self: nn.Linear, input: Tensor) -> Tensor:
        layers.append(type(self))
        return forward(self, input) + 1

    monkeypatch.setattr(nn.Linear, "forward", plus_1)
    return layers


def test_patched_forward_runs(patched: list[type], device: torch.device) -> None:
    assert_same(lambda Linear: called(Linear(4, 3).to(device), device))
    assert patched == [nn.Linear, fastlinear.Linear]
    input = torch.randn(5, 4, device=device)
    for activation in ("relu", "gelu"):  # which comes last
        layer = fastlinear.Linear(4, 3, device=device, activation=activation)
        expected = ACTIVATIONS[activation](F.linear(input, layer.weight, layer.bias) + 1)
        torch.testing.assert_close(layer(input), expected)
    gated = fastlinear.GatedLinear(4, 3).to(device)
    gate, up = (F.linear(input, one.weight, one.bias) + 1 for one in gated.children())
    torch.testing.assert_close(gated(input), F.silu(gate) * up)


def test_patched_call_runs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    call, seen = nn.Linear.__call__, []

    def noted(self: nn.Linear, input: Tensor) -> Tensor:
        seen.append(self)
        return call(self, input)

    gated = fastlinear.GatedLinear(4, 3).to(device)
    monkeypatch.setattr(nn.Linear, "__call__", noted, raising=False)
    gated(torch.randn(5, 4, device=device))
    assert seen == [gated.gate_proj, gated.up_proj]


def test_patched_forward_runs_no_more_once_it_is_undone(device: torch.device) -> None:
    layer, input = fastlinear.Linear(4, 3, device=device), torch.randn(5, 4, device=device)
    output = layer(input)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, input: input)
        assert layer(input) is input
    assert torch.equal(layer(input), output)


def test_patched_forward_takes_no_main_grad(patched: list[type], device: torch.device) -> None:
    layer = fastlinear.Linear(4, 3, device=device, accumulate_into_main_grad=True)
    with pytest.raises(RuntimeError, match="has been replaced on the class"):
        layer(torch.randn(5, 4, device=device))


# Subclasses with an activation of their own.


def dense(Linear: Any, first: bool) -> Any:
    class Dense(Linear):  # type: ignore[misc]
        def __init__(self, activation: Any) -> None:
            if first and not isinstance(activation, nn.Module):
                self.activation = activation
            super().__init__(4, 3)
            self.activation = activation

        def forward(self, input: Tensor) -> Tensor:
            act = self.activation
            output = super().forward(input)
            return act(output) if callable(act) else getattr(F, act)(output)

    return Dense


@pytest.mark.parametrize("first", [False, True], ids=["set after", "set before"])
@pytest.mark.parametrize(
    "activation", ["gelu", "hardtanh", F.gelu, nn.GELU(), nn.Softplus()], ids=str
)
def test_subclass_keeps_its_own_activation(
    activation: Any, first: bool, device: torch.device
) -> None:
    def deed(Linear: Any) -> Any:
        layer = dense(Linear, first)(activation).to(device)
        twin = copy.deepcopy(layer)
        assert repr(twin) == repr(layer)
        assert type(twin.activation) is type(activation)
        return called(twin, device), list(layer.state_dict())

    assert_same(deed)


def test_subclass_may_give_its_activation_to_the_constructor(device: torch.device) -> None:
    class Layer(fastlinear.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3, activation="relu")

    layer, input = Layer().to(device), torch.randn(5, 4, device=device)
    assert layer.activation == "relu"
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias).relu())
    layer.activation = "tanh"
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias).tanh())
    with pytest.raises(ValueError, match="activation must be None or one of"):
        layer.activation = F.relu


def test_activation_of_a_pickle_from_before() -> None:
    """Its place was the attribute `activation`."""
    layer = fastlinear.Linear(4, 3, activation="relu")
    before = copy.copy(layer)
    vars(before)["activation"] = vars(before).pop("_fastlinear_activation")
    loaded = pickle.loads(pickle.dumps(before))
    assert repr(loaded) == repr(layer)
    assert vars(loaded).keys() == vars(layer).keys()


# Tools that trace.


def linear_of(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fastlinear.linear(input, weight[0], bias[0], "gelu")


def batched_of(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fastlinear.batched_linear(input, weight, bias)


def gated_of(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fastlinear.gated_linear(input, weight[0], weight[1], bias[0], None)


@pytest.mark.parametrize("function", [linear_of, batched_of, gated_of])
def test_function_is_traced_by_fx(function: Any, device: torch.device) -> None:
    traced = torch.fx.symbolic_trace(function)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert {fastlinear.linear, fastlinear.batched_linear, fastlinear.gated_linear} & {*called}
    operands = [torch.randn(shape, device=device) for shape in ((2, 5, 4), (2, 3, 4), (2, 3))]
    torch.testing.assert_close(traced(*operands), function(*operands))


torchs_own = "ignore:The TorchScript type system doesn't support"  # of torch.fx's GraphModule


@pytest.mark.filterwarnings(torchs_own)
@pytest.mark.parametrize("function", [linear_of, batched_of, gated_of])
def test_function_is_traced_and_scripted_by_torchscript(
    function: Any, device: torch.device
) -> None:
    operands = [torch.randn(shape, device=device) for shape in ((2, 5, 4), (2, 3, 4), (2, 3))]
    for compiled in (
        torch.jit.script(function),
        torch.jit.trace(function, operands),
        torch.jit.script(torch.fx.symbolic_trace(function)),
    ):
        torch.testing.assert_close(compiled(*operands), function(*operands))


@pytest.mark.filterwarnings(torchs_own)
@every_layer
def test_layer_is_scripted_after_fx(make: Callable[[], nn.Module], device: torch.device) -> None:
    """As those that optimize a model before they script it do."""
    layer = make().to(device).eval()
    input = torch.randn(2, 5, 4, device=device)
    for scripted in (
        torch.jit.script(layer),
        torch.jit.freeze(torch.jit.script(layer)),
        torch.jit.script(torch.fx.symbolic_trace(layer)),
    ):
        torch.testing.assert_close(scripted(input), by_pytorch(layer)(input))


def test_layer_into_main_grad_is_traced_by_fx(device: torch.device) -> None:
    layer = fastlinear.Linear(4, 3, device=device, accumulate_into_main_grad=True)
    layer.weight.main_grad = torch.zeros(3, 4, device=device)
    traced = torch.fx.symbolic_trace(layer)
    traced(torch.ones(5, 4, device=device)).sum().backward()
    assert (layer.weight.main_grad == 5).all()


class Symbol:
    """What only stands for a tensor, and knows PyTorch's functions alone."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any, named: Any = None
    ) -> Any:
        return "F.linear" if function is F.linear else NotImplemented


def test_what_stands_for_a_tensor_gets_what_nn_linear_gives(backend: str) -> None:
    layer = fastlinear.Linear(4, 3)
    if backend == "triton":
        with pytest.raises(TypeError, match="no implementation found"):
            layer(Symbol())
    else:
        assert layer(Symbol()) == nn.Linear(4, 3)(Symbol()) == "F.linear"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the older exporter
@every_layer
def test_export_to_onnx_is_refused_in_a_sentence(
    make: Callable[[], nn.Module], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, input = make().eval(), torch.randn(2, 5, 4)
    said = r"export within `with fastlinear.use_backend\('torch'\):`"
    if backend == "auto":
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        torch.export.export(layer, (input,))  # what torch.onnx.export does first
        return
    with pytest.raises(RuntimeError, match=said):
        torch.onnx.export(layer, (input,), io.BytesIO(), dynamo=False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for strict in (False, True):
        with pytest.raises(Exception, match=said):
            torch.export.export(layer, (input,), strict=strict)
