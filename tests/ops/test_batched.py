"""`fastlinear.batched_linear` and `BatchedLinear`: B independent layers in one call.

The reference is `torch.baddbmm`, or `torch.bmm` without a bias; that of the module, as many
`nn.Linear` as it has layers.
"""

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    FORWARD_KERNELS,
    assert_as_exact,
    exact_backward,
    exact_forward,
    fenced,
    native_backward,
    native_forward,
    normal,
    sum_scale,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastlinear
from fastlinear.kernels.launching import launch

pytestmark = pytest.mark.usefixtures("backend")

through_the_kernels = pytest.mark.parametrize("backend", ["triton"], indirect=True)
of_the_module_alone = pytest.mark.parametrize("backend", ["auto"], indirect=True)

Function = Callable[..., Any]

# (B, M, N, K), with the reason for each.
SHAPES = {
    "one of each": (1, 1, 1, 1),
    "one layer": (1, 33, 31, 32),
    "several blocks, none whole": (3, 40, 35, 50),
    "more layers than rows": (17, 2, 5, 7),
    "one datapoint": (4, 1, 40, 33),
    "one feature in, one out": (16, 33, 1, 1),
    "no layers": (0, 4, 5, 7),
    "no rows": (3, 0, 5, 7),
    "no output features": (3, 4, 0, 7),
    "no input features": (3, 4, 5, 0),
    "nothing at all": (0, 0, 0, 0),
}


def reference(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is None:
        return torch.bmm(input, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), input, weight.mT)


def operands(
    device: torch.device,
    shape: tuple[int, int, int, int] = (2, 4, 3, 5),
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
) -> list[Tensor]:
    """input (B, M, K), weight (B, N, K), bias (B, N), for (B, M, N, K)."""
    layers, rows, outputs, inputs = shape
    shapes = ((layers, rows, inputs), (layers, outputs, inputs), (layers, outputs))
    return [normal(one, dtype, device).requires_grad_(requires_grad) for one in shapes]


def with_gradients(function: Function, inputs: list[Tensor], grad_output: Tensor) -> Any:
    output = function(*inputs)
    wanted = [one for one in inputs if one.requires_grad]
    return output, torch.autograd.grad(output, wanted, grad_output.to(output.dtype))


def assert_alike(inputs: list[Tensor], function: Function = fastlinear.batched_linear) -> None:
    """Output and gradients are the reference's."""
    grad_output = torch.randn_like(reference(*inputs))
    ours = with_gradients(function, inputs, grad_output)
    torch.testing.assert_close(ours, with_gradients(reference, inputs, grad_output))
    assert ours[0].is_contiguous()


# The function: values, strides, gradients.


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_as_exact_as_pytorch_s(
    shape: tuple[int, int, int, int], dtype: torch.dtype, bias: bool, device: torch.device
) -> None:
    inputs = operands(device, shape, dtype)[: 2 + bias]
    grad_output = normal((*shape[:2], shape[2]), dtype, device)
    output, gradients = with_gradients(fastlinear.batched_linear, inputs, grad_output)
    input, weight, *biases = inputs
    one_bias = biases[0] if biases else None
    native = native_forward(input, weight, one_bias)
    assert_as_exact(output, native, exact_forward(input, weight, one_bias), "output")
    assert output.is_contiguous()
    wide = grad_output.detach().double()
    terms = {
        "grad_weight": wide.unsqueeze(-1) * input.detach().double().unsqueeze(-2),
        "grad_bias": wide,
    }
    for name, gradient, theirs, exact in zip(
        ["grad_input", "grad_weight", "grad_bias"],
        gradients,
        native_backward(grad_output, input, weight),
        exact_backward(grad_output, input, weight),
        strict=False,
    ):
        scale = sum_scale(terms[name], dtype, 1) if name in terms else 0.0
        assert_as_exact(gradient, theirs, exact, name, scale=scale)


def many(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# Of operands (2, 4, 5), (2, 3, 5), (2, 3).
STRIDES: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
    "one input to every layer": lambda: (many(4, 5).expand(2, -1, -1), many(2, 3, 5), many(2, 3)),
    "one layer to every input": lambda: (
        many(2, 4, 5),
        many(3, 5).expand(2, -1, -1),
        many(3).expand(2, -1),
    ),
    "one row, one number": lambda: (
        many(2, 1, 5).expand(-1, 4, -1),
        many(2, 3, 5),
        many(2, 1).expand(-1, 3),
    ),
    "transposed": lambda: (many(2, 5, 4).mT, many(2, 5, 3).mT, many(3, 2).t()),
    "layers last": lambda: (
        many(4, 5, 2).permute(2, 0, 1),
        many(3, 5, 2).permute(2, 0, 1),
        many(3, 2).t(),
    ),
    "layers between": lambda: (
        many(4, 2, 5).transpose(0, 1),
        many(3, 2, 5).transpose(0, 1),
        many(2, 3),
    ),
    "every other element": lambda: (
        many(4, 8, 10)[::2, ::2, ::2],
        many(4, 6, 10)[::2, ::2, ::2],
        many(4, 6)[::2, ::2],
    ),
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
def test_operands_of_every_stride(
    make: Callable[[], tuple[Tensor, Tensor, Tensor]], device: torch.device
) -> None:
    inputs = [fenced(operand.to(device)).requires_grad_() for operand in make()]
    for operand, made in zip(inputs, make(), strict=True):
        assert operand.stride() == made.stride()
    assert_alike(inputs)
    assert_alike(inputs[:2])


REDUCTIONS: dict[str, Function] = {
    "sum: stride 0": lambda output: output.sum(),
    "sum over layers": lambda output: output.sum(0).pow(2).sum(),
    "sum over rows": lambda output: output.sum(1).pow(2).sum(),
    "one element": lambda output: output[1, 2, 0],
    "transposed": lambda output: (output.mT.contiguous() * many(2, 3, 4).to(output)).sum(),
    "every other column": lambda output: output[..., ::2].pow(2).sum(),
}


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
def test_gradients_of_every_stride(reduce: Function, seed: int, device: torch.device) -> None:
    inputs = operands(device)
    gradients = []
    for function in (fastlinear.batched_linear, reference):
        torch.manual_seed(seed)
        gradients.append(torch.autograd.grad(reduce(function(*inputs)), inputs))
    torch.testing.assert_close(*gradients)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """Of each launch the kernel's name, and the addresses of the tensors that it is given."""
    launches: list[tuple[str, list[int]]] = []
    run_kernel = launch.run

    def run(kernel: Any, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in pointers]
        launches.append((kernel.fn.__name__, addresses))
        run_kernel(kernel, plan, pointers)

    monkeypatch.setattr(launch, "run", run)
    return launches


@through_the_kernels
def test_kernels_take_all_layers_at_once_and_operands_as_they_lie(
    launched: list[tuple[str, list[int]]], device: torch.device
) -> None:
    input = normal((4, 5), torch.float32, device).requires_grad_()
    weight = normal((7, 5, 3), torch.float32, device).requires_grad_()
    bias = normal((3, 7), torch.float32, device).t().requires_grad_()
    grad_output = normal((4, 3), torch.float32, device).expand(7, -1, -1)
    output = fastlinear.batched_linear(input.expand(7, -1, -1), weight.mT, bias)
    assert len(launched) == 1
    assert launched[0][0] in FORWARD_KERNELS
    assert launched[0][1][:3] == [input.data_ptr(), weight.data_ptr(), bias.data_ptr()]
    output.backward(grad_output)
    assert [name for name, _ in launched[1:]] == ["linear_backward_kernel"]
    assert launched[1][1][:3] == [grad_output.data_ptr(), input.data_ptr(), weight.data_ptr()]


BIASES = {"of one layer": (1, 3), "of one number a layer": (2, 1), "of one number": (1, 1)}


@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_bias_broadcasts_as_in_baddbmm(shape: tuple[int, int], device: torch.device) -> None:
    input, weight, _ = operands(device)
    assert_alike([input, weight, normal(shape, torch.float64, device).requires_grad_()])


CHECKED = {
    "two layers": ((2, 1, 1, 2), True),
    "two layers without bias": ((2, 1, 2, 1), False),
    "no layers": ((0, 2, 2, 2), True),
    "no rows": ((2, 0, 2, 2), True),
}


@through_the_kernels
@pytest.mark.parametrize(("shape", "bias"), CHECKED.values(), ids=CHECKED)
def test_gradcheck_and_gradgradcheck(
    shape: tuple[int, int, int, int], bias: bool, device: torch.device
) -> None:
    inputs = tuple(operands(device, shape)[: 2 + bias])
    assert gradcheck(
        fastlinear.batched_linear,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )
    # Of second derivatives one random projection, which takes a third of the time.
    assert gradgradcheck(
        fastlinear.batched_linear,
        inputs,
        check_fwd_over_rev=True,
        check_batched_grad=True,
        fast_mode=True,
    )


def test_second_derivatives_through_expanded_operands(device: torch.device) -> None:
    def second(function: Function) -> tuple[Tensor, ...]:
        output = function(input.expand(3, -1, -1), weight, bias.expand(3, -1))
        first = torch.autograd.grad(output.pow(3).sum(), (input, weight), create_graph=True)
        return torch.autograd.grad(sum(one.pow(2).sum() for one in first), (input, weight, bias))

    input = normal((4, 5), torch.float64, device).requires_grad_()
    weight = normal((3, 2, 5), torch.float64, device).requires_grad_()
    bias = normal((2,), torch.float64, device).requires_grad_()
    torch.testing.assert_close(second(fastlinear.batched_linear), second(reference))


MASKS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("autocast", [False, True], ids=["as it is", "autocast"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "".join("01"[needed] for needed in mask))
def test_every_mask_of_requires_grad_saves_no_more_than_baddbmm(
    mask: tuple[bool, bool, bool], autocast: bool, bias: bool, device: torch.device
) -> None:
    def step(function: Function, inputs: list[Tensor]) -> tuple[bool, list[int], list[bool]]:
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel() * tensor.element_size())
            return tensor

        with (
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            output = function(*inputs)
        if output.requires_grad:
            output.sum().backward()
        return output.requires_grad, saved, [one.grad is not None for one in inputs]

    inputs = [
        one.detach().requires_grad_(needed)
        for one, needed in zip(operands(device, dtype=torch.float32), mask, strict=True)
    ][: 2 + bias]
    twins = [one.detach().clone().requires_grad_(one.requires_grad) for one in inputs]
    ours, theirs = step(fastlinear.batched_linear, inputs), step(reference, twins)
    assert (ours[0], ours[2]) == (theirs[0], theirs[2])
    assert len(ours[1]) == len(theirs[1])
    assert sum(ours[1]) <= sum(theirs[1])
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {}
    torch.testing.assert_close(
        [one.grad for one in inputs if one.grad is not None],
        [one.grad for one in twins if one.grad is not None],
        **tolerance,
    )


def test_what_is_not_saved_may_change_in_place(device: torch.device) -> None:
    input, weight, bias = operands(device)
    output = fastlinear.batched_linear(input.detach(), weight, bias)
    with torch.no_grad():
        weight.zero_()
        bias.zero_()
    output.mul_(2).relu_().sum().backward()
    assert weight.grad is not None
    output = fastlinear.batched_linear(input, weight, bias)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_inference_mode_gives_inference_tensors(device: torch.device) -> None:
    inputs = operands(device)
    with torch.inference_mode():
        output = fastlinear.batched_linear(*inputs)
        assert output.is_inference()
        torch.testing.assert_close(output.relu_(), reference(*inputs).relu())


@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_activation_follows_the_product(activation: str | None, device: torch.device) -> None:
    functions = {"relu": F.relu, "gelu": F.gelu, None: lambda output: output}
    inputs = operands(device)
    grad_output = torch.randn_like(reference(*inputs))
    ours, theirs = (
        with_gradients(function, inputs, grad_output)
        for function in (
            lambda *a: fastlinear.batched_linear(*a, activation=activation),
            lambda *a: functions[activation](reference(*a)),
        )
    )
    torch.testing.assert_close(ours, theirs)


def test_activation_of_another_name_says_which_there_are(device: torch.device) -> None:
    said = "activation must be None or one of 'relu', .* but is 'softmax'"
    with pytest.raises(ValueError, match=said):
        fastlinear.batched_linear(*operands(device), activation="softmax")
    with pytest.raises(ValueError, match=said):
        fastlinear.BatchedLinear(2, 5, 3, activation="softmax")


# What cannot be taken.


def W(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD_SHAPES = {
    "layers": (W(2, 4, 5), W(3, 6, 5), W(3, 6)),
    "one layer for two inputs": (W(2, 4, 5), W(1, 6, 5), None),
    "in_features": (W(2, 4, 5), W(2, 6, 4), None),
    "2-D input": (W(4, 5), W(2, 6, 5), W(2, 6)),
    "4-D input": (W(1, 2, 4, 5), W(2, 6, 5), None),
    "0-D input": (W(), W(2, 6, 5), None),
    "2-D weight": (W(2, 4, 5), W(6, 5), W(6)),
    "1-D weight": (W(2, 4, 5), W(5), None),
    "layers of bias": (W(2, 4, 5), W(2, 6, 5), W(3, 6)),
    "length of bias": (W(2, 4, 5), W(2, 6, 5), W(2, 5)),
    # Which baddbmm would add along the rows.
    "1-D bias as long as there are rows": (W(2, 6, 5), W(2, 6, 5), W(6)),
    "0-D bias": (W(2, 4, 5), W(2, 6, 5), W()),
    "3-D bias": (W(2, 4, 5), W(2, 6, 5), W(2, 1, 6)),
}


@pytest.mark.parametrize("arguments", BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_bad_shapes_are_named(arguments: tuple[Tensor, Tensor, Tensor | None]) -> None:
    with pytest.raises(RuntimeError, match=r"^batched_linear takes .*\(B, ") as raised:
        fastlinear.batched_linear(*arguments)
    input, weight, bias = arguments
    wrong = bias if bias is not None and "takes bias" in str(raised.value) else input
    assert f"is {tuple(wrong.shape)} and weight {tuple(weight.shape)}" in str(raised.value)
    assert raised.value.__cause__ is None


BAD_KINDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "input None": ((None, W(2, 3, 5)), "input is NoneType"),
    "weight None": ((W(2, 4, 5), None), "weight is NoneType"),
    "bias a number": ((W(2, 4, 5), W(2, 3, 5), 1.0), "bias is float"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD_KINDS.values(), ids=BAD_KINDS)
def test_what_is_no_tensor_is_named(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(TypeError, match=f"^batched_linear takes tensors, but {said}$"):
        fastlinear.batched_linear(*arguments)


DTYPES_THAT_DIFFER = {
    "input": (torch.float64, torch.float32, torch.float32),
    "weight": (torch.float32, torch.float16, torch.float32),
    "bias": (torch.float32, torch.float32, torch.float64),
    "input, no bias": (torch.float64, torch.float32),
}


@pytest.mark.parametrize("dtypes", DTYPES_THAT_DIFFER.values(), ids=DTYPES_THAT_DIFFER)
def test_dtypes_that_differ_raise_what_pytorch_raises(dtypes: tuple[torch.dtype, ...]) -> None:
    shapes = ((2, 4, 5), (2, 3, 5), (2, 3))
    inputs = [W(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    with pytest.raises(RuntimeError) as theirs:
        reference(*inputs)
    with pytest.raises(RuntimeError) as ours:
        fastlinear.batched_linear(*inputs)
    assert str(ours.value) == str(theirs.value)


UNSUPPORTED = {
    "int64": (lambda tensor: tensor.long(), "input is torch.int64"),
    "complex": (lambda tensor: tensor.cfloat(), "input is torch.complex64"),
    "sparse": (lambda tensor: tensor.to_sparse(), "input has layout torch.sparse_coo"),
}


@pytest.mark.parametrize(("change", "said"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_only_pytorch_takes(change: Function, said: str, backend: str) -> None:
    inputs = [W(2, 4, 5), W(2, 3, 5)]
    if "layout" in said:
        inputs[0] = change(inputs[0])
    else:
        inputs = [change(one) for one in (*inputs, W(2, 3))]
    if backend == "triton":
        with pytest.raises(TypeError, match=f"backend 'triton' takes .*{said}"):
            fastlinear.batched_linear(*inputs)
    else:
        torch.testing.assert_close(fastlinear.batched_linear(*inputs), reference(*inputs))


def test_subclasses_of_tensor_keep_their_meaning(backend: str) -> None:
    class Loud(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            return "my own product"

    loud = W(2, 4, 5).as_subclass(Loud)
    if backend == "triton":
        with pytest.raises(TypeError, match="takes plain tensors, but input is a Loud"):
            fastlinear.batched_linear(loud, W(2, 3, 5))
    else:
        assert fastlinear.batched_linear(loud, W(2, 3, 5)) == "my own product"


# What PyTorch does to a call.


def members(device: torch.device) -> tuple[fastlinear.BatchedLinear, list[nn.Linear]]:
    """A module of three layers, 5 to 2 features, in float64, and the same of nn.Linear."""
    linears = [nn.Linear(5, 2, device=device, dtype=torch.float64) for _ in range(3)]
    return fastlinear.BatchedLinear.from_linears(linears), linears


def one_by_one(linears: list[nn.Linear]) -> Callable[[Tensor], Tensor]:
    return lambda input: torch.stack(
        [layer(one) for layer, one in zip(linears, input, strict=True)]
    )


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


# The module.


def made(make: Callable[[], Any]) -> tuple[Any, list[str], Tensor]:
    """What was made, the warnings it gave, and the random numbers it left."""
    torch.manual_seed(torch.initial_seed())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = make()
    return result, [str(warning.message) for warning in caught], torch.get_rng_state()


def parameters_of(linears: list[Any], name: str) -> list[Tensor]:
    return [getattr(layer, name) for layer in linears]


FEATURES = {"some": (50, 30), "one": (1, 1), "no in": (0, 3), "no out": (5, 0), "none": (0, 0)}


@of_the_module_alone
@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_initial_values_are_those_of_layers_made_one_after_another(
    features: tuple[int, int], dtype: torch.dtype, bias: bool, layers: int, device: torch.device
) -> None:
    options = {"bias": bias, "device": device, "dtype": dtype}
    batch, given, random = made(lambda: fastlinear.BatchedLinear(layers, *features, **options))
    linears, their_warnings, their_random = made(
        lambda: [nn.Linear(*features, **options) for _ in range(layers)]
    )
    assert given == their_warnings
    assert torch.equal(random, their_random)
    assert batch.weight.shape == (layers, features[1], features[0])
    assert batch.weight.dtype == dtype
    assert all(map(torch.equal, batch.weight, parameters_of(linears, "weight")))
    if bias:
        assert batch.bias.shape == (layers, features[1])
        assert all(map(torch.equal, batch.bias, parameters_of(linears, "bias")))
    else:
        assert batch.bias is None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_from_linears_and_back_gives_the_same(bias: bool, device: torch.device) -> None:
    linears = [nn.Linear(5, 3, bias, device, torch.float64) for _ in range(4)]
    batch = fastlinear.BatchedLinear.from_linears(iter(linears))
    input = normal((4, 6, 5), torch.float64, device)
    torch.testing.assert_close(batch(input), one_by_one(linears)(input))
    back = batch.to_linears()
    assert [type(layer) for layer in back] == [fastlinear.Linear] * 4
    for layer, original in zip(back, linears, strict=True):
        assert repr(layer) == repr(original)
        assert list(layer.state_dict()) == list(original.state_dict())
        assert all(map(torch.equal, layer.parameters(), original.parameters()))
        assert all(one.is_leaf and one.requires_grad for one in layer.parameters())
    with torch.no_grad():  # copies: neither module sees what the other does
        linears[0].weight.zero_()
        batch.weight[1].zero_()
    assert batch.weight[0].any()
    assert back[1].weight.any()
    assert linears[1].weight.any()


def test_from_linears_keeps_what_the_layers_have_in_common(device: torch.device) -> None:
    linears = [
        fastlinear.Linear(5, 3, device=device, dtype=torch.bfloat16, activation="silu").eval()
        for _ in range(2)
    ]
    for layer in linears:
        layer.weight.requires_grad_(False)
    random = torch.get_rng_state()
    batch = fastlinear.BatchedLinear.from_linears(linears)
    assert torch.equal(torch.get_rng_state(), random)
    for module in (batch, *batch.to_linears()):
        assert module.activation == "silu"
        assert not module.training
        assert module.weight.dtype == torch.bfloat16
        assert module.weight.device == linears[0].weight.device
        assert (module.weight.requires_grad, module.bias.requires_grad) == (False, True)


def frozen(layer: nn.Linear) -> nn.Linear:
    layer.weight.requires_grad_(False)
    return layer


UNLIKE: dict[str, tuple[Callable[[], list[Any]], type[Exception], str]] = {
    "none": (list, ValueError, "one or more layers, but linears has none"),
    "no layer": (
        lambda: [nn.Linear(5, 3), nn.Bilinear(5, 3, 2)],
        TypeError,
        "nn.Linear, but layer 1 is Bilinear",
    ),
    "shapes": (
        lambda: [nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 5)],
        ValueError,
        r"the shape of weight of layer 0 is \(3, 5\) and of layer 2 \(5, 3\)",
    ),
    "bias": (
        lambda: [nn.Linear(5, 3), nn.Linear(5, 3, bias=False)],
        ValueError,
        r"the shape of bias of layer 0 is \(3,\) and of layer 1 None",
    ),
    "dtypes": (
        lambda: [nn.Linear(5, 3), nn.Linear(5, 3).half()],
        ValueError,
        "the dtype of weight of layer 0 is torch.float32 and of layer 1 torch.float16",
    ),
    "devices": (
        lambda: [nn.Linear(5, 3), nn.Linear(5, 3, device="meta")],
        ValueError,
        "the device of weight of layer 0 is cpu and of layer 1 meta",
    ),
    "frozen": (
        lambda: [nn.Linear(5, 3), frozen(nn.Linear(5, 3))],
        ValueError,
        "requires_grad of weight of layer 0 is True and of layer 1 False",
    ),
    "activations": (
        lambda: [nn.Linear(5, 3), fastlinear.Linear(5, 3, activation="relu")],
        ValueError,
        "the activation of layer 0 is None and of layer 1 relu",
    ),
}


@of_the_module_alone
@pytest.mark.parametrize(("make", "kind", "said"), UNLIKE.values(), ids=UNLIKE)
def test_from_linears_says_in_what_layers_differ(
    make: Callable[[], list[Any]], kind: type[Exception], said: str
) -> None:
    with pytest.raises(
        kind, match=rf"^from_linears\(\) takes (layers that are alike, but )?{said}$"
    ):
        fastlinear.BatchedLinear.from_linears(make())


def reloaded(thing: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: reloaded(module, weights_only=False),
}


@of_the_module_alone
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_the_same_module(
    copied: Callable[[Any], Any], bias: bool, device: torch.device
) -> None:
    batch = fastlinear.BatchedLinear(2, 5, 3, bias, device, activation="relu")
    twin = copied(batch)
    assert repr(twin) == repr(batch)
    assert repr(batch) == (
        "BatchedLinear(num_linears=2, in_features=5, out_features=3, "
        f"bias={bias}, activation='relu')"
    )
    assert list(twin.state_dict()) == ["weight", "bias"][: 1 + bias]
    input = normal((2, 4, 5), torch.float32, device)
    assert torch.equal(twin(input), batch(input))
    assert (twin.weight is batch.weight) == (copied is copy.copy)


@of_the_module_alone
def test_state_dict_loads(device: torch.device) -> None:
    batch, other = (fastlinear.BatchedLinear(2, 5, 3, device=device) for _ in range(2))
    assert not torch.equal(batch.weight, other.weight)
    other.load_state_dict(reloaded(batch.state_dict(), weights_only=True), strict=True)
    assert all(map(torch.equal, batch.parameters(), other.parameters()))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        fastlinear.BatchedLinear(3, 5, 3, device=device).load_state_dict(batch.state_dict())


@of_the_module_alone
def test_meta_then_empty_then_reset_is_as_made(device: torch.device) -> None:
    expected, _, random = made(lambda: fastlinear.BatchedLinear(2, 5, 3, device=device))
    skipped, _, untouched = made(
        lambda: nn.utils.skip_init(fastlinear.BatchedLinear, 2, 5, 3, device=device)
    )
    empty = fastlinear.BatchedLinear(2, 5, 3, device="meta")
    assert empty.weight.is_meta
    assert empty(torch.empty(2, 4, 5, device="meta")).shape == (2, 4, 3)
    for module in (skipped, empty.to_empty(device=device)):
        _, _, drawn = made(module.reset_parameters)
        assert torch.equal(drawn, random)
        assert all(map(torch.equal, module.parameters(), expected.parameters()))
        assert all(one.requires_grad for one in module.parameters())
    assert not torch.equal(untouched, random)


def test_an_ensemble_trains_as_its_members(device: torch.device) -> None:
    batch, linears = members(device)
    data = normal((8, 5), torch.float64, device)
    target = normal((3, 8, 2), torch.float64, device)
    ours = torch.optim.Adam(batch.parameters())
    theirs = torch.optim.Adam([one for layer in linears for one in layer.parameters()])
    for _ in range(3):
        ours.zero_grad()
        (batch(data.expand(3, -1, -1)) - target).square().sum().backward()
        ours.step()
        theirs.zero_grad()
        (one_by_one(linears)(data.expand(3, -1, -1)) - target).square().sum().backward()
        theirs.step()
    torch.testing.assert_close(
        [batch.weight.detach(), batch.bias.detach()],
        [torch.stack(parameters_of(linears, name)).detach() for name in ("weight", "bias")],
    )


def test_batched_activation_is_checked_when_it_is_set() -> None:
    layer = fastlinear.BatchedLinear(2, 3, 4, activation="relu")
    with pytest.raises(ValueError, match="activation must be None or one of 'relu'"):
        layer.activation = nn.ReLU()
    assert layer.activation == "relu"


@of_the_module_alone
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_batched_module_is_scripted(bias: bool, activation: str | None, backend: str) -> None:
    layer = fastlinear.BatchedLinear(3, 5, 7, bias, activation=activation).eval()
    input = torch.randn(3, 4, 5)
    scripted, file = torch.jit.script(layer), io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for compiled in (scripted, torch.jit.load(file), torch.jit.freeze(scripted)):
        torch.testing.assert_close(compiled(input), layer(input))
