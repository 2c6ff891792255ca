"""Layers over several processes: sharded, replicated, in stages, saved and loaded."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks, alive

from fastlinear import _machine as machine
from fastlinear.choice import table as tables
from fastlinear.choice.table import Row, Table
from fastlinear.kernels.configs.config import Config

RANKS = 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Processes that run the functions of distributed_jobs.py; none is left behind."""
    environment = {
        "FASTLINEAR_BACKEND": "triton",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",  # there are fewer GPUs than ranks
    }
    ranks = Ranks(RANKS, "distributed_jobs", environment)
    yield ranks
    ranks.end()
    assert alive(ranks.pids) == []


# By op: shapes of tensor arguments, the other arguments, and rows: placements of operands, then of
# outputs, on a mesh of one dimension, as "R"eplicated, "P"artial or the dimension that is sharded.
# Without those of outputs, operands may have to be moved. Sizes are no multiples of the number of
# ranks, so that some have less, or nothing.
LINEAR = [(4, 5, 6), (7, 6), (7,)]
LAYERS = [(5, 4, 6), (5, 7, 6), (5, 7)]
GRADIENTS = [(4, 5, 7), (4, 5, 6), (7, 6)]
GATED = [(4, 5, 6), (7, 6), (7, 6), (7,), (7,)]
FORWARD_ROWS = {"batch": ("0 R R", "0"), "sequence": ("1 R R", "1"), "columns": ("R 0 0", "2")}
# Part of a sum cannot be activated.
ACTIVATED_ROWS = FORWARD_ROWS | {"in_features, moved": ("2 1 R", "")}
OPS = {
    "linear": (
        "linear",
        LINEAR,
        [],
        FORWARD_ROWS | {"in_features": ("2 1 P", "P")},
    ),
    "linear, no bias": (
        "linear",
        [(5, 6), (7, 6), None],
        [],
        {"rows": ("0 R R", "0"), "columns": ("R 0 R", "1"), "in_features": ("1 1 R", "P")},
    ),
    "linear, layers": (
        "linear",
        LAYERS,
        [],
        {
            "layers": ("0 0 0", "0"),
            "rows": ("1 R R", "1"),
            "columns": ("R 1 1", "2"),
            "in_features": ("2 2 P", "P"),
        },
    ),
    "linear_backward": (
        "linear_backward",
        GRADIENTS,
        [True, False],
        {
            "batch": ("0 0 R", "0 P P"),
            "sequence": ("1 1 R", "1 P P"),
            "columns": ("2 R 0", "P 0 0"),
            "in_features": ("R 2 1", "2 1 R"),
        },
    ),
    # The calls that follow differ from that one in what is asked for alone.
    "linear_backward, no grad_bias": (
        "linear_backward",
        GRADIENTS,
        [False, False],
        {"batch": ("0 0 R", "0 P R"), "columns": ("2 R 0", "P 0 R")},
    ),
    "linear_backward, grad_input": (
        "linear_backward",
        [(6, 6), None, (6, 6)],
        [False, False],
        {"rows": ("0 R R", "0 R R"), "columns": ("1 R 0", "P R R")},
    ),
    "linear_backward, grad_weight": (
        "linear_backward",
        [(6, 6), (6, 6), None],
        [False, False],
        {"rows": ("0 0 R", "R P R"), "in_features": ("R 1 R", "R 1 R")},
    ),
    "linear_backward, layers": (
        "linear_backward",
        [(5, 4, 7), (5, 4, 6), (5, 7, 6)],
        [True, True],
        {
            "layers": ("0 0 0", "0 0 0"),
            "rows": ("1 1 R", "1 P P"),
            "columns": ("2 R 1", "P 1 1"),
            "in_features": ("R 2 2", "2 2 R"),
        },
    ),
    "linear_activation": ("linear_activation", LINEAR, ["gelu"], ACTIVATED_ROWS),
    "linear_activation_forward": (
        "linear_activation_forward",
        LINEAR,
        ["gelu"],
        {row: (given, f"{out} {out}".strip()) for row, (given, out) in ACTIVATED_ROWS.items()},
    ),
    "linear_activation_forward, from its output": (
        "linear_activation_forward",
        LINEAR,
        ["relu"],
        {row: (given, out and f"{out} R") for row, (given, out) in ACTIVATED_ROWS.items()},
    ),
    "linear_activation_backward": (
        "linear_activation_backward",
        [(4, 5, 7), *GRADIENTS],
        [True, False, "gelu"],
        {
            "batch": ("0 0 0 R", "0 P P"),
            "sequence": ("1 1 1 R", "1 P P"),
            "columns": ("2 2 R 0", "P 0 0"),
            "in_features": ("R R 2 1", "2 1 R"),
        },
    ),
    "gated_linear": (
        "gated_linear",
        GATED,
        ["silu"],
        {
            "batch": ("0 R R R R", "0"),
            "columns": ("R 0 0 0 0", "2"),
            "in_features, moved": ("2 1 1 R R", ""),
        },
    ),
    "gated_linear_forward": (
        "gated_linear_forward",
        GATED,
        ["silu"],
        {
            "batch": ("0 R R R R", "0 0 0"),
            "columns": ("R 0 0 0 0", "2 2 2"),
            "in_features, moved": ("2 1 1 R R", ""),
        },
    ),
    "gated_linear_backward": (
        "gated_linear_backward",
        [(4, 5, 7), (4, 5, 7), *GRADIENTS, (7, 6)],
        [True, "silu"],
        {
            "batch": ("0 0 0 0 R R", "0 P P"),
            "in_features": ("R R R 2 1 1", "2 1 R"),
            "columns, moved": ("2 2 2 R 0 0", ""),
        },
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_op_over_shards_is_the_op_over_the_whole(ranks: Ranks, name: str, seed: int) -> None:
    ranks.run("op_over_shards", *OPS[name], seed)


@pytest.mark.parametrize(
    ("size", "activation", "sequence"),
    [(2, None, False), (4, "gelu", False), (2, "gelu", True), (4, None, True)],
)
def test_tensor_parallel_is_nn_linear_compiled_and_not(
    ranks: Ranks, size: int, activation: str | None, sequence: bool, seed: int
) -> None:
    ranks.run("parallel", size, activation, sequence, seed)


@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp_over_tensor_parallel_is_nn_linear(ranks: Ranks, compiled: bool, seed: int) -> None:
    ranks.run("sharded_and_parallel", seed, compiled)


@pytest.mark.parametrize("size", [2, 4])
def test_ddp_is_nn_linear(ranks: Ranks, size: int, seed: int) -> None:
    ranks.run("data_parallel", size, seed)


def test_fsdp_from_meta_with_checkpointing_is_nn_linear(ranks: Ranks, seed: int) -> None:
    ranks.run("fully_sharded", seed)


def test_fsdp_in_mixed_precision_is_close_to_nn_linear(ranks: Ranks, seed: int) -> None:
    ranks.run("mixed_precision", seed)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_pipeline_stages_are_nn_linear(ranks: Ranks, schedule: str, seed: int) -> None:
    ranks.run("pipeline", schedule, seed)


def test_checkpoint_of_nn_linear_on_2_ranks_loads_on_4_and_back(
    ranks: Ranks, seed: int, tmp_path: Path
) -> None:
    ranks.run("resharded", seed, str(tmp_path))


def test_gated_pair_in_parallel_is_two_of_nn_linear(ranks: Ranks, seed: int) -> None:
    ranks.run("gated", seed)


def test_batch_of_layers_over_ranks_is_as_many_of_nn_linear(ranks: Ranks, seed: int) -> None:
    ranks.run("batched", seed)


def test_result_of_a_collective_is_waited_for(ranks: Ranks, seed: int) -> None:
    ranks.run("waited_for", seed)


def test_ranks_with_different_tables_choose_alike(ranks: Ranks, tmp_path: Path) -> None:
    """Each has another block for the output; the last has no table at all."""
    device = f"the interpreter of {tmp_path}"
    for rank in range(RANKS - 1):
        config = Config(16 << rank, 16, 16, num_warps=1, num_stages=1)
        row = Row("output", "float32", "ieee", None, True, "", 12, 6, 4, config, 1.0, 2.0, 1.0, 2.0)
        table = Table(device, "none", date="2026-01-02", rows=(row,), **machine.software())
        tables.write(tmp_path / str(rank) / tables.file_name(device), table)
    (first, *others) = ranks.run("go_by_tables", str(tmp_path), device)
    assert [first] * len(others) == others
    launched, _ = first
    assert launched == [("linear_forward_kernel", 16)]


def test_one_rank_tunes_and_all_go_by_it(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.run("tuned", str(tmp_path), f"the interpreter of {tmp_path}")
    assert [way for _, way, _ in found] == ["kernel"] * len(found)
    assert sorted((asked, wrote) for asked, _, wrote in found)[-2:] == [
        (False, False),
        (True, True),
    ]
    assert sum(asked for asked, _, _ in found) == 1


def test_main_grad_of_a_shard_is_refused(ranks: Ranks, seed: int) -> None:
    ranks.run("main_grad_of_shards", seed)


@pytest.mark.parametrize("first", ["fastlinear", "torch.distributed.tensor"])
def test_every_op_has_a_sharding_as_soon_as_it_can_be_used(first: str) -> None:
    code = f"""
import sys
import {first}
print("torch.distributed.tensor" in sys.modules)
import fastlinear, torch, torch.distributed.tensor
propagator = torch.distributed.tensor.DTensor._op_dispatcher.sharding_propagator
for schema in torch._C._jit_get_all_schemas():
    library, _, name = schema.name.partition("::")
    if library == "fastlinear":
        op = getattr(torch.ops.fastlinear, name).default
        print(name, op in propagator.op_strategy_funcs)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    imported, *ops = result.stdout.splitlines()
    assert imported == str(first != "fastlinear")
    assert set(ops) >= {f"{op} True" for op, *_ in OPS.values()}
    assert [op for op in ops if not op.endswith(" True")] == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("stat", "/nowhere"), "stat, rank [01]: Traceback(.|\n)*FileNotFoundError"),
        (("_exit", 1), "_exit, rank [01]: its process has ended"),
        (("read", 0, 1), r"read: no answer of ranks \[0, 1\] within 1 s"),
    ],
    ids=["raises", "ends", "hangs"],
)
def test_ranks_that_fail_fail_the_test_and_are_gone(call: tuple[object, ...], message: str) -> None:
    ranks = Ranks(2, "os", {}, timeout=1)
    with pytest.raises(AssertionError, match=message):
        ranks.run(*call)
    assert len(ranks.pids) == 2
    assert alive(ranks.pids) == []


def test_ranks_are_gone_with_whoever_started_them() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "helpers")!r})
from ranks import Ranks
print(*Ranks(2, "os", {{}}).run("getpid"), flush=True)
import os
os.kill(os.getpid(), {signal.SIGKILL})
"""
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120, check=False
    )
    assert result.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2
    until = time.monotonic() + 30
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive(pids) == []
