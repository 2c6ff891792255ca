"""Exported and traced calls: torch.export, AOTInductor, make_fx and torch.fx."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Function, loss_and_gradients, operands, targets, twins
from oracle import normal
from torch import Tensor, nn

import fastlinear
from fastlinear.ops.linear import linear_backward_op, linear_op

pytestmark = pytest.mark.usefixtures("triton_backend")


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
