"""Every exception that the package raises, in one place: how it comes about, and all that it says.

What it says names the argument, what that takes and what came, in one sentence. A `raise` that no
case here reaches fails the last test. What PyTorch raises for bad operands is in test_errors.
"""

import ast
import errno
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
import torch
from made_up import TILE, row, table
from torch import Tensor, nn

import fastlinear
from fastlinear import __main__ as command
from fastlinear.choice import backend, launchers
from fastlinear.choice import table as tables
from fastlinear.kernels import forward
from fastlinear.kernels.configs.config import BackwardConfig, Config
from fastlinear.kernels.language.indexing import locate_tile
from fastlinear.kernels.launching import compiled_launch, launch
from fastlinear.kernels.launching.operands import check_main_grad
from fastlinear.main_grad import linear_into_main_grad
from fastlinear.ops.gated import backward_op as gated_linear_backward_op
from fastlinear.ops.gated import gated_linear_op
from fastlinear.ops.linear import activation_backward_op as linear_activation_backward_op
from fastlinear.ops.linear import linear_backward_op, linear_op
from fastlinear.tuning import tune as tuning
from fastlinear.tuning.stopwatch import CpuStopwatch, OutOfTime

Patch = pytest.MonkeyPatch
CPU = torch.device("cpu")
CHOICES = "'relu', 'gelu', 'gelu_tanh', 'silu', 'sigmoid', 'tanh', 'leaky_relu', 'relu_squared'"


def W(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


class Case(NamedTuple):
    """`call` raises a `kind` that says exactly `said`, a regular expression."""

    kind: type[Exception]
    said: str
    call: Callable[[Patch], Any]


def on_triton(call: Callable[[], Any]) -> Callable[[Patch], Any]:
    """`call`, with the kernels to compute it."""

    def with_the_kernels(patch: Patch) -> Any:
        with fastlinear.use_backend("triton"):
            return call()

    return with_the_kernels


def refused(said: str, *operands: Any, function: Any = fastlinear.linear) -> Case:
    """What PyTorch takes and the kernels do not."""
    said = f"backend 'triton' takes {said}; backend 'auto' hands this call to PyTorch"
    return Case(TypeError, said, on_triton(lambda: function(*operands)))


def parsed(said: str, **changes: Any) -> Case:
    """A table with such values in it, or in its only row."""
    found = json.loads(tables.as_text(table(row("output", 4, TILE))))
    for name, value in changes.items():
        (found["rows"][0] if name in found["rows"][0] else found)[name] = value
    return Case(ValueError, said, lambda patch: tables.parse(json.dumps(found)))


def tuned_with(said: str, *given: str, on_cpu: bool = True) -> Case:
    def call(patch: Patch) -> None:
        patch.setattr(command, "on_cpu", lambda device: on_cpu)
        command.calls_of(command.arguments_of(["tune", *given]), CPU)

    return Case(ValueError, said, call)


def without_triton(patch: Patch) -> None:
    patch.setitem(sys.modules, "fastlinear.kernels.forward.linear", None)
    patch.delattr(forward, "linear", raising=False)
    launchers.launchers.__wrapped__()


def not_interpreted(patch: Patch) -> None:
    patch.setattr(launch, "INTERPRETING", False)
    launch.target_of.__wrapped__(CPU)


def on_an_old_gpu(patch: Patch) -> None:
    patch.setattr(launch, "INTERPRETING", False)
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    launch.target_of.__wrapped__(torch.device("cuda", 0))


def on_an_unknown_gpu(patch: Patch) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise ValueError("gpu-name\n  is not defined")

    patch.setattr(compiled_launch, "INTERPRETING", False)
    patch.setattr(type(locate_tile), "run", refuse)
    planned = launch.Launch((1,), (), {})
    compiled_launch._run_by_triton(locate_tile, planned, (W(1),))


def within_batch_invariant(patch: Patch) -> None:
    with fastlinear.batch_invariant():
        fastlinear.tune(fastlinear.Linear(1, 1), W(1))


def tuned_into(patch: Patch, folder: Path) -> None:
    call = tables.call(torch.float32, True, 24, 40, 4, wanted="")
    patch.setenv("FASTLINEAR_CACHE", str(folder))
    tuning.measure_all({call: 4}, CPU, 0.0, lambda calls, clock: {one: [1.0] for one in calls})


def out_of_time(patch: Patch) -> None:
    patch.delenv("TRITON_INTERPRET", raising=False)
    CpuStopwatch(0.0)({"call": lambda: None}, "wall")


def full_disk(patch: Patch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(tables, "write", full)
    with tempfile.TemporaryDirectory() as folder:
        tuned_into(patch, Path(folder))


def compiling(patch: Patch) -> None:
    patch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    fastlinear.batch_invariant().__enter__()


def within(*outer: Any) -> Callable[[Any], Callable[[Patch], Any]]:
    """Calls of a manager's that is entered within others."""

    def entering(manager: Any) -> Callable[[Patch], Any]:
        def enter(patch: Patch) -> None:
            with outer[0], manager:
                pass

        return enter

    return entering


NESTED = r"input \(B, M, in_features\) and weight \(B, out_features, in_features\)"
LAYER = r"input \(\*, in_features\) and weight \(out_features, in_features\)"
KINDS = "the kernels take float16, bfloat16, float32 or float64, one dtype on one device, "
GATED = (
    r"fastlinear::gated_linear takes input \(\*, K\), gate_weight and up_weight \(N, K\), "
    r"gate_bias \(N,\), up_bias \(N,\), but input is \(2, 3\), gate_weight \(4, 3\), "
    r"up_weight \(5, 3\), gate_bias \(4,\), up_bias None"
)
COMPILED = r"batch_invariant\(\) cannot be entered within a compiled function; "

CASES = {
    # Settings.
    "backend": Case(
        ValueError,
        "backend must be one of 'auto', 'triton', 'torch', but is 'cuda'",
        lambda patch: fastlinear.use_backend("cuda"),
    ),
    "backend of the environment": Case(
        ValueError,
        "FASTLINEAR_BACKEND must be one of 'auto', 'triton', 'torch', but is ''",
        lambda patch: backend._checked("", "FASTLINEAR_BACKEND"),
    ),
    "float32 products": Case(
        ValueError,
        "products must be one of 'ieee', 'bf16x6', but is 'fast'",
        lambda patch: fastlinear.use_float32_products("fast"),
    ),
    "another backend within batch_invariant": Case(
        RuntimeError,
        r"within batch_invariant\(\) only the kernels keep its promise: use_backend\(\) takes "
        "'triton' there, but backend is 'auto'",
        within(fastlinear.batch_invariant())(fastlinear.use_backend("auto")),
    ),
    "batch_invariant with torch": Case(
        RuntimeError,
        r"batch_invariant\(\) needs the kernels, which backend 'auto' and 'triton' can take, but "
        "backend is 'torch'",
        within(fastlinear.use_backend("torch"))(fastlinear.batch_invariant()),
    ),
    "batch_invariant, compiled": Case(
        RuntimeError, COMPILED + "enter it around the call", compiling
    ),
    # Machines.
    "no Triton": Case(
        RuntimeError,
        r"backend 'triton' needs the package triton, 3.6 or newer \(.*\); install it with "
        r"`pip install 'fastlinear\[triton\]'`, or use backend 'auto'",
        without_triton,
    ),
    "no GPU": Case(
        RuntimeError,
        "backend 'triton' takes tensors on a GPU, but these are on cpu; to run the kernels in "
        "Triton's interpreter set TRITON_INTERPRET=1 before Python starts, or use backend 'auto'",
        not_interpreted,
    ),
    "old GPU": Case(
        RuntimeError,
        "backend 'triton' takes NVIDIA GPUs of compute capability 8.0 or newer, but cuda:0 has "
        "7.5; use backend 'auto'",
        on_an_old_gpu,
    ),
    "unknown GPU": Case(
        compiled_launch.CannotLaunch,
        "backend 'triton' needs Triton to compile and launch locate_tile on cpu, but Triton "
        r"[0-9.]+\S* cannot \(ValueError: gpu-name is not defined\); use backend 'torch'",
        on_an_unknown_gpu,
    ),
    # Operands that PyTorch takes, and the kernels do not.
    "integers": refused(
        "float16, bfloat16, float32 and float64, but input is torch.int64",
        *(W(2, 3, dtype=torch.int64), W(4, 3, dtype=torch.int64)),
    ),
    "sparse": refused(
        "strided tensors, but weight has layout torch.sparse_coo", W(2, 3), W(4, 3).to_sparse()
    ),
    "vector for a weight": refused(
        rf"{LAYER}, but input is \(2, 3\) and weight \(3,\)", W(2, 3), W(3)
    ),
    "matrix for a bias": refused(
        r"bias \(out_features,\), but bias is \(2, 4\) and out_features 4",
        *(W(2, 3), W(4, 3), W(2, 4)),
    ),
    "layers of integers": refused(
        "float16, bfloat16, float32 and float64, but input is torch.int64",
        *(W(1, 2, 3, dtype=torch.int64), W(1, 4, 3, dtype=torch.int64)),
        function=fastlinear.batched_linear,
    ),
    "gated integers": refused(
        "float16, bfloat16, float32 and float64, but input is torch.int64",
        W(2, 3, dtype=torch.int64),
        *(W(4, 3, dtype=torch.int64), W(4, 3, dtype=torch.int64), None, None, "relu"),
        function=fastlinear.gated_linear,
    ),
    # Operands that nothing takes, where PyTorch does not say so.
    "activation": Case(
        ValueError,
        f"activation must be None or one of {CHOICES}, but is 'softmax'",
        lambda patch: fastlinear.linear(W(2, 3), W(4, 3), None, "softmax"),
    ),
    "gate's activation": Case(
        ValueError,
        f"activation must be one of {CHOICES}, but is None",
        lambda patch: fastlinear.gated_linear(
            W(2, 3),
            W(4, 3),
            W(4, 3),
            activation=None,  # type: ignore[arg-type]
        ),
    ),
    "layers that are no tensors": Case(
        TypeError,
        "batched_linear takes tensors, but weight is list",
        lambda patch: fastlinear.batched_linear(W(1, 2, 3), [1.0]),  # type: ignore[arg-type]
    ),
    "layers of other shapes": Case(
        RuntimeError,
        rf"batched_linear takes {NESTED}, but input is \(2, 3\) and weight \(1, 4, 3\)",
        lambda patch: fastlinear.batched_linear(W(2, 3), W(1, 4, 3)),
    ),
    "layers with one bias": Case(
        RuntimeError,
        r"batched_linear takes bias \(B, out_features\), but bias is \(4,\) and weight \(1, 4, 3\)",
        lambda patch: fastlinear.batched_linear(W(1, 2, 3), W(1, 4, 3), W(4)),
    ),
    "weights of a pair": Case(
        RuntimeError,
        "gated_linear takes weights of the same out_features, but gate_weight is "
        r"\(4, 3\) and up_weight \(1, 3\)",
        lambda patch: fastlinear.gated_linear(W(2, 3), W(4, 3), W(1, 3)),
    ),
    # The ops, called directly.
    "op: dtypes": Case(
        RuntimeError,
        KINDS + "but input is torch.float32 on cpu, weight is torch.float64 on cpu",
        lambda patch: linear_op(W(2, 3), W(4, 3, dtype=torch.float64), None),
    ),
    "op: devices": Case(
        RuntimeError,
        KINDS + "but input is torch.float32 on meta, weight is torch.float32 on cpu",
        lambda patch: linear_op(W(2, 3, device="meta"), W(4, 3), None),
    ),
    "op: shapes": Case(
        RuntimeError,
        r"fastlinear::linear takes input \(\*, K\), weight \(N, K\), bias \(N,\), or input "
        r"\(B, M, K\), weight \(B, N, K\), bias \(B, N\), but input is \(2, 3\), weight \(4, 5\), "
        "bias None",
        lambda patch: linear_op(W(2, 3), W(4, 5), None),
    ),
    "op: shapes of backward": Case(
        RuntimeError,
        r"fastlinear::linear_backward takes grad_output \(\*, N\), input \(\*, K\), weight "
        r"\(N, K\), but grad_output is \(2, 4\), input \(3, 5\), weight None",
        lambda patch: linear_backward_op(W(2, 4), W(3, 5), None, True, False),
    ),
    "op: shape of what was saved": Case(
        RuntimeError,
        r"fastlinear::linear_activation_backward takes grad_output and saved \(\*, N\), but "
        r"grad_output is \(2, 4\), saved \(2, 5\)",
        lambda patch: linear_activation_backward_op(
            W(2, 4), W(2, 5), W(2, 3), None, True, False, "relu"
        ),
    ),
    "op: shapes of a pair": Case(
        RuntimeError,
        GATED,
        lambda patch: gated_linear_op(W(2, 3), W(4, 3), W(5, 3), W(4), None, "silu"),
    ),
    "op: shapes of a pair's backward": Case(
        RuntimeError,
        r"fastlinear::gated_linear_backward takes grad_output, gate and up \(\*, N\), input "
        r"\(\*, K\), gate_weight and up_weight \(N, K\) or neither, but "
        r"grad_output is \(2, 4\), gate "
        r"\(2, 4\), up \(2, 5\), input None, gate_weight None, up_weight None",
        lambda patch: gated_linear_backward_op(
            W(2, 4), W(2, 4), W(2, 5), None, None, None, True, "silu"
        ),
    ),
    "configuration of a launch": Case(
        ValueError,
        "BackwardConfig takes input and weight of one num_warps and num_stages, a launch's, but "
        r"they are \(8, 3\) and \(4, 3\)",
        lambda patch: BackwardConfig(Config(16, 16, 16, 8, 3), Config(16, 16, 16, 4, 3)),
    ),
    "a name that the package has not": Case(
        AttributeError,
        "module 'fastlinear' has no attribute 'Bilinear'",
        lambda patch: fastlinear.Bilinear,
    ),
    # Gradients that are added to main_grad.
    "main_grad, unsupported": Case(
        TypeError,
        "accumulate_into_main_grad takes strided tensors, but weight has layout torch.sparse_coo",
        lambda patch: linear_into_main_grad(
            W(2, 3), W(4, 3).to_sparse().requires_grad_(), None, None
        ),
    ),
    "main_grad, none": Case(
        RuntimeError,
        "accumulate_into_main_grad adds weight's gradient to weight.main_grad, a float32 tensor "
        r"of its shape \(4, 3\), but this weight has none",
        lambda patch: fastlinear.Linear(3, 4, accumulate_into_main_grad=True)(W(2, 3)),
    ),
    "main_grad, another tensor": Case(
        RuntimeError,
        "weight.main_grad has to be a contiguous torch.float32 tensor of weight's shape "
        r"\(4, 3\) on cpu, but it is torch.float16 on cpu",
        lambda patch: check_main_grad(W(4, 3, dtype=torch.float16), (4, 3), W(2, 3)),
    ),
    "main_grad, nn.Linear.forward replaced": Case(
        RuntimeError,
        "accumulate_into_main_grad takes layers whose forward is theirs, but the forward of "
        "nn.Linear has been replaced on the class",
        lambda patch: (
            patch.setattr(nn.Linear, "forward", lambda self, input: input),
            fastlinear.Linear(3, 4, accumulate_into_main_grad=True)(W(2, 3)),
        ),
    ),
    "export to ONNX": Case(
        RuntimeError,
        "backend 'triton' has no kernels for ONNX; export within "
        r"`with fastlinear.use_backend\('torch'\):`",
        lambda patch: (
            patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True),
            on_triton(lambda: fastlinear.linear(W(2, 3), W(4, 3)))(patch),
        ),
    ),
    "main_grad, scripted": Case(
        RuntimeError,
        "torch.jit.script takes layers that leave gradients to autograd, but this one has "
        "accumulate_into_main_grad=True",
        lambda patch: torch.jit.script(fastlinear.Linear(3, 4, accumulate_into_main_grad=True)),
    ),
    # Models and layers.
    "convert": Case(
        TypeError,
        r"convert\(\) takes an nn.Module, but model is list",
        lambda patch: fastlinear.convert([]),  # type: ignore[arg-type]
    ),
    "revert": Case(
        TypeError,
        r"revert\(\) takes an nn.Module, but model is NoneType",
        lambda patch: fastlinear.revert(None),  # type: ignore[arg-type]
    ),
    "explain, no layer": Case(
        TypeError,
        r"explain\(\) takes an nn.Linear, but layer is ReLU",
        lambda patch: fastlinear.explain(nn.ReLU(), W(2, 3)),  # type: ignore[arg-type]
    ),
    "explain, no tensor": Case(
        TypeError,
        r"explain\(\) takes a Tensor, but input is list",
        lambda patch: fastlinear.explain(nn.Linear(3, 4), [1.0]),  # type: ignore[arg-type]
    ),
    "from_linears, none": Case(
        ValueError,
        r"from_linears\(\) takes one or more layers, but linears has none",
        lambda patch: fastlinear.BatchedLinear.from_linears([]),
    ),
    "from_linears, another module": Case(
        TypeError,
        r"from_linears\(\) takes nn.Linear, but layer 1 is ReLU",
        lambda patch: fastlinear.BatchedLinear.from_linears(
            [nn.Linear(3, 4), nn.ReLU()]  # type: ignore[list-item]
        ),
    ),
    "from_linears, unlike": Case(
        ValueError,
        r"from_linears\(\) takes layers that are alike, but the shape of weight of layer 0 is "
        r"\(4, 3\) and of layer 1 \(5, 3\)",
        lambda patch: fastlinear.BatchedLinear.from_linears([nn.Linear(3, 4), nn.Linear(3, 5)]),
    ),
    "from_linears, main_grad": Case(
        ValueError,
        r"from_linears\(\) takes layers that leave gradients to autograd, but layer 0 accumulates "
        "into main_grad",
        lambda patch: fastlinear.BatchedLinear.from_linears(
            [fastlinear.Linear(3, 4, accumulate_into_main_grad=True)]
        ),
    ),
    # The tuner's command: told in one line, without a traceback.
    "tune --shapes": tuned_with(
        "--shapes takes OUT_FEATURESxIN_FEATURES, as in 4096x1024, or 'common', but got '4096'",
        *("--shapes", "4096"),
    ),
    "tune --rows": tuned_with("--rows takes numbers from 1 to 16777216, but got 0", "--rows", "0"),
    "tune --minutes": tuned_with(
        "--minutes takes a number above 0, but got -1.0", "--minutes", "-1"
    ),
    "tune, both dtypes": tuned_with(
        "--dtypes takes float32 or tf32, in a call each, but got both",
        *("--dtypes", "float32", "tf32"),
        on_cpu=False,
    ),
    "tune --dtypes": tuned_with(
        "--dtypes takes tf32 on a GPU only, and there is none", "--dtypes", "tf32"
    ),
    "tune, model": Case(
        TypeError,
        r"tune\(\) takes an nn.Module, but model is Tensor",
        lambda patch: fastlinear.tune(W(1)),  # type: ignore[arg-type]
    ),
    "tune, seconds": Case(
        ValueError,
        "seconds must be above 0, but is 0",
        lambda patch: fastlinear.tune(fastlinear.Linear(1, 1), W(1), seconds=0),
    ),
    "tune, batch_invariant": Case(
        RuntimeError,
        r"tune\(\) measures what batch_invariant\(\) leaves no choice of: leave it",
        within_batch_invariant,
    ),
    "tune, folder": Case(
        OSError,
        "cannot use .* for the table: .*; FASTLINEAR_CACHE names another folder",
        lambda patch: tuned_into(patch, Path(__file__)),
    ),
    "tune, time": Case(
        OutOfTime,
        "it would take longer than there is",
        out_of_time,
    ),
    "tune, interpreter": Case(
        RuntimeError,
        "tuning measures no interpreted kernels: unset TRITON_INTERPRET",
        lambda patch: CpuStopwatch(),
    ),
    "tune, full disk": Case(
        OSError,
        "cannot use .* for the table: .*; the 0 new rows before are in it",
        full_disk,
    ),
    # Tables: told in the warning that names the file, or by the tuner.
    "table, nested": Case(
        ValueError, "it is nested too deeply", lambda patch: tables.parse("[" * 100_000)
    ),
    "table, format": parsed("its format is 1, and 2 is what is read here", format=1),
    "table, none": Case(
        ValueError,
        "its format is None, and 2 is what is read here",
        lambda patch: tables.parse("[]"),
    ),
    "table, columns": parsed(
        "it has date, device, driver, fastlinear, format, kernels, rows, surprise, torch, triton "
        "instead of date, device, driver, fastlinear, format, kernels, rows, torch, triton",
        surprise=1,
    ),
    "table, device": parsed("device is 5, not a text of 200 characters at most", device=5),
    "row, none": parsed(
        "row 0 has 7 instead of activation, bias, candidate, device_us, dtype, k, m, n, "
        "precision, product, pytorch_device_us, pytorch_wall_us, wall_us, wanted",
        rows=[7],
    ),
    "row, m": parsed("row 0 has m = 3, which is not a power of two", m=3),
    "row, n": parsed("row 0 has n = 0, which is not from 1 to 2147483647", n=0),
    "row, bias": parsed("row 0 has bias = 1, which is not true or false", bias=1),
    "row, dtype": parsed(
        "row 0 has dtype = 'int8', which is not one of float16, bfloat16, float32, float64",
        dtype="int8",
    ),
    "row, time": parsed(
        "row 0 has wall_us = 'fast', which is not microseconds above 0 and below 1e9",
        wall_us="fast",
    ),
    "row, candidate": parsed(
        "row 0 has candidate = 'cutlass', which is not what computes that product",
        candidate="cutlass",
    ),
}


def raised(case: Case) -> Exception:
    with pytest.MonkeyPatch.context() as patch:
        try:
            case.call(patch)
        except Exception as error:
            return error
    pytest.fail("raised nothing")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exception_says_what_is_taken_and_what_came(case: Case) -> None:
    error = raised(case)
    assert type(error) is case.kind
    assert re.fullmatch(case.said, str(error)), str(error)
    assert len(str(error).splitlines()) == 1
    assert (backend.current, backend.invariant) == ("auto", False)


PACKAGE = Path(fastlinear.__file__).parent
KERNELS = Path(launch.__file__).parents[1]


def raises() -> set[tuple[Path, int, int]]:
    """Every `raise` of the package, by file, first and last line; not those that raise again."""
    found = set()
    for path in {*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found.add((path.resolve(), node.lineno, node.end_lineno or node.lineno))
            else:
                again = isinstance(node, ast.Raise) and node.exc is not None
                assert not again, f"{path}:{node.lineno} raises what is made elsewhere"  # type: ignore[attr-defined]
    return found


def place(error: Exception) -> tuple[Path, int]:
    """Where it was raised."""
    step: TracebackType | None = error.__traceback__
    assert step is not None
    while step.tb_next is not None:
        step = step.tb_next
    return Path(step.tb_frame.f_code.co_filename).resolve(), step.tb_lineno


def test_every_exception_is_listed() -> None:
    reached = [place(raised(case)) for case in CASES.values()]
    missing = [
        f"{path.name}:{first}"
        for path, first, last in sorted(raises())
        if not any(file == path and first <= line <= last for file, line in reached)
    ]
    assert not missing, "no case here raises these"
