"""What each rank runs in test_distributed.py: layers over several processes against `nn.Linear`.

The truth is always a model of `nn.Linear` in one process, with all of the data, in float64. The
environment has the ranks take backend "triton".
"""

import copy
import functools
import itertools
import math
import os
import random
import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import guards
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastlinear
import fastlinear.choice.backend
from fastlinear import _machine as machine
from fastlinear.kernels.launching import compiled_launch, launch
from fastlinear.tuning import tune

BATCH, SEQUENCE = 4, 8
FEATURES, HIDDEN = 6, 12

if launch.INTERPRETING:
    guards.make_interpreter_strict()


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    """A mesh of all ranks; of 2 of them, the pair that this rank is in."""
    if shape == (2,):
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "own"))["own"]
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor")[-len(shape) :])


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(given: Any, wanted: Tensor, what: object) -> None:
    """In float64, where sums in another order are the only difference."""
    torch.testing.assert_close(
        full(given), wanted, rtol=1e-9, atol=1e-10, msg=lambda message: f"{what}: {message}"
    )


# Ops over DTensors.


def placements_of(tensor: Tensor | None) -> list[Placement]:
    if tensor is None:
        return [Replicate()]
    return [Replicate(), Partial(), *(Shard(dim) for dim in range(tensor.ndim))]


def place(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """`tensor` placed so; partial values are unequal parts of it."""
    whole = [Replicate() if one.is_partial() else one for one in placements]
    local = distribute_tensor(tensor, mesh, whole).to_local()
    for dimension, one in enumerate(placements):
        if one.is_partial():
            rank, size = mesh.get_local_rank(dimension), mesh.size(dimension)
            local = local * (3 if rank == 0 else -2 / (size - 1))
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def op_over_shards(
    name: str,
    shapes: Sequence[Sequence[int] | None],
    options: Sequence[Any],
    rows: dict[str, tuple[str, str]],
    seed: int,
) -> None:
    """The op gives the same over sharded operands as over whole ones.

    Operands that lie as a row says are not moved, and give outputs that lie as it says, if it says
    so: the placements of either are written as letters or dimensions, "R", "P", "0". Of all other
    ways to place them a few are tried, on meshes of one dimension and of two.
    """
    op = getattr(torch.ops.fastlinear, name).default
    generator = torch.Generator().manual_seed(seed)
    operands = [
        None if shape is None else torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in shapes
    ]
    wanted = op(*operands, *options)

    mesh = mesh_of(dist.get_world_size())
    for row, (given, results) in rows.items():
        placements = [[_placement(letter)] for letter in given.split()]
        placed = _place_all(operands, mesh, placements)
        with CommDebugMode() as communication:
            outputs = op(*placed, *options)
        if results:
            assert communication.get_total_counts() == 0, row
            found = (outputs,) if isinstance(outputs, Tensor) else outputs
            lie = [output.placements for output in found]
            assert lie == [(_placement(letter),) for letter in results.split()], row
        _assert_equal_outputs(outputs, wanted, row)

    pick = random.Random(seed)
    for mesh_shape in ((4,), (2, 2), (2, 2)):
        placements = [
            [pick.choice(placements_of(operand)) for _ in mesh_shape] for operand in operands
        ]
        outputs = op(*_place_all(operands, mesh_of(*mesh_shape), placements), *options)
        _assert_equal_outputs(outputs, wanted, f"operands placed as {placements}")


def _placement(letter: str) -> Placement:
    return {"R": Replicate(), "P": Partial()}.get(letter) or Shard(int(letter))


def _place_all(
    operands: Sequence[Tensor | None], mesh: DeviceMesh, placements: Sequence[Sequence[Placement]]
) -> list[DTensor | None]:
    return [
        None if operand is None else place(operand, mesh, one)
        for operand, one in zip(operands, placements, strict=True)
    ]


def _assert_equal_outputs(outputs: Any, wanted: Any, what: str) -> None:
    if isinstance(wanted, Tensor):
        outputs, wanted = (outputs,), (wanted,)
    for index, (output, one) in enumerate(zip(outputs, wanted, strict=True)):
        assert output.shape == one.shape, f"output {index} of {what}"
        assert_equal(output, one, f"output {index} of {what}")


# Models.


class MLP(nn.Module):
    """Two layers, of nn.Linear or of fastlinear.Linear, with an activation fused or not."""

    def __init__(
        self, layer: type[nn.Linear], activation: str | None = None, *, again: bool = False
    ) -> None:
        super().__init__()
        self.again = again  # computes activations again in backward, instead of keeping them
        fused = {} if activation is None else {"activation": activation}
        self.norm = nn.LayerNorm(FEATURES, dtype=torch.float64)
        self.up = layer(FEATURES, HIDDEN, dtype=torch.float64, **fused)
        self.down = layer(HIDDEN, FEATURES, dtype=torch.float64)
        self.activate = F.gelu if activation is None else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        if self.again:
            return checkpoint(self._compute, input, use_reentrant=False)
        return self._compute(input)

    def _compute(self, input: Tensor) -> Tensor:
        return self.down(self.activate(self.up(self.norm(input))))


def truth_and_copy(seed: int, activation: str | None = None) -> tuple[MLP, MLP, Tensor]:
    """The same MLP of nn.Linear and of fastlinear.Linear, and an input, on every rank."""
    torch.manual_seed(seed)
    truth = MLP(nn.Linear)
    model = MLP(fastlinear.Linear, activation)
    model.load_state_dict(truth.state_dict())
    return truth, model, torch.randn(BATCH, SEQUENCE, FEATURES, dtype=torch.float64)


def objective(output: Tensor) -> Tensor:
    """The mean over datapoints, as what is averaged over ranks has to be."""
    return (output.sin().sum((1, 2)) + output.square().sum((1, 2))).mean()


def assert_like(truth: nn.Module, model: nn.Module, prefix: str = "") -> None:
    """Every gradient is the truth's; `prefix` is what a wrapper puts before names."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in truth.named_parameters():
        assert parameter.grad is not None
        assert_equal(gradients[prefix + name], parameter.grad, f"gradient of {name}")


def step(model: nn.Module, input: Tensor, *, compiled: bool = False) -> Tensor:
    """The loss, with gradients left in the parameters."""
    model.zero_grad()
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = objective(full(model(input)))
    loss.backward()
    return loss.detach()


def parallel(size: int, activation: str | None, sequence: bool, seed: int) -> None:
    """Column-wise, then row-wise; or besides with a norm that is sharded over the sequence."""
    truth, model, input = truth_and_copy(seed, activation)
    like_truth = copy.deepcopy(truth)
    expected = step(truth, input)
    mesh = mesh_of(size)
    styles: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence:
        styles = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        input = distribute_tensor(input, mesh, [Shard(1)])
    parallelize_module(like_truth, mesh, styles)
    parallelize_module(model, mesh, styles)
    with CommDebugMode() as of_truth:
        step(like_truth, input)
    for backend in ("triton", "auto"):
        with fastlinear.use_backend(backend):
            with CommDebugMode() as communication:
                assert_equal(step(model, input), expected, backend)
            assert_like(truth, model)
            assert communication.get_comm_counts() == of_truth.get_comm_counts(), backend
    assert_equal(step(model, input, compiled=True), expected, "compiled")
    assert_like(truth, model)


def assert_trains_like(
    truth: nn.Module, model: nn.Module, input: Tensor, mesh: DeviceMesh, prefix: str = ""
) -> None:
    """Where each rank of `mesh` has its own part of the datapoints."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.chunk(mesh.size())[mesh.get_local_rank()]

    step(truth, input)
    output = model(own(input))
    assert_equal(output, own(truth(input)), "output")
    objective(output).backward()
    assert_like(truth, model, prefix)


def sharded_and_parallel(seed: int, compiled: bool) -> None:
    """FSDP2 over one dimension of a mesh, tensor parallel over the other."""
    truth, model, input = truth_and_copy(seed, "gelu")
    mesh = mesh_of(2, 2)
    styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], styles)
    prefix = ""
    block: nn.Module = model
    if compiled:
        torch._dynamo.reset()
        block, prefix = torch.compile(model, backend="aot_eager"), "_orig_mod."
    fully_shard(block, mesh=mesh["data"])
    assert_trains_like(truth, block, input, mesh["data"], prefix)


def data_parallel(size: int, seed: int) -> None:
    truth, model, input = truth_and_copy(seed, "gelu")
    mesh = mesh_of(size)
    replica = DistributedDataParallel(model, process_group=mesh.get_group())
    assert_trains_like(truth, replica, input, mesh, "module.")


def fully_sharded(seed: int) -> None:
    """FSDP2 of a model that was made without memory, with its activations computed again."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = MLP(fastlinear.Linear, "gelu", again=True)
    mesh = mesh_of(dist.get_world_size())
    for part in (model.up, model.down, model):
        fully_shard(part, mesh=mesh)
    model.to_empty(device="cpu")
    for part in (model.norm, model.up, model.down):
        part.reset_parameters()
    truth = MLP(nn.Linear)
    truth.load_state_dict({name: full(value) for name, value in model.state_dict().items()})
    for layer in (truth.up, truth.down):
        for parameter in (layer.weight, layer.bias):
            assert 0 < parameter.abs().max() <= 1 / math.sqrt(layer.in_features)
    input = torch.randn(BATCH, SEQUENCE, FEATURES, dtype=torch.float64)
    dist.broadcast(input, 0)
    assert_trains_like(truth, model, input, mesh)


def mixed_precision(seed: int) -> None:
    """FSDP2 with parameters in bfloat16 and gradients summed in float32."""
    truth, model, input = truth_and_copy(seed, "gelu")
    step(truth, input)
    mesh = mesh_of(dist.get_world_size())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model.float()
    for part in (model.up, model.down, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    output = model(input.float().chunk(mesh.size())[mesh.get_local_rank()])
    assert output.dtype == torch.bfloat16
    objective(output.float()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in truth.named_parameters():
        assert gradients[name].dtype == torch.float32
        error = (full(gradients[name]) - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.1, name  # of 60 seeds, the largest was 0.03


def pipeline(schedule: str, seed: int) -> None:
    """A stage on each rank, four microbatches."""
    torch.manual_seed(seed)
    stages = dist.get_world_size()
    layers = [nn.Linear(FEATURES, FEATURES, dtype=torch.float64) for _ in range(stages)]
    truth = nn.Sequential(*itertools.chain(*((layer, nn.GELU()) for layer in layers)))
    input = torch.randn(BATCH, SEQUENCE, FEATURES, dtype=torch.float64)
    loss = step(truth, input)
    rank = dist.get_rank()
    layer = fastlinear.Linear(FEATURES, FEATURES, dtype=torch.float64, activation="gelu")
    layer.load_state_dict(layers[rank].state_dict())
    stage = PipelineStage(layer, rank, stages, torch.device("cpu"))
    kind = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[schedule]
    run = kind(stage, n_microbatches=4, loss_fn=lambda output, target: objective(output - target))
    losses: list[Tensor] = []
    if rank == 0:
        run.step(input)
    elif rank == stages - 1:
        run.step(target=torch.zeros_like(input), losses=losses)
        assert_equal(sum(losses) / 4, loss, "loss")
    else:
        run.step()
    assert_like(layers[rank], layer)


def resharded(seed: int, folder: str) -> None:
    """From nn.Linear on 2 ranks to fastlinear.Linear on 4, sharded both ways, and back."""
    truth, _, input = truth_and_copy(seed)
    rank, pair = dist.get_rank(), mesh_of(2)

    first = copy.deepcopy(truth)
    fully_shard(first, mesh=pair)
    if rank < 2:
        dcp.save(
            get_model_state_dict(first), checkpoint_id=folder + "/2", process_group=pair.get_group()
        )
    dist.barrier()

    second = MLP(fastlinear.Linear, "gelu")
    mesh = mesh_of(2, 2)
    styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(second, mesh["tensor"], styles)
    fully_shard(second, mesh=mesh["data"])
    state = get_model_state_dict(second)
    dcp.load(state, checkpoint_id=folder + "/2")
    set_model_state_dict(second, state)
    assert_equal(second(input), truth(input), "output on 4 ranks")
    dcp.save(get_model_state_dict(second), checkpoint_id=folder + "/4")

    third = MLP(nn.Linear)
    fully_shard(third, mesh=pair)
    state = get_model_state_dict(third)
    dcp.load(state, checkpoint_id=folder + "/4", process_group=pair.get_group())
    set_model_state_dict(third, state)
    for (name, value), wanted in zip(state.items(), truth.state_dict().values(), strict=True):
        assert torch.equal(full(value), wanted), name


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gated = fastlinear.GatedLinear(FEATURES, HIDDEN, dtype=torch.float64)
        self.down = fastlinear.Linear(HIDDEN, FEATURES, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        return self.down(self.gated(input))


class PlainGatedMLP(nn.Module):
    """The same of nn.Linear, under the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = nn.Module()
        self.gated.gate_proj = nn.Linear(FEATURES, HIDDEN, dtype=torch.float64)
        self.gated.up_proj = nn.Linear(FEATURES, HIDDEN, dtype=torch.float64)
        self.down = nn.Linear(HIDDEN, FEATURES, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        gated = self.gated
        return self.down(F.silu(gated.gate_proj(input)) * gated.up_proj(input))


def gated(seed: int) -> None:
    """A gated MLP, with its layers parallel as modules, and with sharded parameters alone."""
    torch.manual_seed(seed)
    truth, by_modules = PlainGatedMLP(), GatedMLP()
    by_modules.load_state_dict(truth.state_dict())
    by_parameters = copy.deepcopy(by_modules)
    input = torch.randn(BATCH, SEQUENCE, FEATURES, dtype=torch.float64)
    expected = step(truth, input)
    mesh = mesh_of(dist.get_world_size())

    up = {f"gated.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
    parallelize_module(by_modules, mesh, up | {"down": RowwiseParallel()})
    assert_equal(step(by_modules, input), expected, "by modules")
    assert_like(truth, by_modules)

    column_wise = {"weight": Shard(0), "bias": Shard(0)}
    row_wise = {"weight": Shard(1), "bias": Replicate()}
    for layer, placements in (
        (by_parameters.gated.gate_proj, column_wise),
        (by_parameters.gated.up_proj, column_wise),
        (by_parameters.down, row_wise),
    ):
        for name, placement in placements.items():
            sharded = distribute_tensor(getattr(layer, name).detach(), mesh, [placement])
            setattr(layer, name, nn.Parameter(sharded))
    whole = distribute_tensor(input, mesh, [Replicate()])
    hidden = by_parameters.gated(whole)  # outside of that mode, whose hooks would part the pair
    with CommDebugMode() as communication:
        hidden.backward(torch.ones_like(hidden))
    assert hidden.placements == (Shard(2),)
    assert communication.get_total_counts() == 0
    for parameter in by_parameters.gated.parameters():
        assert parameter.grad.placements == (Shard(0),)
    assert_equal(step(by_parameters, whole), expected, "by parameters")
    assert_like(truth, by_parameters)
    assert_equal(step(by_parameters, whole, compiled=True), expected, "compiled")
    assert_like(truth, by_parameters)


def batched(seed: int) -> None:
    """Four layers at once: each rank has one of them, or a part of all."""
    torch.manual_seed(seed)
    layers = [nn.Linear(FEATURES, HIDDEN, dtype=torch.float64) for _ in range(4)]
    input = torch.randn(4, SEQUENCE, FEATURES, dtype=torch.float64)
    output = torch.stack([layer(rows) for layer, rows in zip(layers, input, strict=True)])
    objective(output).backward()
    mesh = mesh_of(dist.get_world_size())
    for of_parameters, of_input, of_output in (
        (Shard(0), Shard(0), Shard(0)),
        (Shard(1), Replicate(), Shard(2)),
        (Replicate(), Shard(1), Shard(1)),
    ):
        batch = fastlinear.BatchedLinear.from_linears(layers)
        for name, parameter in list(batch.named_parameters()):
            sharded = distribute_tensor(parameter.detach(), mesh, [of_parameters])
            setattr(batch, name, nn.Parameter(sharded))
        found = batch(distribute_tensor(input, mesh, [of_input]))
        assert found.placements == (of_output,)
        assert_equal(found, output, of_parameters)
        objective(full(found)).backward()
        for name, parameter in batch.named_parameters():
            wanted = torch.stack([getattr(layer, name).grad for layer in layers])
            assert_equal(parameter.grad, wanted, f"gradient of {name}, {of_parameters}")


def waited_for(seed: int) -> None:
    """What a collective has not brought yet is an input like any other."""
    torch.manual_seed(seed)
    layer = fastlinear.Linear(FEATURES, HIDDEN, dtype=torch.float64)
    part = torch.randn(SEQUENCE, FEATURES, dtype=torch.float64)
    total = all_reduce(part, "sum", dist.group.WORLD)
    assert type(total) is not Tensor
    wanted = F.linear(dist.get_world_size() * part, layer.weight, layer.bias)
    assert_equal(layer(total), wanted, "output")


def go_by_tables(folder: str, device: str) -> tuple[list[tuple[str, int]], list[float]]:
    """Kernels, each with its BLOCK_M, and results of a step in "auto", with this rank's own tables.

    Those lie in the subfolder of its number. They are for `device`, a name that no tables have been
    agreed upon for yet.
    """
    os.environ["FASTLINEAR_CACHE"] = os.path.join(folder, str(dist.get_rank()))
    launched: list[tuple[str, int]] = []

    def spy(kernel: Any, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:
        launched.append((kernel.__name__, plan.constants["TILE"].M))
        compiled_launch.run(kernel, plan, pointers)

    generator = torch.Generator().manual_seed(0)
    with (
        fastlinear.use_backend("auto"),
        mock.patch.object(machine, "INTERPRETER", device),
        mock.patch.object(launch, "run", spy),
    ):
        fastlinear.choice.backend.use_tables()
        layer = fastlinear.Linear(FEATURES, HIDDEN)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
        input = torch.randn(BATCH, FEATURES, generator=generator)
        if dist.get_rank():  # the first is first to ask
            dist.barrier()
        with torch.no_grad():
            output = layer(input)
        if not dist.get_rank():
            dist.barrier()
    fastlinear.choice.backend.use_tables()
    return launched, output.flatten().tolist()


def tuned(folder: str, device: str) -> tuple[bool, str, bool]:
    """Whether this rank has measured, the way of a layer then, and whether it has a table of it."""
    os.environ["FASTLINEAR_CACHE"] = own = os.path.join(folder, str(dist.get_rank()))
    asked: list[str] = []

    def measure(calls: dict[str, Any], clock: str) -> dict[str, list[float]]:
        asked.append(clock)
        slow = ("pytorch", "onednn")
        return {name: [2.0 if name in slow else 1.0] * 3 for name in calls}

    with (
        fastlinear.use_backend("auto"),
        mock.patch.object(machine, "INTERPRETER", device),
        mock.patch.object(tune, "CpuStopwatch", return_value=measure),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # that it is another rank's table
        fastlinear.choice.backend.use_tables()
        layer = fastlinear.Linear(FEATURES, HIDDEN)
        (call,) = fastlinear.tune(layer, torch.randn(BATCH, FEATURES), seconds=30).calls
    fastlinear.choice.backend.use_tables()
    return bool(asked), call.way, os.path.exists(own)


def main_grad_of_shards(seed: int) -> None:
    """A weight that is sharded is refused: its gradient is for an op to compute."""
    torch.manual_seed(seed)
    layer = fastlinear.Linear(FEATURES, HIDDEN, accumulate_into_main_grad=True)
    parallelize_module(layer, mesh_of(dist.get_world_size()), ColwiseParallel())
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    with pytest.raises(TypeError, match="takes plain tensors, but input is a DTensor"):
        layer(torch.randn(BATCH, FEATURES))
