"""Compiled calls: as few graphs and compilations as for PyTorch's layer, and its results."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Function, loss_and_gradients, network, operands, twins
from oracle import normal
from torch import Tensor, nn

import fastlinear
from fastlinear.choice.backend import use_tables
from fastlinear.ops.linear import linear_backward_op, linear_op

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture(params=["eager", "aot_eager", "inductor"])
def compiler(request: pytest.FixtureRequest, dynamo: Any) -> str:
    """The name of a backend of torch.compile."""
    if request.param == "inductor":
        request.getfixturevalue("cpp_compiler")
    return request.param


def assert_trains_alike(ours: Function, theirs: Function, inputs: list[Tensor]) -> None:
    """Outputs, and gradients of inputs, are the same."""
    output, reference = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(output, reference)
    grad_output = torch.randn_like(reference)
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, grad_output),
        torch.autograd.grad(reference, inputs, grad_output),
    )


# The ops


# A tuple is the shape of an operand.
OP_CALLS = {
    "layer": (linear_op, (2, 4, 5), (3, 5), (3,)),
    "layer without bias": (linear_op, (2, 4, 5), (3, 5), None),
    "batch of layers": (linear_op, (2, 4, 5), (2, 3, 5), (2, 3)),
    "all gradients": (linear_backward_op, (2, 4, 3), (2, 4, 5), (3, 5), True, False),
    "grad_weight of layers": (linear_backward_op, (2, 4, 3), (2, 4, 5), None, False, True),
    "grad_bias": (linear_backward_op, (2, 4, 3), None, None, True, False),
}


# opcheck reads .grad of its own copies, which are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# The suite's guarded outputs start inside their storage, which fake tensors do not.
@pytest.mark.usefixtures("plain_outputs", "dynamo")
@pytest.mark.parametrize("call", OP_CALLS.values(), ids=OP_CALLS)
def test_ops_pass_opcheck(call: tuple[Any, ...], device: torch.device) -> None:
    op, *arguments = call
    for position, shape in enumerate(arguments):
        if isinstance(shape, tuple):
            operand = torch.randn(shape, dtype=torch.float64, device=device)
            arguments[position] = operand.requires_grad_()
    results = torch.library.opcheck(op, tuple(arguments))
    assert set(results.values()) == {"SUCCESS"}


# torch.compile


def test_compile_function_without_graph_breaks(compiler: str, device: torch.device) -> None:
    def fused(linear: Function) -> Function:
        return lambda *operands: F.gelu(linear(*operands))

    compiled = torch.compile(fused(fastlinear.linear), fullgraph=True, backend=compiler)
    assert_trains_alike(compiled, fused(F.linear), operands(device))


def test_compile_module_without_graph_breaks(
    compiler: str, kernels_ran: Function, device: torch.device
) -> None:
    ours, theirs = twins(device)
    compiled = torch.compile(ours, fullgraph=True, backend=compiler)
    for rows in (4, 6):  # the second batch is compiled for any size
        input = normal((rows, 3), torch.float64, device)
        torch.testing.assert_close(
            loss_and_gradients(compiled, input), loss_and_gradients(theirs, input)
        )
        assert kernels_ran()


@pytest.mark.parametrize("bias", [(1,), ()], ids=str)
def test_compile_with_a_bias_of_one_element(
    bias: tuple[int, ...], dynamo: Any, device: torch.device
) -> None:
    input, weight, _ = operands(device, requires_grad=False)
    one = torch.randn(bias, dtype=torch.float64, device=device)
    compiled = torch.compile(fastlinear.linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input, weight, one), F.linear(input, weight, one))


def test_compile_refuses_what_eager_refuses(dynamo: Any, device: torch.device) -> None:
    compiled = torch.compile(fastlinear.linear, backend="eager")
    whole = torch.ones(2, 3, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match="takes float16, bfloat16, float32 and float64"):
        compiled(whole, whole)


def test_compile_layer_with_activation(dynamo: Any, device: torch.device) -> None:
    layer = fastlinear.Linear(3, 5, dtype=torch.float64, device=device, activation="gelu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_trains_alike(
        compiled,
        lambda input: F.gelu(F.linear(input, layer.weight, layer.bias)),
        [normal((4, 3), torch.float64, device).requires_grad_()],
    )


def compilations(model: nn.Module, batches: list[int], dynamic: bool | None) -> list[int]:
    """How often the model has been compiled, after a step with each size of batch."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    counts = []
    for rows in batches:
        parameter = next(model.parameters())
        input = torch.randn(rows, 3, dtype=parameter.dtype, device=parameter.device)
        compiled(input).sum().backward()
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("batches", [[4, 6, 9, 1, 0, 7], [1, 0, 5, 8]], ids=str)
def test_compile_compiles_as_often_as_nn_linear(
    batches: list[int], dynamic: bool | None, dynamo: Any, device: torch.device
) -> None:
    ours, theirs = twins(device)
    assert compilations(ours, batches, dynamic) == compilations(theirs, batches, dynamic)


def test_compile_once_for_a_batch_marked_dynamic(dynamo: Any, device: torch.device) -> None:
    ours, theirs = twins(device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 9, 2):
            input = normal((rows, 3), torch.float64, device)
            dynamo.mark_dynamic(input, 0)
            torch.testing.assert_close(
                loss_and_gradients(compiled, input), loss_and_gradients(theirs, input)
            )


@pytest.fixture(params=[False, True], ids=["", "tables"])
def tables(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    """None, or one without a row, with which every call and backward looks into more."""
    use_tables({device: ()} if request.param else None)
    yield
    use_tables()


COMPILED_BACKWARD: dict[str, Function] = {
    "linear": fastlinear.Linear,
    "gelu": lambda *sizes: fastlinear.Linear(*sizes, activation="gelu"),
    "gated": fastlinear.GatedLinear,
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
@pytest.mark.parametrize("make", COMPILED_BACKWARD.values(), ids=COMPILED_BACKWARD)
@pytest.mark.usefixtures("tables")
def test_compiled_autograd_has_one_graph(make: Function, dynamo: Any, device: torch.device) -> None:
    from torch._dynamo import compiled_autograd

    layer = make(4, 3).to(device)
    input = torch.randn(5, 4, device=device, requires_grad=True)
    leaves = [input, *layer.parameters()]
    with fastlinear.use_backend("torch"):
        expected = torch.autograd.grad(layer(input).square().sum(), leaves)
    for _ in range(2):
        dynamo.reset()
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            layer(input).square().sum().backward()
    torch.testing.assert_close([leaf.grad / 2 for leaf in leaves], [*expected])


def test_compiled_autograd(dynamo: Any, device: torch.device) -> None:
    ours, theirs = twins(device)
    input = normal((4, 3), torch.float64, device)

    def backward(model: nn.Module, input: Tensor) -> None:
        model(input).square().sum().backward()

    with dynamo.config.patch(compiled_autograd=True):
        torch.compile(backward, backend="aot_eager")(ours, input)
    backward(theirs, input)
    torch.testing.assert_close(
        [parameter.grad for parameter in ours.parameters()],
        [parameter.grad for parameter in theirs.parameters()],
    )


def test_compile_model_converted_before(
    dynamo: Any, kernels_ran: Function, device: torch.device
) -> None:
    model = network(nn.Linear, device, torch.float64)
    reference = copy.deepcopy(model)
    fastlinear.convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = normal((4, 3), torch.float64, device)
    torch.testing.assert_close(
        loss_and_gradients(compiled, input), loss_and_gradients(reference, input)
    )
    assert kernels_ran()


@pytest.mark.parametrize("through", ["model", "compiled model"])
def test_compile_model_converted_and_reverted_after(
    through: str, dynamo: Any, kernels_ran: Function, device: torch.device
) -> None:
    model = network(nn.Linear, device, torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = normal((4, 3), torch.float64, device)
    converted = compiled if through == "compiled model" else model
    native = loss_and_gradients(compiled, input)
    assert not kernels_ran()
    assert len(fastlinear.convert(converted).converted) == 2
    torch.testing.assert_close(loss_and_gradients(compiled, input), native)
    assert kernels_ran()
    fastlinear.revert(converted)
    torch.testing.assert_close(loss_and_gradients(compiled, input), native)
    assert not kernels_ran()


def test_compile_follows_use_backend(
    dynamo: Any, kernels_ran: Function, device: torch.device
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    ours, theirs = twins(device)
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    input = normal((4, 3), torch.float64, device)
    native = loss_and_gradients(theirs, input)
    for backend in ("auto", "triton", "auto", "triton"):
        with fastlinear.use_backend(backend):
            torch.testing.assert_close(loss_and_gradients(compiled, input), native)
        assert kernels_ran() == (backend == "triton")
    assert counter.frame_count == 2  # once for each path, and both are kept


def test_compile_takes_use_backend_inside(
    dynamo: Any, kernels_ran: Function, device: torch.device
) -> None:
    def by_both(*operands: Tensor) -> Tensor:
        with fastlinear.use_backend("torch"):
            native = fastlinear.linear(*operands)
        return native - fastlinear.linear(*operands)

    compiled = torch.compile(by_both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*operands(device)), torch.zeros(4, 2, dtype=torch.float64, device=device)
    )
    assert kernels_ran()
    assert fastlinear.choice.backend.current == "triton"


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_compile_under_autocast(where: str, dynamo: Any, device: torch.device) -> None:
    ours, theirs = twins(device, torch.float32)

    def autocast(model: nn.Module) -> Function:
        def call(input: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return model(input)

        return call

    if where == "outside":
        compiled = autocast(torch.compile(ours, fullgraph=True, backend="aot_eager"))
    else:
        compiled = torch.compile(autocast(ours), fullgraph=True, backend="aot_eager")
    input = normal((4, 3), torch.float32, device).requires_grad_()
    output, reference = compiled(input), autocast(theirs)(input)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, reference, rtol=2e-2, atol=2e-2)
    parameters = [input, *ours.parameters()], [input, *theirs.parameters()]
    gradients, native = (
        torch.autograd.grad(result.float().square().sum(), of)
        for result, of in zip((output, reference), parameters, strict=True)
    )
    torch.testing.assert_close(gradients, native, rtol=5e-2, atol=5e-2)


def shifted(linear: Function) -> Function:
    """A function whose derivative is not the layer's alone: a part of it could get lost."""
    return lambda weight, input: (linear(input, weight) + weight.sum(1)).tanh()


COMPILED_TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda *operands: f(*operands).sum()),
    "per-sample grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda *operands: f(*operands).sum()), in_dims=(None, 0)
    ),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "jvp": lambda f: lambda *operands: torch.func.jvp(f, operands, operands),
    "hessian": torch.func.hessian,
}


@pytest.mark.parametrize("transform", COMPILED_TRANSFORMS.values(), ids=COMPILED_TRANSFORMS)
def test_compiled_transform(transform: Function, dynamo: Any, device: torch.device) -> None:
    input, weight, _ = operands(device, requires_grad=False)
    compiled = torch.compile(
        transform(shifted(fastlinear.linear)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(weight, input), transform(shifted(F.linear))(weight, input))


@pytest.mark.parametrize("name", ["grad", "per-sample grad", "jacrev", "jvp"])
def test_transform_of_a_compiled_function(name: str, dynamo: Any, device: torch.device) -> None:
    """Dynamo falls back to eager there, and must leave what is below the op alone."""
    transform = COMPILED_TRANSFORMS[name]
    input, weight, _ = operands(device, requires_grad=False)
    compiled = torch.compile(shifted(fastlinear.linear), backend="aot_eager")
    torch.testing.assert_close(
        transform(compiled)(weight, input), transform(shifted(F.linear))(weight, input)
    )
