"""`python -m fastlinear tune`, with made-up times in the place of a GPU's clocks."""

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_up import LAYER, NAME, Clocks, rows_of, run
from torch.utils._python_dispatch import TorchDispatchMode

import fastlinear
from fastlinear import __main__ as command
from fastlinear.choice import backend, launchers
from fastlinear.choice import table as tables
from fastlinear.choice.table import BY_ROWS, PYTORCH
from fastlinear.kernels.configs.config import BackwardConfig, Config
from fastlinear.kernels.launching import launch
from fastlinear.tuning import measure as tuning
from fastlinear.tuning.stopwatch import Call

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not launch.INTERPRETING, reason="the clocks are made up")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTLINEAR_CACHE", str(tmp_path))
    yield
    monkeypatch.undo()
    backend.use_tables()


def test_every_product_gets_a_row_that_auto_goes_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / NAME
    assert run(Clocks(), "--rows", "4", "1") == 0
    rows = rows_of(path)
    assert set(rows) == {(product, m) for product in tables.PRODUCTS for m in (1, 4)}
    for (product, _), row in rows.items():
        several = product in ("gradients", "training")
        won = row.candidate == BY_ROWS if several else type(row.candidate) is Config
        assert won, row
        assert (row.device_us, row.pytorch_device_us) == (1.0, 2.0)
        assert (row.wall_us, row.pytorch_wall_us) == (1.0, 2.0)
    said = capsys.readouterr().out
    assert said.count("24x40") == 2
    assert "0.004 ms by PyTorch, 0.002 ms now, 2.00 times as fast" in said

    monkeypatch.setenv("FASTLINEAR_CACHE", str(tmp_path))
    backend.use_tables()
    said_of_call = fastlinear.explain(fastlinear.Linear(40, 24), torch.randn(3, 40))
    assert said_of_call.path == "fastlinear.kernels"


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
def test_pytorch_is_timed_as_its_user_has_it(
    tmp_path: Path, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks, entered = Clocks(), []

    def noted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def note(*given: object) -> object:
            entered.append(name)
            return original(*given)

        monkeypatch.setattr(owner, name, note)

    noted(tuning, "linear")
    noted(backend, "use_backend")
    noted(torch.no_grad, "__enter__")

    def measure(calls: dict[str, Call], clock: str) -> dict[str, list[float]]:
        for name, call in calls.items():
            entered.clear()
            call()
            assert name != PYTORCH or not entered
            assert "use_backend" not in entered
        return clocks(calls, clock)

    given = ("--rows", "4", "--activations", activation)
    assert run(measure, *given) == 0


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_compute_the_same(activation: str | None, bias: bool) -> None:
    call = tables.call(torch.float32, bias, 24, 40, 4, activation=activation)
    products = tuning.Products(call, torch.device("cpu"))
    input, weight, grad = products.input, products.weight, products.grad
    output = products.called("output", by_pytorch=True)()
    expected = F.linear(input, weight, products.bias)
    if activation is not None:
        expected = F.gelu(expected, approximate="tanh")
    torch.testing.assert_close(output, expected)
    with backend.use_backend("triton"):
        torch.testing.assert_close(products.called("output", by_pytorch=False)(), output)
        gradients = products.called("training", by_pytorch=False)()
    torch.testing.assert_close(gradients, products.called("training", by_pytorch=True)())
    assert len(gradients) == 2 + bias  # type: ignore[arg-type]
    native = {product: products.by_pytorch(product)() for product in tables.PRODUCTS[:-1]}
    torch.testing.assert_close(native["output"], (output,))
    torch.testing.assert_close(native["gradients"], native["grad_input"] + native["grad_weight"])
    of_weight = (grad.mT @ input, grad.sum(0)) if bias else (grad.mT @ input,)
    torch.testing.assert_close(native["gradients"], (grad @ weight, *of_weight))


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it and live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self.known:
            self.known.add(address)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, address, size)

    def drop(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize(
    ("product", "activation", "sizes"),
    [
        ("output", None, (128, 16, 256)),
        ("output", "relu_squared", (128, 16, 256)),
        ("grad_input", None, (16, 256, 128)),
        ("grad_weight", None, (256, 128, 16)),
        ("gradients", None, (16, 256, 128)),
    ],
)
def test_what_is_held_at_once_is_counted(
    product: str,
    activation: str | None,
    sizes: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "CANDIDATES", 1)
    monkeypatch.setattr(tuning, "PAIRS", 1)
    call = tables.call(torch.float16, False, *sizes, activation=activation)
    with Held() as held:
        tuning.exact_calls(tuning.Products(call, torch.device("cpu")), product)
    most = tuning.bytes_of(call, call.m)
    assert most / 2 < held.most <= most


@pytest.mark.parametrize(("together", "won"), [(0.5, True), (1.0, False), (1.5, False)])
def test_one_launch_of_both_gradients_wins_if_it_is_faster_than_two(
    tmp_path: Path, together: float, won: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks, path = Clocks(), tmp_path / NAME

    def measure(calls: dict[str, Call], clock: str) -> dict[str, list[float]]:
        times = clocks(calls, clock)
        return times | {name: [together] * 3 for name in calls if name.startswith("Backward")}

    assert run(measure, "--rows", "4") == 0
    row = rows_of(path)["gradients", 4]
    assert type(row.candidate) is (BackwardConfig if won else str)
    assert (row.device_us, row.wall_us) == ((0.5, 0.5) if won else (1.0, 1.0))
    assert row.pytorch_device_us == 2.0

    monkeypatch.setenv("FASTLINEAR_CACHE", str(tmp_path))
    backend.use_tables()
    layer, input = fastlinear.Linear(40, 24), torch.randn(3, 40, requires_grad=True)
    kernels = {product.kernel for product in fastlinear.explain(layer, input).products}
    assert ("linear_backward_kernel" in kernels) is won


@pytest.mark.parametrize("kernel", [3.0, 2.0], ids=["slower", "as fast"])
def test_kernel_that_is_not_faster_loses_to_pytorch(tmp_path: Path, kernel: float) -> None:
    path = tmp_path / NAME
    assert run(Clocks(kernel), "--rows", "4") == 0
    for row in rows_of(path).values():
        assert row.candidate == PYTORCH
        assert (row.device_us, row.wall_us) == (2.0, 2.0), "PyTorch's own times"


@pytest.mark.parametrize(
    ("device", "wall", "won"),
    [
        (1.0, 1.0, True),
        (1.0, 2.0, True),
        (2.0, 1.0, True),
        (1.0, 3.0, False),
        (3.0, 1.0, False),
        (2.0, 2.0, False),
    ],
)
def test_kernel_wins_if_it_is_faster_on_one_clock_and_slower_on_none(
    device: float, wall: float, won: bool
) -> None:
    times, walls = ({"one": [one] * 3, "other": [2.0] * 3} for one in (device, wall))
    assert tuning.wins("one", "other", times, walls) is won


def test_difference_below_the_scatter_is_none() -> None:
    scattered = [1.0, 1.4, 1.8, 2.2, 2.6]
    assert not tuning.faster(scattered, [1.9] * 5)
    assert not tuning.faster([1.7] * 5, scattered)
    assert tuning.faster([0.5] * 5, scattered)


def test_inexact_kernel_cannot_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_kernel = tuning.Products.by_kernel

    def off(self: tuning.Products, product: str, config: Config) -> Call:
        call = by_kernel(self, product, config)
        if product == "output":
            return lambda: (call()[0] * (1 + 1e-4),)  # type: ignore[index]
        if product == "grad_input":
            return lambda: (call()[0].fill_(float("nan")),)  # type: ignore[index]
        return call

    monkeypatch.setattr(tuning.Products, "by_kernel", off)
    path = tmp_path / NAME
    assert run(Clocks(), "--rows", "4") == 0
    won = {product for (product, _), row in rows_of(path).items() if row.candidate != PYTORCH}
    assert won == {"grad_weight", "gradients", "training"}


@pytest.mark.parametrize(
    ("dtype", "activation"), [*((dtype, "none") for dtype in command.DTYPES), ("float16", "gelu")]
)
def test_every_dtype_and_activation_is_measured(
    tmp_path: Path, dtype: str, activation: str
) -> None:
    path = tmp_path / NAME
    given = ("--rows", "4", "--dtypes", dtype, "--activations", activation)
    assert run(Clocks(), *given) == 0
    row = rows_of(path)["output", 4]
    assert row.dtype == ("float32" if dtype == "tf32" else dtype)
    assert row.precision == ("tf32" if dtype == "tf32" else "ieee")
    assert row.activation == (None if activation == "none" else activation)
    # PyTorch rounds no operands to TF32 on a CPU: there not every kernel is as exact.
    assert dtype == "tf32" or type(row.candidate) is Config
    assert torch.get_float32_matmul_precision() == "highest"


def test_second_run_measures_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / NAME
    first, second, third = Clocks(), Clocks(kernel=9.0), Clocks()
    assert run(first, "--rows", "4") == 0
    before = rows_of(path)
    assert run(second, "--rows", "4") == 0
    assert (second.asked, rows_of(path)) == (0, before)
    assert run(third, "--rows", "4", "3", "1") == 0
    assert third.asked == first.asked
    assert {m for _, m in rows_of(path)} == {1, 4}


def test_layers_without_a_bias_have_rows_of_their_own(tmp_path: Path) -> None:
    path, first, second = tmp_path / NAME, Clocks(), Clocks()
    assert run(first, "--rows", "4") == 0
    assert run(second, "--rows", "4", "--no-bias") == 0
    rows = [(row.product, row.bias, type(row.candidate)) for row in tables.read(path).rows]
    both = {(product, bias) for product in tables.PRODUCTS for bias in (True, False)}
    assert {row[:2] for row in rows} == both - {("grad_input", True)}
    single = ("output", "grad_input", "grad_weight")
    assert all((kind is Config) == (product in single) for product, _, kind in rows)
    assert second.asked == first.asked - 2, "grad_input's row serves both"


@pytest.mark.parametrize("kind", ["fails", "is too large"])
def test_what_fails_is_left_out(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    by_kernel = tuning.Products.by_kernel

    def failing(self: tuning.Products, product: str, config: Config) -> Call:
        if product != "output":
            return by_kernel(self, product, config)
        if kind == "fails":
            return lambda: 1 // 0
        return lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("2 TiB"))

    monkeypatch.setattr(tuning.Products, "by_kernel", failing)
    path = tmp_path / NAME
    assert run(Clocks(), "--rows", "4") == 0
    said = "".join(capsys.readouterr())
    if kind == "fails":
        assert "left out, as it fails: output of float32 24x40 4 rows by Config(" in said
        assert rows_of(path)["output", 4].candidate == PYTORCH
        assert rows_of(path)["grad_input", 4].candidate != PYTORCH
    else:
        assert "left out, as it does not fit in memory: float32 24x40 4 rows\n" in said
        assert not path.exists()


def test_interrupted_run_leaves_a_whole_table_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / NAME
    clocks = Clocks()

    def interrupted(calls: dict[str, Call], clock: str) -> dict[str, list[float]]:
        if clocks.asked == 5:
            raise KeyboardInterrupt
        return clocks(calls, clock)

    assert run(interrupted, "--rows", "4") == 130
    assert "goes on from the 2 new rows" in capsys.readouterr().err
    assert {product for product, _ in rows_of(path)} == {"output", "grad_input"}
    assert run(Clocks(), "--rows", "4") == 0
    assert len(rows_of(path)) == 5


def test_time_can_run_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / NAME
    assert run(Clocks(), "--rows", "4", "--minutes", "1e-9") == 0
    assert len(rows_of(path)) == 1
    assert "the time was up: the same call goes on" in capsys.readouterr().out


def test_table_of_other_versions_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / NAME
    assert run(Clocks(), "--rows", "4") == 0
    tables.write(path, tables.read(path)._replace(torch="1.0.0"))
    assert run(Clocks(), "--rows", "1") == 0
    assert "written anew: it was measured with torch 1.0.0" in capsys.readouterr().err
    assert {m for _, m in rows_of(path)} == {1}


def test_user_s_own_table_that_is_broken_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / NAME
    path.write_text('{"format": 1, "rows": [')
    assert run(Clocks(), "--rows", "4") == 0
    assert f"{path} is written anew: " in capsys.readouterr().err
    assert len(rows_of(path)) == 5


def test_folder_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLINEAR_CACHE", str(tmp_path / "file"))
    clocks = Clocks()
    assert run(clocks) == 1
    assert clocks.asked == 0
    assert "cannot use" in capsys.readouterr().err


def test_without_triton_what_pytorch_has_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("backend 'triton' needs the package triton")

    monkeypatch.setattr(launchers, "launchers", missing)
    path = tmp_path / NAME
    assert run(Clocks(), "--rows", "4") == 0
    products = {product for product, _ in rows_of(path)}
    assert products in (set(tables.PRODUCTS) - {"gradients"}, {"output", "training"})


def in_a_process(code: str, *given: str) -> "subprocess.Popen[bytes]":
    program = (
        "import os, signal, sys\n"
        "from fastlinear import __main__ as command\n"
        "asked = 0\n"
        "def measure(calls, clock):\n"
        "    global asked\n"
        "    asked += 1\n"
        f"    {code}\n"
        "    slow = 'pytorch', 'onednn'\n"
        "    return {name: [2.0 if name in slow else 1.0] * 3 for name in calls}\n"
        "sys.exit(command.tune(command.arguments_of(), measure))\n"
    )
    arguments = [sys.executable, "-c", program, "tune", *LAYER, *given]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)


def test_killed_run_leaves_a_whole_table_to_go_on_from(tmp_path: Path) -> None:
    path = tmp_path / NAME
    kill = "asked == 5 and os.kill(os.getpid(), signal.SIGKILL)"
    assert in_a_process(kill, "--rows", "4").wait(120) == -9
    assert {product for product, _ in rows_of(path)} == {"output", "grad_input"}
    clocks = Clocks()
    assert run(clocks, "--rows", "4") == 0
    assert (clocks.asked, len(rows_of(path))) == (6, 5)


def test_two_processes_share_a_table(tmp_path: Path) -> None:
    path = tmp_path / NAME
    both = [in_a_process("pass", "--rows", *rows) for rows in (("1", "4"), ("2", "8"))]
    for process in both:
        assert process.wait(120) == 0
    assert {m for _, m in rows_of(path)} == {1, 2, 4, 8}
    assert len(rows_of(path)) == 20
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--shapes", "4096"], "--shapes takes OUT_FEATURESxIN_FEATURES"),
        (["--shapes", "0x4"], "but got '0x4'"),
        (["--rows", "0"], "--rows takes numbers from 1"),
        (["--minutes", "-1"], "--minutes takes a number above 0, but got -1.0"),
        (["--minutes", "nan"], "--minutes takes a number above 0"),
        (["--dtypes", "float32", "tf32"], "--dtypes takes float32 or tf32, in a call each"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Clocks(), *given) == 2
    assert said in capsys.readouterr().err


def test_common_shapes_are_sorted_by_what_they_are_worth() -> None:
    calls = list(command.calls_of(command.arguments_of(["tune"]), torch.device("cpu")))
    assert len(calls) == 7 * 2 * len(command.ROWS)
    assert tables.in_words(calls[0].key) == "bfloat16 4096x4096 4096 rows"


def test_without_tqdm_each_layer_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run(Clocks(), "--rows", "4") == 0
    assert "1 of 1: float32 24x40 4 rows\n" in capsys.readouterr().err


def test_command_without_a_gpu_measures_the_cpu(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "fastlinear", "tune", "--shapes", "24x40", "--rows", "4"]
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given["FASTLINEAR_CACHE"] = str(tmp_path)
    run += ["--dtypes", "float32"]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, env=given)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.json")
    assert "thread" in tables.read(path).device
    products = {row.product for row in tables.read(path).rows}
    assert products in (set(tables.PRODUCTS) - {"gradients"}, {"output", "training"})
    assert all(row.wall_us == row.device_us > 0 for row in tables.read(path).rows)


def test_command_measures_no_interpreted_kernels() -> None:
    run = [sys.executable, "-m", "fastlinear", "tune", "--shapes", "24x40"]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "measures no interpreted kernels: unset TRITON_INTERPRET" in result.stderr


@pytest.mark.parametrize("product", ["output", "grad_input", "grad_weight", "gradients"])
def test_candidates_are_the_model_s_best(product: str) -> None:
    call = tables.call(torch.float32, True, 24, 40, 4)
    configs = tuning.Products(call, torch.device("cpu")).configs(product)
    assert 1 <= len(configs) <= tuning.CANDIDATES
    assert len(set(configs)) == len(configs)
