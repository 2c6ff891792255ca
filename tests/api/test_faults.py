"""Faults of the machine: what the user sees, and that no number comes out wrong.

Other files have those that belong to their subject: test_backend a Triton that is not installed,
test_tables tables that cannot be used, test_tune what stops the tuner.
"""

import errno
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_up import NAME, TILE, Clocks, row, rows_of, run, table
from oracle import (
    assert_as_exact,
    exact_backward,
    exact_forward,
    native_backward,
    native_forward,
    normal,
    sum_scale,
)
from torch import Tensor
from triton.runtime.errors import PTXASError

import fastlinear
from fastlinear.choice import backend, known, running, way
from fastlinear.choice import table as tables
from fastlinear.choice.table import PYTORCH
from fastlinear.kernels.backward import grad_weight as backward_weight
from fastlinear.kernels.backward.linear import linear_backward
from fastlinear.kernels.configs.config import Config
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.language.indexing import locate_tile
from fastlinear.kernels.launching import compiled_launch, launch, shared_sums

interpreted_only = pytest.mark.skipif(
    not launch.INTERPRETING, reason="a GPU's launch is queued whole or not at all"
)
SPLIT_K = Config(16, 32, 16, num_warps=4, num_stages=3, kind="split_k", splits=5)
M, N, K = 40, 34, 70


@pytest.fixture
def operands(device: torch.device) -> dict[str, Tensor]:
    shapes = {"grad_output": (M, N), "input": (M, K), "weight": (N, K), "bias": (N,)}
    return {name: normal(shape, torch.float32, device) for name, shape in shapes.items()}


def output(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    layer = (given["input"], given["weight"], given["bias"])
    return (forward.linear_forward(*layer, config=SPLIT_K),)


def activated(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    layer = (given["input"], given["weight"], given["bias"])
    outputs = forward.linear_activation_forward(*layer, "relu", True, config=SPLIT_K)
    torch.testing.assert_close(outputs[0], outputs[1].relu(), rtol=0, atol=0)
    return outputs[1:]


def as_remembered(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """As a shortcut computes it."""
    layer = (given["input"], given["weight"], given["bias"])
    described = launch.describe(*layer)
    plan = forward.plan_forward(described, "ieee", None, False, SPLIT_K)
    return (forward.as_planned(plan)(*layer),)


def of_weight(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    gradients = backward_weight.linear_backward_weight
    return gradients(given["grad_output"], given["input"], True, splits=3)


def together(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    names = ("grad_output", "input", "weight")
    return linear_backward(*(given[name] for name in names), True, splits=3)


def into_main_grad(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    main_grad = torch.zeros_like(given["weight"])
    names = ("grad_output", "input")
    gradients = backward_weight.linear_backward_weight
    operands = [given[name] for name in names]
    nothing, grad_bias = gradients(*operands, True, main_grad=main_grad, splits=3)
    assert nothing is None
    return main_grad, grad_bias


def side_by_side(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """As the backward of a gated pair computes them, of which this layer is both halves."""
    first, second = given["weight"].chunk(2)
    names = ("grad_output", "input")
    return linear_backward(
        *(given[name] for name in names), first, True, second_weight=second, splits=3
    )


SPLIT: dict[str, Callable[[dict[str, Tensor]], tuple[Tensor, ...]]] = {
    "output": output,
    "pre-activation": activated,
    "output, remembered": as_remembered,
    "grad_weight": of_weight,
    "both gradients": together,
    "grad_weight, added": into_main_grad,
    "gradients of a gated pair": side_by_side,
}
split = pytest.mark.parametrize("compute", SPLIT.values(), ids=SPLIT)


def check(compute: Callable[..., tuple[Tensor, ...]], given: dict[str, Tensor]) -> list[Tensor]:
    """Computes it, and compares the results with float64."""
    results = list(compute(given))
    layer = (given["input"], given["weight"], given["bias"])
    backward = (given["grad_output"], given["input"], given["weight"])
    scale = sum_scale(given["grad_output"], torch.float32, 0)
    if compute in (output, activated, as_remembered):
        native, exact = [native_forward(*layer)], [exact_forward(*layer)]
    else:
        native, exact = list(native_backward(*backward)), list(exact_backward(*backward))
        native, exact = native[-len(results) :], exact[-len(results) :]
    for result, *reference in zip(results, native, exact, strict=True):
        assert_as_exact(result, *reference, scale=scale)
    return results


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """How much memory there is: with `parts` False none for parts of sums, and so on."""
    room = SimpleNamespace(parts=True, counters=True, outputs=True, kernels=[])
    allocate, counters, run = launch.allocate, shared_sums.counters, launch.run

    def exhausted(like: Tensor, one: launch.Operand) -> Tensor:
        is_part = math.prod(one.shape) > M * max(N, K) or len(one.shape) > 2
        if not (room.parts if is_part else room.outputs):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(like, one)

    def no_counters(like: Tensor, count: int) -> Tensor:
        if not room.counters:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return counters(like, count)

    def noted(kernel: Any, planned: launch.Launch, pointers: Any) -> None:
        split = {"partial_ptr", "partial_weight_ptr"} & {
            name for name, one in zip(kernel.arg_names, pointers, strict=False) if one is not None
        }
        room.kernels.append((kernel, bool(split)))
        run(kernel, planned, pointers)

    monkeypatch.setattr(launch, "allocate", exhausted)
    monkeypatch.setattr(shared_sums, "counters", no_counters)
    monkeypatch.setattr(launch, "run", noted)
    return room


@pytest.mark.parametrize(
    ("compute", "missing"),
    [*((compute, "parts") for compute in SPLIT.values()), (output, "counters")],
    ids=[*SPLIT, "output, counters"],
)
def test_without_memory_for_parts_no_sum_is_split(
    compute: Callable[..., Any],
    missing: str,
    room: SimpleNamespace,
    operands: dict[str, Tensor],
    device: torch.device,
) -> None:
    setattr(room, missing, False)
    said = f"^fastlinear splits no sums of this call: {device} has no [0-9]+ bytes left for the "
    with pytest.warns(RuntimeWarning, match=said):
        results = check(compute, operands)
    with pytest.warns(RuntimeWarning, match=said):
        again = compute(operands)
    for one, other in zip(results, again, strict=True):
        assert torch.equal(one, other), "the same call gives the same bits"
    setattr(room, missing, True)
    check(compute, operands)  # a warning would be an error
    (kernel,) = {kernel for kernel, _ in room.kernels}
    assert [split for _, split in room.kernels] == [False, False, True], kernel
    assert all(not counted.any() for counted in shared_sums._counters.values())


@split
def test_without_memory_for_an_output_pytorch_says_so(
    compute: Callable[..., Any], room: SimpleNamespace, operands: dict[str, Tensor]
) -> None:
    room.outputs = False
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"):
        compute(operands)
    assert not room.kernels


# Ctrl-C.


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Ctrl-C comes as the n-th program of a launch begins; with None it does not come."""
    from triton.runtime.interpreter import InterpreterBuilder

    begin, when = InterpreterBuilder.set_grid_idx, SimpleNamespace(at=None)

    def interrupted(self: Any, x: int, y: int, z: int) -> None:
        if x == when.at:
            raise KeyboardInterrupt
        begin(self, x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", interrupted)
    return lambda program: setattr(when, "at", program)


@interpreted_only
@split
def test_interrupted_launch_leaves_nothing_for_the_next_to_trip_over(
    compute: Callable[..., Any],
    interrupt_at: Callable[[int | None], None],
    operands: dict[str, Tensor],
) -> None:
    for _ in range(2):
        interrupt_at(int(torch.randint(1, 12, ())))
        with pytest.raises(KeyboardInterrupt):
            compute(operands)
    interrupt_at(None)
    check(compute, operands)


@interpreted_only
def test_interrupted_call_leaves_settings_and_caches_as_they_were(
    interrupt_at: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(way, "_ways", {})
    layer = fastlinear.Linear(K, N)
    input = torch.randn(M, K, requires_grad=True)

    def step() -> Tensor:
        with fastlinear.use_backend("triton"), fastlinear.batch_invariant():
            return layer(input)

    interrupt_at(1)
    with pytest.raises(KeyboardInterrupt):
        step()
    assert not way._ways
    interrupt_at(None)
    result = step()
    remembered = len(way._ways)
    interrupt_at(1)
    with pytest.raises(KeyboardInterrupt):
        step()
    with pytest.raises(KeyboardInterrupt), running.as_its_forward(False):
        result.sum().backward()
    interrupt_at(None)
    assert (backend.current, backend.invariant, running._forward.auto) == ("auto", False, None)
    assert len(way._ways) == remembered == 1
    assert torch.equal(step(), result)
    torch.testing.assert_close(result, F.linear(input, layer.weight, layer.bias))


# GPUs.


REFUSALS = {
    "a GPU that ptxas does not know": (
        PTXASError(
            "Internal Triton PTX codegen error\n`ptxas` stderr:\n"
            "ptxas fatal   : Value 'sm_130a' is not defined for option 'gpu-name'\n"
        ),
        "PTXASError: PTXAS error: .* Value 'sm_130a' is not defined for option 'gpu-name'",
    ),
    "a GPU that LLVM does not know": (
        RuntimeError("PassManager::run failed"),
        "RuntimeError: PassManager::run failed",
    ),
    "no driver": (
        RuntimeError("0 active drivers ([]). There should only be one."),
        r"RuntimeError: 0 active drivers \(\[\]\). There should only be one.",
    ),
    "no compiler": (
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        "RuntimeError: Failed to find C compiler. .*",
    ),
    "its cache is full": (
        OSError(errno.ENOSPC, "No space left on device", "/root/.triton/cache/x"),
        r"OSError: \[Errno 28\] No space left on device: '/root/.triton/cache/x'",
    ),
}


@pytest.mark.parametrize(("error", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_triton_cannot_compile_is_told_in_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def refuse(kernel: object, *given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(compiled_launch, "INTERPRETING", False)
    monkeypatch.setattr(type(locate_tile), "run", refuse)
    forward.plan_forward.cache_clear()  # nothing has been compiled for it
    layer, input = fastlinear.Linear(20, 12, device=device), torch.randn(4, 20, device=device)
    expected = F.linear(input, layer.weight, layer.bias)
    torch.testing.assert_close(layer(input), expected, rtol=0, atol=0)
    with (
        fastlinear.use_backend("triton"),
        pytest.raises(
            RuntimeError,
            match=rf"^backend 'triton' needs Triton to compile and launch linear_\w+ on {device}, "
            rf"but Triton \S+ cannot \({said}\); use backend 'torch'$",
        ),
    ):
        layer(input)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
    ids=["out of memory", "the device's own"],
)
def test_what_is_no_fault_of_triton_s_comes_through(
    error: Exception, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def refuse(kernel: object, *given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(compiled_launch, "INTERPRETING", False)
    monkeypatch.setattr(type(locate_tile), "run", refuse)
    forward.plan_forward.cache_clear()
    with fastlinear.use_backend("triton"), pytest.raises(type(error)) as raised:
        fastlinear.linear(torch.randn(4, 20, device=device), torch.randn(12, 20, device=device))
    assert raised.value is error


@interpreted_only
def test_gpu_that_is_too_old_goes_by_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    old = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match=r"8.0 or newer, but cuda:0 has 7.5; use backend 'auto'"):
        launch.target_of.__wrapped__(old)
    monkeypatch.setattr(launch, "target_of", launch.target_of.__wrapped__)
    rows = (row("output", 4, TILE), row("output", 8, PYTORCH))
    assert known._usable(table(*rows), old) == [rows[1]]


# The folder of tables.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's, which is not there yet."""
    folder = tmp_path / "not" / "there"
    monkeypatch.setenv("FASTLINEAR_CACHE", str(folder))
    backend.use_tables()
    yield folder
    monkeypatch.undo()
    backend.use_tables()


def tune_into_it(*given: str) -> int:
    return run(Clocks(), "--rows", "4", *given)


@interpreted_only
def test_missing_folder_is_made_by_the_tuner_alone(folder: Path) -> None:
    layer, input = fastlinear.Linear(40, 24), torch.randn(4, 40)
    assert not known.available
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias))
    assert not folder.exists()
    assert tune_into_it() == 0
    assert [one.name for one in folder.glob("*.json")] == ["triton-interpreter.json"]
    assert known.available
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias))


@interpreted_only
def test_folder_that_is_read_only_is_told_before_measuring_and_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune_into_it() == 0
    path = folder / "triton-interpreter.json"
    before = path.read_bytes()
    opened = Path.open

    def read_only(self: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
        if mode != "r" and self.is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return opened(self, mode, *given, **named)

    with monkeypatch.context() as within:
        within.setattr(Path, "open", read_only)
        capsys.readouterr()
        assert tune_into_it("--rows", "8") == 1
        backend.use_tables()
        assert known.files(torch.device("cpu")) == {path: 5}
    said = capsys.readouterr().err
    assert said == (
        f"python -m fastlinear tune: cannot use {path} for the table: "
        f"[Errno 30] Read-only file system: '{path}.lock'; FASTLINEAR_CACHE names another folder\n"
    )
    assert path.read_bytes() == before


class Bomb:
    """What a pickle would run as it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@interpreted_only
def test_table_is_never_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    path = folder / "triton-interpreter.json"
    for protocol in (0, 5):
        path.write_bytes(pickle.dumps(Bomb(), protocol))
        backend.use_tables()
        with pytest.warns(RuntimeWarning, match=f"ignores the table {path}"):
            fastlinear.linear(torch.randn(4, 40), torch.randn(24, 40))
    assert not Path("exploded").exists()


# The tuner is stopped or refused by what cannot be stood in for: each time in a fork of a process
# that is made once. It measures nothing, so that nearly all it does is to write.
TUNERS = """
import contextlib, os, random, resource, signal, sys, time
from fastlinear import __main__ as command
from fastlinear.choice import launchers
from fastlinear.tuning import measure
from fastlinear.choice import table as tables
from pathlib import Path

sys.modules["tqdm"] = None  # a line a layer
launchers.launchers()
signal.signal(signal.SIGINT, signal.default_int_handler)
path = Path(sys.argv[1])
measure.exact_calls = lambda products, product: {}

def tuner(*given, limit=None):
    '''The id of a process that tunes.'''
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    signal.alarm(60)  # whatever becomes of the others, this one ends
    status = 9
    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            given = command.arguments_of(["tune", "--dtypes", "float32", *given])
            status = command.tune(given, lambda calls, clock: dict.fromkeys(calls, [1.0] * 3))
    finally:
        os._exit(status)

def keys():
    return {row.key for row in tables.read(path).rows}

def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

signal.alarm(60)
shapes = [f"{n}x{k}" for n in range(1, 13) for k in range(1, 13)]
assert ended(tuner("--shapes", "1x1", "--rows", "4")) == 0
before = keys()
assert len(before) == 5

statuses = []
for kill in (signal.SIGKILL, signal.SIGINT) * 10:
    process = tuner("--shapes", *shapes, "--rows", "1", "2", "4")
    while keys() == before:  # it writes from now on
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.03))
    os.kill(process, kill)
    statuses.append((kill, ended(process)))
    now = keys()  # raises where the table is broken
    assert before <= now, "rows are lost"
    before = now
print("killed", set(statuses) == {(signal.SIGKILL, -9), (signal.SIGINT, 130)}, set(statuses))

for part in path.parent.glob("*.part"):
    part.unlink()
text = path.read_bytes()
status = ended(tuner("--shapes", "13x13", "--rows", "1", limit=len(text) + 50))
print("full", status, path.read_bytes() == text, list(path.parent.glob("*.part")))
"""


@interpreted_only
def test_tuner_that_is_killed_or_out_of_space_leaves_the_table_whole(tmp_path: Path) -> None:
    path, changed = tmp_path / NAME, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", TUNERS, str(path)],
        env=os.environ | changed | {"FASTLINEAR_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    killed, full = run.stdout.splitlines()
    assert killed.startswith("killed True"), killed
    assert full == "full 1 True []"
    assert run.stderr.endswith(
        f"python -m fastlinear tune: cannot use {path} for the table: "
        "[Errno 27] File too large; the 0 new rows before are in it\n"
    )
    assert rows_of(path)
    assert type(tables.read(path)) is tables.Table
