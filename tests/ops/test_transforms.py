"""What PyTorch does to a call of `fastlinear.linear`, through the kernels.

Compiling, exporting and tracing it, transforming it by torch.func, checkpointing, autocast,
counting and capturing. The reference is PyTorch's linear layer under the same transform.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import normal
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastlinear
from fastlinear.choice.backend import use_tables
from fastlinear.kernels.launching import launch
from fastlinear.ops.linear import linear_backward_op, linear_op

pytestmark = pytest.mark.usefixtures("triton_backend")

Function = Callable[..., Any]


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """torch._dynamo, which has compiled nothing yet."""
    import torch._dynamo

    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.fixture
def cpp_compiler() -> None:
    """What inductor needs: on a CPU it writes C++."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("inductor finds no C++ compiler")


@pytest.fixture(params=["eager", "aot_eager", "inductor"])
def compiler(request: pytest.FixtureRequest, dynamo: Any) -> str:
    """The name of a backend of torch.compile."""
    if request.param == "inductor":
        request.getfixturevalue("cpp_compiler")
    return request.param


@pytest.fixture
def plain_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels write to plain tensors, not to the suite's guarded ones."""
    monkeypatch.setattr(
        launch,
        "allocate",
        lambda like, output: like.new_empty(output.shape, dtype=output.dtype),
    )


@pytest.fixture
def kernels_ran(monkeypatch: pytest.MonkeyPatch) -> Function:
    """Says whether a kernel has run since it was last asked."""
    outputs: list[tuple[int, ...]] = []
    allocate = launch.allocate

    def recording(like: Tensor, output: launch.Operand) -> Tensor:
        outputs.append(output.shape)
        return allocate(like, output)

    def since_last_asked() -> bool:
        ran = bool(outputs)
        outputs.clear()
        return ran

    monkeypatch.setattr(launch, "allocate", recording)
    return since_last_asked


class Ops(TorchDispatchMode):
    """Records the names of the ops that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        self.called.append(str(op))
        return op(*arguments, **(keywords or {}))


def operands(device: torch.device, *, requires_grad: bool = True) -> list[Tensor]:
    """input (4, 3), weight (2, 3), bias (2,), in float64."""
    shapes = ((4, 3), (2, 3), (2,))
    return [normal(shape, torch.float64, device).requires_grad_(requires_grad) for shape in shapes]


def network(linear: type[nn.Linear], device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(linear(3, 5), nn.GELU(), linear(5, 2)).to(device, dtype)


def twins(
    device: torch.device, dtype: torch.dtype = torch.float64
) -> tuple[nn.Sequential, nn.Sequential]:
    """One network of `fastlinear.Linear`, and the same of `nn.Linear`."""
    ours, theirs = network(fastlinear.Linear, device, dtype), network(nn.Linear, device, dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def loss_and_gradients(model: nn.Module, input: Tensor) -> tuple[Tensor, ...]:
    loss = model(input).square().sum()
    return loss, *torch.autograd.grad(loss, tuple(model.parameters()))


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


# torch.export

# pickle makes a leaf of the tree that torch.export writes, in the way that torch has deprecated.
OLD_LEAVES = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")


def exported(model: nn.Module, device: torch.device, *, strict: bool) -> Any:
    return torch.export.export(
        model,
        (normal((4, 3), torch.float64, device),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        strict=strict,
    )


def targets(graph: torch.fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes]


@OLD_LEAVES
# torch 2.11 reads the archive into tensors that it does not write to.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_saves_loads_and_decomposes(
    strict: bool, dynamo: Any, tmp_path: Path, kernels_ran: Function, device: torch.device
) -> None:
    ours, theirs = twins(device)
    program = exported(ours, device, strict=strict)
    assert targets(program.graph).count(linear_op) == 2
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    for version in (program, loaded, loaded.run_decompositions()):
        for rows in (4, 7):
            input = normal((rows, 3), torch.float64, device)
            torch.testing.assert_close(version.module()(input), theirs(input))
        assert kernels_ran()
    input = normal((5, 3), torch.float64, device)
    torch.testing.assert_close(
        loss_and_gradients(loaded.module(), input), loss_and_gradients(theirs, input)
    )


@OLD_LEAVES
@pytest.mark.usefixtures("cpp_compiler")
def test_export_compiled_ahead_of_time(
    dynamo: Any, tmp_path: Path, kernels_ran: Function, device: torch.device
) -> None:
    """The package calls the op by its name, so it runs where fastlinear has been imported."""
    ours, theirs = twins(device)
    with torch.no_grad():
        program = exported(ours, device, strict=False)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        compiled = torch._inductor.aoti_load_package(package)
        for rows in (4, 7):
            input = normal((rows, 3), torch.float64, device)
            torch.testing.assert_close(compiled(input), theirs(input))
            assert kernels_ran()


# torch.fx


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_the_ops(mode: str, dynamo: Any, device: torch.device) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradients(linear: Function) -> Function:
        def of(input: Tensor, weight: Tensor, bias: Tensor) -> Any:
            output = linear(input, weight, bias)
            return output, torch.autograd.grad(output.square().sum(), (input, weight, bias))

        return of

    graph = make_fx(gradients(fastlinear.linear), tracing_mode=mode)(*operands(device))
    assert targets(graph.graph).count(linear_op) == 1
    assert targets(graph.graph).count(linear_backward_op) == 1
    input, weight, bias = operands(device)
    if mode == "symbolic":
        input = normal((7, 3), torch.float64, device).requires_grad_()
    torch.testing.assert_close(graph(input, weight, bias), gradients(F.linear)(input, weight, bias))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_symbolic_trace_has_one_call_a_layer(
    activation: str | None, kernels_ran: Function, device: torch.device
) -> None:
    ours, theirs = twins(device)
    ours[0].activation = activation
    traced = torch.fx.symbolic_trace(ours)
    assert targets(traced.graph).count(fastlinear.linear) == 2
    if activation is not None:
        theirs.insert(1, nn.SiLU())
    input = normal((4, 3), torch.float64, device)
    for graph in (traced, pickle.loads(pickle.dumps(traced)), copy.deepcopy(traced)):
        torch.testing.assert_close(
            loss_and_gradients(graph, input), loss_and_gradients(theirs, input)
        )
        assert kernels_ran()
    with fastlinear.use_backend("torch"):
        torch.testing.assert_close(traced(input), theirs(input))
    assert not kernels_ran()


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


# Activation checkpointing


def trained(model: nn.Module, input: Tensor, **how: Any) -> tuple[list[Tensor], list[str]]:
    """(output and gradients, names of ops) of one step, checkpointed as `how` says."""
    model.zero_grad()
    input = input.detach().clone().requires_grad_()
    with Ops() as ops:
        output = checkpoint(model, input, **how) if how else model(input)
        output.double().square().sum().backward()
    gradients = [tensor.grad for tensor in (input, *model.parameters())]
    return [output, *gradients], ops.called  # type: ignore[list-item]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("preserve_rng_state", [True, False], ids=["with dropout", "without"])
def test_checkpoint_recomputes_the_same(
    use_reentrant: bool, preserve_rng_state: bool, seed: int, device: torch.device
) -> None:
    ours, theirs = twins(device)
    input = normal((8, 3), torch.float64, device)
    how = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state}
    results = []
    for model in (ours, theirs):
        if preserve_rng_state:
            model.insert(1, nn.Dropout())
        torch.manual_seed(seed)
        results.append(trained(model, input, **how))
    (ours_trained, ops), (theirs_trained, _) = results
    torch.testing.assert_close(ours_trained, theirs_trained)
    assert ops.count("fastlinear.linear.default") > 2


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint_recomputes_under_autocast(use_reentrant: bool, device: torch.device) -> None:
    model, _ = twins(device, torch.float32)
    input = normal((8, 3), torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        ours, _ = trained(model, input, use_reentrant=use_reentrant)
        plain, _ = trained(model, input)
    assert ours[0].dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_checkpoint_policy_saves_the_op(device: torch.device) -> None:
    def policy(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        if op == torch.ops.fastlinear.linear.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    model, reference = twins(device)
    model.append(nn.GELU())
    reference.append(nn.GELU())
    input = normal((4, 3), torch.float64, device)
    ours, ops = trained(
        model,
        input,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    torch.testing.assert_close(ours, trained(reference, input)[0])
    assert ops.count("fastlinear.linear.default") == 2
    assert ops.count("aten.gelu.default") > 2  # recomputed, from what was saved


# Autocast

MIXTURES = {
    "all float32": (torch.float32, torch.float32, torch.float32),
    "no bias": (torch.float32, torch.float32, None),
    "bfloat16 weight": (torch.float32, torch.bfloat16, torch.float32),
    "half input, bfloat16 weight": (torch.float16, torch.bfloat16, torch.float32),
    "bfloat16 input and bias": (torch.bfloat16, torch.float32, torch.bfloat16),
    "all float64": (torch.float64, torch.float64, torch.float64),
    "float64 input": (torch.float64, torch.float32, torch.float32),
    "float64 input, no bias": (torch.float64, torch.float32, None),
    "float64 weight": (torch.float32, torch.float64, torch.float32),
    "float64 bias": (torch.float32, torch.float32, torch.float64),
}
LOW_PRECISION = [torch.float16, torch.bfloat16]


def mixed(dtypes: tuple[torch.dtype | None, ...], device: torch.device) -> list[Tensor]:
    return [
        normal(shape, torch.float64, device).to(dtype).requires_grad_()
        for shape, dtype in zip(((4, 5), (3, 5), (3,)), dtypes, strict=True)
        if dtype is not None
    ]


def assert_close_in(dtype: torch.dtype, ours: Any, theirs: Any) -> None:
    """Close as results are that were rounded to `dtype` on the way; dtypes are equal."""
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtypes", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("autocast", LOW_PRECISION, ids=str)
def test_autocast_takes_dtypes_as_pytorch_does(
    dtypes: tuple[torch.dtype | None, ...], autocast: torch.dtype, device: torch.device
) -> None:
    inputs = mixed(dtypes, device)

    def step(linear: Function) -> Any:
        try:
            with torch.autocast(device.type, autocast):
                output = linear(*inputs)
        except RuntimeError as error:
            return str(error)
        return output, torch.autograd.grad(output.sum(), inputs)

    ours, theirs = step(fastlinear.linear), step(F.linear)
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        assert_close_in(autocast, ours, theirs)


@pytest.mark.parametrize("cache_enabled", [True, False], ids=["cached casts", "no cache"])
def test_autocast_regions_nest(cache_enabled: bool, device: torch.device) -> None:
    inputs = mixed((torch.float32,) * 3, device)
    # Casts of these are not cached: the cache does not tell one dtype of autocast from another.
    detached = [tensor.detach() for tensor in inputs]

    def regions(linear: Function) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=cache_enabled):
            outputs = [linear(*inputs), linear(*inputs)]
            with torch.autocast(device.type, enabled=False):
                outputs.append(linear(*inputs))
                with torch.autocast(device.type, torch.float16, cache_enabled=cache_enabled):
                    outputs.append(linear(*detached))
            outputs.append(linear(*inputs))
        outputs.append(linear(*inputs))
        return outputs

    ours, theirs = regions(fastlinear.linear), regions(F.linear)
    dtypes = ["bfloat16", "bfloat16", "float32", "float16", "bfloat16", "float32"]
    assert [str(output.dtype) for output in ours] == [f"torch.{dtype}" for dtype in dtypes]
    assert_close_in(torch.bfloat16, ours, theirs)
    gradients, native = (
        torch.autograd.grad(sum(output.float().sum() for output in outputs), inputs)
        for outputs in (ours, theirs)
    )
    assert_close_in(torch.bfloat16, gradients, native)


@pytest.mark.parametrize("autocast", LOW_PRECISION, ids=str)
def test_autocast_of_per_sample_gradients(autocast: torch.dtype, device: torch.device) -> None:
    inputs = [tensor.detach() for tensor in mixed((torch.float32,) * 3, device)]

    def per_sample(linear: Function) -> Any:
        gradient = torch.func.grad(lambda *a: linear(*a).square().sum(), argnums=(0, 1, 2))
        with torch.autocast(device.type, autocast):
            return torch.func.vmap(gradient, in_dims=(0, None, None))(*inputs)

    assert_close_in(autocast, per_sample(fastlinear.linear), per_sample(F.linear))


@pytest.mark.parametrize("cast_inputs", [None, torch.float32], ids=["as is", "cast to float32"])
def test_autocast_within_custom_fwd(cast_inputs: torch.dtype | None, device: torch.device) -> None:
    def doubled(linear: Function) -> Any:
        class Doubled(torch.autograd.Function):
            @staticmethod
            @torch.amp.custom_fwd(device_type=device.type, cast_inputs=cast_inputs)
            def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
                ctx.save_for_backward(input, weight)
                return 2 * linear(input, weight)

            @staticmethod
            @torch.amp.custom_bwd(device_type=device.type)
            def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
                input, weight = ctx.saved_tensors
                return linear(2 * grad_output, weight.mT), linear(2 * grad_output.mT, input.mT)

        inputs = [tensor.detach().requires_grad_() for tensor in (input, weight)]
        with torch.autocast(device.type, torch.bfloat16):
            output = Doubled.apply(*inputs)
        return output, torch.autograd.grad(output.sum(), inputs)

    input, weight = mixed((torch.float32, torch.float32, None), device)
    ours = doubled(fastlinear.linear)
    assert ours[0].dtype == (cast_inputs or torch.bfloat16)
    assert_close_in(torch.bfloat16, ours, doubled(F.linear))


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_autocast_is_registered_for(key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlinear::linear", key)


# Tensors without data, and what watches ops


def test_fake_tensors_have_the_shapes_of_nn_linear(device: torch.device) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        layer = fastlinear.Linear(3, 2, dtype=torch.bfloat16, device=device)
        input = torch.empty(7, 4, 3, dtype=torch.bfloat16, device=device, requires_grad=True)
        output = layer(input)
        assert isinstance(output, FakeTensor)
        reference = F.linear(input, layer.weight, layer.bias)
        gradients = torch.autograd.grad(output.sum(), (input, *layer.parameters()))
        for ours, theirs in zip(
            (output, *gradients), (reference, input, *layer.parameters()), strict=True
        ):
            assert (ours.shape, ours.dtype, ours.device) == (
                theirs.shape,
                theirs.dtype,
                theirs.device,
            )
        assert output.stride() == reference.stride()


def test_meta_tensors_have_the_shapes_of_nn_linear() -> None:
    layer = fastlinear.Linear(3, 2, device="meta")
    input = torch.empty(7, 4, 3, device="meta", requires_grad=True)
    output = layer(input)
    output.sum().backward()
    assert (output.device.type, output.shape, output.stride()) == ("meta", (7, 4, 2), (8, 2, 1))
    for tensor in (input, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.is_meta
        assert tensor.grad.shape == tensor.shape


def test_flop_counter_counts_each_module_as_nn_linear(device: torch.device) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def count(model: nn.Module) -> dict[str, int]:
        with FlopCounterMode(display=False) as counter:
            model(input).sum().backward()
        return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    input = normal((4, 3), torch.float64, device)
    ours, theirs = map(count, twins(device))
    assert ours == theirs
    assert ours["Sequential.0"] == 2 * 2 * 4 * 3 * 5  # its input needs no gradient
    assert ours["Sequential.2"] == 3 * 2 * 4 * 5 * 2


def test_dispatch_mode_sees_each_op_once(device: torch.device) -> None:
    layer = fastlinear.Linear(3, 2, dtype=torch.float64, device=device)
    input = normal((4, 3), torch.float64, device)
    with Ops() as ops:
        output = layer(input)
        assert [op for op in ops.called if "linear" in op] == ["fastlinear.linear.default"]
        output.sum().backward()
    assert [op for op in ops.called if "linear" in op] == [
        "fastlinear.linear.default",
        "fastlinear.linear_backward.default",
    ]


def test_profiler_shows_each_op_once(device: torch.device) -> None:
    from torch.profiler import ProfilerActivity, profile

    layer = fastlinear.Linear(3, 2, dtype=torch.float64, device=device)
    input = normal((4, 3), torch.float64, device)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        layer(input).sum().backward()
        with torch.no_grad():
            layer(input)

    def is_within_itself(event: Any) -> bool:
        parent = event.cpu_parent
        while parent is not None and parent.name != event.name:
            parent = parent.cpu_parent
        return parent is not None

    # With a gradient the op is called again below autograd.
    names = [event.name for event in profiler.events() if not is_within_itself(event)]
    assert names.count("fastlinear::linear") == 2
    assert names.count("fastlinear::linear_backward") == 1


def test_benchmark_timer_times_the_kernels(kernels_ran: Function, device: torch.device) -> None:
    from torch.utils.benchmark import Timer

    layer = fastlinear.Linear(3, 2, device=device)
    input = normal((4, 3), torch.float32, device)
    timed = Timer("layer(input)", globals={"layer": layer, "input": input}).timeit(2)
    assert timed.mean > 0
    assert kernels_ran()


# CUDA graphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def warmed_up(step: Function) -> None:
    """Runs `step` on a stream of its own, as what is to be captured must have been run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("plain_outputs")  # guards would be written by the graph, again and again
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_cuda_graph_of_a_forward_replays(dtype: torch.dtype, device: torch.device) -> None:
    model = network(fastlinear.Linear, device, dtype)
    input = normal((40, 3), dtype, device)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        warmed_up(lambda: model(input))
        with torch.cuda.graph(graph):
            output = model(input)
        for _ in range(2):
            input.copy_(torch.randn_like(input))
            graph.replay()
            torch.testing.assert_close(output, model(input.clone()))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("plain_outputs")
@pytest.mark.parametrize("rows", [40, 5000], ids=["one sum", "split sums"])
def test_cuda_graph_of_a_training_step_replays(rows: int, device: torch.device) -> None:
    model = network(fastlinear.Linear, device, torch.float32)
    eager = copy.deepcopy(model)
    input = normal((rows, 3), torch.float32, device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input).square().mean().backward()

    warmed_up(step)
    # Gradients that are None when the capture starts are the graph's own, and each replay
    # overwrites them.
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(input).square().mean().backward()
    for _ in range(2):
        input.copy_(torch.randn_like(input))
        graph.replay()
        eager.zero_grad(set_to_none=True)
        eager(input.clone()).square().mean().backward()
        torch.testing.assert_close(
            [parameter.grad for parameter in model.parameters()],
            [parameter.grad for parameter in eager.parameters()],
        )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("plain_outputs")
def test_compiled_with_cuda_graphs_trains_as_eager(device: torch.device) -> None:
    """With split sums, the counters of which outlive a call."""
    model = network(fastlinear.Linear, device, torch.float32)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(4):  # run, captured and replayed
        input = torch.randn(5000, 3, device=device)
        torch.compiler.cudagraph_mark_step_begin()
        for one in (compiled, eager):
            one.zero_grad(set_to_none=True)
            one(input).square().mean().backward()
        torch.testing.assert_close(
            [parameter.grad for parameter in model.parameters()],
            [parameter.grad for parameter in eager.parameters()],
        )


@pytest.mark.gpu
@needs_gpu
# torch's own warm-up and capture are on two streams.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@pytest.mark.usefixtures("plain_outputs")
def test_cuda_graphed_callable_trains_as_eager(device: torch.device) -> None:
    model = network(fastlinear.Linear, device, torch.float32)
    eager = copy.deepcopy(model)
    sample = torch.randn(40, 3, device=device, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(model, (sample,))
    for _ in range(2):
        input = torch.randn(40, 3, device=device, requires_grad=True)
        ours, theirs = (call(input).square().mean() for call in (graphed, eager))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, (input, *model.parameters())),
            torch.autograd.grad(theirs, (input, *eager.parameters())),
        )
