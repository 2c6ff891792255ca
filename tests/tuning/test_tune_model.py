"""`fastlinear.tune`: what it notes of a model, measures, and leaves as it was."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_up import Clocks, converted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlinear
from fastlinear import _machine as machine
from fastlinear.choice import known, table
from fastlinear.choice.table import PYTORCH
from fastlinear.kernels.launching import launch
from fastlinear.tuning import tune
from fastlinear.tuning.record import record
from fastlinear.tuning.stopwatch import CpuStopwatch

pytestmark = pytest.mark.skipif(not launch.INTERPRETING, reason="the clocks are made up")


class Block(nn.Module):
    """Layers of several kinds, a buffer that moves, a gradient that is blocked."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.again = nn.Linear(16, 32)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.calls = self.calls + 1
        hidden = F.gelu(self.up(input)) + self.again(input)
        return self.frozen(self.drop(self.norm(self.down(hidden))))


def of(tuned: fastlinear.Tuned, layer: str) -> Any:
    (call,) = [call for call in tuned.calls if layer in call.layers]
    return call


def test_each_distinct_call_is_measured_once(clocks: Clocks) -> None:
    model = converted(Block()).eval()
    with torch.no_grad():
        tuned = fastlinear.tune(model, torch.randn(6, 16))
    assert len(tuned.calls) == 3
    up = of(tuned, "up")
    assert up.layers == ("up", "again")
    assert (up.in_features, up.out_features, up.rows, up.calls) == (16, 32, 6, 2)
    assert (up.pytorch_us, up.us, up.way) == (2.0, 1.0, "kernel")
    assert (tuned.pytorch_ms, tuned.ms) == (0.008, 0.004)
    assert tuned.finished
    assert tuned.table is not None
    measured = {(row.product, row.n, row.k, row.m) for row in table.read(tuned.table).rows}
    assert measured == {("output", 32, 16, 8), ("output", 16, 32, 8), ("output", 16, 16, 8)}
    said = str(tuned)
    assert "up and 1 more" in said
    assert "0.008 ms by PyTorch, 0.004 ms now, 2.00 times as fast" in said
    with torch.no_grad():
        assert fastlinear.explain(model.up, torch.randn(5, 16)).path == "fastlinear.kernels"

    asked = clocks.asked
    with torch.no_grad():
        assert fastlinear.tune(model, torch.randn(7, 16)).calls[0].us == 1.0
    assert clocks.asked == asked, "measured already"


def test_training_is_measured_with_its_gradients(clocks: Clocks) -> None:
    model = converted(Block())
    tuned = fastlinear.tune(model, torch.randn(6, 16))
    assert tuned.table is not None
    wanted = {
        (row.n, row.k, row.wanted)
        for row in table.read(tuned.table).rows
        if row.product == "training"
    }
    assert wanted == {
        (32, 16, "weight bias"),
        (16, 32, "input weight"),
        (16, 16, "input"),
    }


def test_a_thousand_layers_are_measured_as_one(clocks: Clocks) -> None:
    model = converted(nn.Sequential(*(nn.Linear(8, 8) for _ in range(1000)))).eval()
    with torch.no_grad():
        tuned = fastlinear.tune(model, torch.randn(4, 8))
    assert [call.calls for call in tuned.calls] == [1000]
    assert len(table.read(tuned.table).rows) == 1  # type: ignore[arg-type]


def test_batches_count_as_powers_of_two(clocks: Clocks) -> None:
    layer = converted(nn.Sequential(nn.Linear(8, 8))).eval()

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, input: Tensor) -> list[Tensor]:
            return [self.layer(input[:rows]) for rows in range(1, 513)]

    with torch.no_grad():
        tuned = fastlinear.tune(Many(), torch.randn(512, 8))
    assert sorted(row.m for row in table.read(tuned.table).rows) == [  # type: ignore[arg-type]
        2**power for power in range(10)
    ]


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "ids": [id(one) for one in (*model.parameters(), *model.buffers())],
        "grads": [None if one.grad is None else one.grad.clone() for one in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_model_is_as_before(training: bool, clocks: Clocks) -> None:
    model, input = converted(Block()).train(training), torch.randn(6, 16, requires_grad=True)
    model(input).sum().backward()
    model.frozen.eval()  # a mode of its own
    model.again.weight.grad = None
    before = state_of(model)
    given = input.grad
    assert given is not None
    kept = given.clone()
    fastlinear.tune(model, input)
    assert input.grad is given
    assert torch.equal(given, kept)
    after = state_of(model)
    for name in ("state", "grads"):
        torch.testing.assert_close(after.pop(name), before.pop(name), rtol=0, atol=0)
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert after == before


def test_optimizer_that_steps_within_backward_does_not(clocks: Clocks) -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda one: optimizer.step())
    before = copy.deepcopy(model.state_dict())
    fastlinear.tune(model, torch.randn(4, 8))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model(torch.randn(4, 8)).sum().backward()
    assert not torch.equal(model[0].weight, before["0.weight"]), "the hook is there again"


def test_main_grad_is_as_before(clocks: Clocks) -> None:
    layer = fastlinear.Linear(8, 8, accumulate_into_main_grad=True)
    layer.weight.main_grad = torch.ones(8, 8)  # type: ignore[attr-defined]
    tuned = fastlinear.tune(nn.Sequential(layer), torch.randn(4, 8))
    assert torch.equal(layer.weight.main_grad, torch.ones(8, 8))  # type: ignore[attr-defined]
    assert len(tuned.calls) == 1


def test_buffers_of_every_kind_are_put_back(clocks: Clocks) -> None:
    model = converted(Block())
    model.register_buffer("wide", torch.zeros(1).expand(8))
    model.register_buffer("whole", torch.arange(3))
    with torch.inference_mode():
        model.register_buffer("frozen_in", torch.ones(3))
    model.script = torch.jit.script(nn.ReLU())
    model.up.weight.main_grad = None  # type: ignore[attr-defined]
    bucket = torch.ones(2, 16, 16)
    model.frozen.requires_grad_(True)
    model.frozen.weight.grad = bucket[0]
    pending = (model.norm.running_mean * torch.ones(16, requires_grad=True)).sum()
    model.norm.eval()
    before = state_of(model)
    fastlinear.tune(model, torch.randn(6, 16))
    for name in ("state", "grads"):
        torch.testing.assert_close(state_of(model)[name], before[name], rtol=0, atol=0)
    assert model.frozen.weight.grad.data_ptr() == bucket.data_ptr()
    pending.backward()  # nothing that it has saved counts as changed


def test_what_raises_leaves_the_model_as_it_was(clocks: Clocks) -> None:
    class Fails(Block):
        def forward(self, input: Tensor) -> Tensor:
            super().forward(input)
            raise RuntimeError("out of luck")

    model = converted(Fails())
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        fastlinear.tune(model, torch.randn(6, 16))
    assert torch.equal(model.calls, before["state"]["calls"])
    assert not fastlinear.functional.observers


def test_calls_of_every_kind_are_noted(clocks: Clocks) -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many = fastlinear.BatchedLinear(2, 8, 8)
            self.gated = fastlinear.GatedLinear(8, 8)
            self.layer = fastlinear.Linear(8, 8, activation="relu")
            self.left = nn.Linear(8, 8)

        def forward(self, input: Tensor) -> Tensor:
            hidden = checkpoint(self.layer, self.gated(input), use_reentrant=False)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.layer(hidden)
            return self.left(self.many(hidden.float().expand(2, -1, -1)))

    tuned = fastlinear.tune(Kinds(), torch.randn(4, 8))
    kinds = {(call.op, call.dtype, call.activation): call for call in tuned.calls}
    assert set(kinds) == {
        ("linear", "float32", "relu"),
        ("linear", "bfloat16", "relu"),
        ("batched_linear", "float32", None),
        ("linear", "float32", "silu"),
        ("linear", "float32", None),
    }
    assert kinds["linear", "float32", "relu"].calls == 2, "computed again in backward"
    assert kinds["linear", "float32", "silu"].layers == ("gated.gate_proj",)
    assert kinds["linear", "float32", None].layers == ("gated.up_proj",)
    assert kinds["batched_linear", "float32", None].way.startswith("not measured")
    assert tuned.not_converted == 1
    assert "1 nn.Linear not converted" in str(tuned)


def test_compiled_models_are_noted(clocks: Clocks) -> None:
    model = converted(nn.Sequential(nn.Linear(8, 8)))
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(4, 8))
    tuned = fastlinear.tune(compiled, torch.randn(4, 8))
    assert [call.calls for call in tuned.calls] == [1]


def test_model_without_our_layers_is_told_so(clocks: Clocks, tmp_path: Path) -> None:
    tuned = fastlinear.tune(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8))
    assert str(tuned) == (
        "the model called no layer of fastlinear, and nothing was measured\n"
        "1 nn.Linear not converted: fastlinear.convert(model) does"
    )
    assert (clocks.asked, list(tmp_path.iterdir())) == (0, [])


def test_strided_calls_are_told_apart(clocks: Clocks) -> None:
    layer = fastlinear.Linear(8, 8)
    (call,) = fastlinear.tune(layer, torch.randn(8, 4).T).calls
    assert call.way == "not measured: operands are no contiguous tensors at whole addresses"
    assert call.us is None


def test_what_only_pytorch_takes_is_let_be(clocks: Clocks) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastlinear.Linear(8, 8)
            self.lazy = nn.LazyBatchNorm1d()

        def forward(self, input: Tensor) -> Tensor:
            self.layer(input.to_sparse())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.layer(torch.nested.nested_tensor([input[:2], input[2:]]))
            return self.lazy(fastlinear.linear(input, torch.ones(8, 8)[:, :8]))

    with torch.no_grad():
        tuned = fastlinear.tune(Odd().eval(), torch.randn(4, 8))
    assert {call.way.split(":")[0] for call in tuned.calls} == {"not measured", "kernel"}


def test_time_that_is_up_is_told_and_what_is_there_counts(clocks: Clocks) -> None:
    model = converted(Block()).eval()
    with torch.no_grad():
        tuned = fastlinear.tune(model, torch.randn(6, 16), seconds=1e-9)
        assert not tuned.finished
        assert "the time was up: the same call goes on from here" in str(tuned)
        assert [call.way for call in tuned.calls].count("not measured yet") == 2
        assert fastlinear.tune(model, torch.randn(6, 16)).finished


def test_what_would_take_too_long_is_not_begun(
    clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CpuStopwatch", CpuStopwatch)
    monkeypatch.setattr(tune, "GRACE", -1.0)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(launch, "INTERPRETING", False)
    launch.target_of.cache_clear()
    model = converted(nn.Sequential(nn.Linear(8, 8))).eval()
    with torch.no_grad():
        tuned = fastlinear.tune(model, torch.randn(4, 8), seconds=0.5)
    launch.target_of.cache_clear()
    assert not tuned.finished
    assert tuned.calls[0].way == "not measured yet"


def test_ctrl_c_keeps_what_was_measured(
    clocks: Clocks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any) -> Any:
        if clocks.asked == 3:
            raise KeyboardInterrupt
        return clocks(*given)

    monkeypatch.setattr(tune, "CpuStopwatch", lambda limit: interrupted)
    model = converted(Block()).eval()
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            fastlinear.tune(model, torch.randn(6, 16))
        assert "goes on from the 1 new rows" in capsys.readouterr().err
        monkeypatch.setattr(tune, "CpuStopwatch", lambda limit: clocks)
        assert known.available
        assert fastlinear.tune(model, torch.randn(6, 16)).finished


def test_what_is_slower_goes_pytorch_s_way(clocks: Clocks) -> None:
    clocks.kernel = 1.95
    model = converted(nn.Sequential(nn.Linear(8, 8))).eval()
    with torch.no_grad():
        (call,) = fastlinear.tune(model, torch.randn(4, 8)).calls
        assert (call.way, call.us) == (PYTORCH, 2.0), "under 5% is no gain"
        assert fastlinear.explain(model[0], torch.randn(4, 8)).path != "fastlinear.kernels"


def test_report_of_convert_says_how_many_layers_are_faster(clocks: Clocks) -> None:
    model, batch = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16)).eval(), torch.randn(4, 8)
    report = fastlinear.convert(model)
    assert str(report).endswith(
        "2 converted, 0 skipped; a faster way is known for 0 here, "
        "fastlinear.tune(model, batch) finds more"
    )
    with torch.no_grad():
        fastlinear.tune(model[:1], batch)
    fastlinear.revert(model)
    assert fastlinear.convert(model).faster == 1


def test_functions_are_noted_without_a_module(clocks: Clocks) -> None:
    class Function(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return fastlinear.linear(input, torch.ones(8, 8))

    calls = record(Function(), (torch.randn(4, 8),), {})
    assert [noted.names for noted in calls.values()] == [["(computed weight)"]]


def test_layer_that_does_not_fit_in_memory_is_left_out(
    clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))).eval()
    monkeypatch.setattr(machine, "free_memory", lambda device: 10_000)
    with torch.no_grad():
        tuned = fastlinear.tune(model, torch.randn(4, 16))
    assert [call.pytorch_us for call in tuned.calls] == [2.0, None]
    assert tuned.calls[1].way == "not measured: it does not fit in memory"
    assert tuned.finished, "nothing more is to be had by the same call"


def test_precision_may_be_set_by_either_of_pytorch_s_ways(clocks: Clocks) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastlinear.Linear(8, 8)

        def forward(self, input: Tensor) -> Tensor:
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            try:
                return self.layer(input)
            finally:
                torch.backends.cuda.matmul.fp32_precision = before

    before = torch.backends.cuda.matmul.fp32_precision
    with torch.no_grad():
        (call,) = fastlinear.tune(Own().eval(), torch.randn(4, 8)).calls
        assert call.way.startswith("not measured: the model sets another precision")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            tuned = fastlinear.tune(
                nn.Sequential(fastlinear.Linear(8, 8)).eval(), torch.randn(4, 8)
            )
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    assert tuned.table is not None
    assert {row.precision for row in table.read(tuned.table).rows} == {"tf32"}


def test_table_can_be_read_by_others(clocks: Clocks) -> None:
    with torch.no_grad():
        tuned = fastlinear.tune(converted(nn.Sequential(nn.Linear(8, 8))), torch.randn(4, 8))
    mask = os.umask(0)
    os.umask(mask)
    assert tuned.table is not None
    assert tuned.table.stat().st_mode & 0o777 == 0o666 & ~mask
