"""Tables of what was measured: reading them, ignoring bad ones, and going by good ones."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastlinear
from fastlinear.choice import backend, known, way
from fastlinear.choice import table as tables
from fastlinear.choice.table import BY_ROWS, PYTORCH, Key, Row, Table
from fastlinear.kernels.backward import grad_weight as backward_weight
from fastlinear.kernels.backward import linear as backward
from fastlinear.kernels.configs.config import BackwardConfig, Config, Traits
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.launching import launch

N, K = 24, 40
TILE = Config(32, 32, 32, num_warps=1, num_stages=1)
SMALL = Config(16, 16, 16, num_warps=1, num_stages=1)
pytestmark = pytest.mark.skipif(not launch.INTERPRETING, reason="the table is the interpreter's")


def row(product: Any, m: int, candidate: Config | str, **changes: Any) -> Row:
    bias = product != "grad_input"
    wanted = "input weight bias" if product == "training" else ""
    key = Key(product, "float32", "ieee", None, bias, wanted, N, K, m)
    return Row(*key, candidate, 2.0, 3.0, 4.0, 5.0)._replace(**changes)


def table(*rows: Row, **changes: Any) -> Table:
    given = Table(known.INTERPRETER, "none", date="2026-01-02", rows=rows, **known.software())
    return given._replace(**changes)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's table of the interpreter is to lie."""
    monkeypatch.setenv("FASTLINEAR_CACHE", str(tmp_path))
    yield tmp_path / "triton-interpreter.json"
    monkeypatch.undo()
    backend.use_tables()
    assert not known.available


@pytest.fixture
def use(path: Path) -> Callable[..., None]:
    def write_and_use(*rows: Row, **changes: Any) -> None:
        tables.write(path, table(*rows, **changes))
        backend.use_tables()

    return write_and_use


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The kernels that are launched, each with its BLOCK_M."""
    found: list[tuple[str, int]] = []
    run = launch.run

    def spy(kernel: Any, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:
        found.append((kernel.__name__, plan.constants.get("BLOCK_M", 0)))
        run(kernel, plan, pointers)

    monkeypatch.setattr(launch, "run", spy)
    return found


def layer_and_input(m: int, **how: Any) -> tuple[fastlinear.Linear, Tensor]:
    return fastlinear.Linear(K, N, **how), torch.randn(m, K)


def assert_like_pytorch(layer: fastlinear.Linear, input: Tensor, output: Tensor) -> None:
    torch.testing.assert_close(output, F.linear(input, layer.weight, layer.bias))


def test_table_survives_being_written_and_read(path: Path) -> None:
    split = dataclasses.replace(SMALL, kind="split_k", splits=3)
    given = table(
        row("output", 4, split),
        row("training", 1, BY_ROWS),
        row("grad_input", 2, PYTORCH),
        row("gradients", 2, BackwardConfig(SMALL, TILE)),
        row("gradients", 4, BY_ROWS),
    )
    tables.write(path, given)
    assert tables.read(path) == given
    assert os.listdir(path.parent) == [path.name]
    assert tables.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


@pytest.mark.parametrize(
    ("m", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1025, 2048)]
)
def test_bucket_is_the_next_power_of_two(m: int, bucket: int) -> None:
    assert tables.bucket(m) == bucket


def spoiled(path: Path, spoil: str) -> None:
    text = tables.as_text(table(row("output", 4, TILE)))
    found = json.loads(text)
    first = found["rows"][0]
    if spoil == "truncated":
        text = text[:-40]
    elif spoil == "no table":
        text = "[1, 2]"
    elif spoil == "deep":
        text = "[" * 100_000
    else:
        name, value = json.loads(spoil)
        if name in first:
            first[name] = value
        elif name in first["candidate"]:
            first["candidate"][name] = value
        else:
            found[name] = value
        text = json.dumps(found)
    path.write_text(text)


@pytest.mark.parametrize(
    "spoil",
    [
        "truncated",
        "no table",
        "deep",
        '["format", 1]',
        '["surprise", 1]',
        '["device", "NVIDIA H100"]',
        '["rows", {}]',
        '["product", "grad_output"]',
        '["dtype", "int8"]',
        '["precision", "../../x"]',
        '["activation", "softmax"]',
        '["bias", 1]',
        '["n", 0]',
        '["n", true]',
        '["m", 3]',
        '["device_us", -1.0]',
        '["wall_us", "fast"]',
        '["wall_us", Infinity]',
        '["candidate", "cutlass"]',
        '["candidate", "kernels"]',
        '["block_m", 1e9]',
        '["candidate", {"input": 1, "weight": 2}]',
        '["candidate", {"block_m": 32, "block_n": 32, "block_k": 32, "num_warps": 1, '
        '"num_stages": 1, "group": 8, "kind": "tiled", "splits": 1, "epilogue_parts": 1, '
        '"warp_specialize": false}]',  # a field that there is no more
        '["kind", "magic"]',
        '["num_warps", 0]',
    ],
)
def test_bad_table_is_ignored_with_one_warning_that_names_it(
    path: Path, spoil: str, launched: list[Any]
) -> None:
    spoiled(path, spoil)
    backend.use_tables()
    layer, input = layer_and_input(4)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match=f"ignores the table {path}"):
            assert_like_pytorch(layer, input, layer(input))
        layer(input)  # a second warning would be an error
    assert not launched


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_table_of_other_software_counts_where_it_gains_more(
    name: str, path: Path, launched: list[tuple[str, int]]
) -> None:
    little, more = (row("output", m, TILE, pytorch_device_us=us) for m, us in ((4, 2.2), (8, 2.4)))
    tables.write(path, table(little, more, **{name: "1.0.0"}))
    backend.use_tables()
    given = [layer_and_input(m) for m in (4, 8, 8)]
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match=rf"{path} only .* 15%: .*{name} 1.0.0"):
            outputs = [layer(input) for layer, input in given]
        for (layer, input), output in zip(given, outputs, strict=True):
            assert_like_pytorch(layer, input, output)
    assert len(launched) == 2
    tables.write(path, table(little, more, **{name: known.software()[name] + ".1+local"}))
    backend.use_tables()
    with torch.no_grad():
        layer, input = layer_and_input(4)
        layer(input)
    assert len(launched) == 3, "a bug fix is the same software"


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_forward_by_the_kernels_has_its_backward_by_them_though_a_table_comes_between(
    activation: str | None, path: Path, launched: list[tuple[str, int]]
) -> None:
    layer, input = layer_and_input(4, activation=activation)
    with fastlinear.use_backend("triton"):
        output = layer(input)
    tables.write(path, table(row("output", 4, PYTORCH)))
    backend.use_tables()
    launched.clear()
    output.sum().backward()
    assert "linear_backward_weight_kernel" in {name for name, _ in launched}


def test_gain_that_is_too_small_or_lost_by_the_caller_does_not_count(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(
        row("output", 4, TILE, pytorch_device_us=2.08),
        row("output", 8, TILE, pytorch_device_us=2.12),
        row("output", 16, TILE, wall_us=5.01),
    )
    with torch.no_grad():
        for m, count in ((4, 0), (8, 1), (16, 1)):
            layer, input = layer_and_input(m)
            assert_like_pytorch(layer, input, layer(input))
            assert len(launched) == count, m


def test_row_of_another_fastlinear_counts_where_the_kernels_are_the_same(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    library, rows = row("output", 8, "onednn"), []
    for kernels, count in ((known.software()["kernels"], 1), ("0" * 16, 0)):
        use(row("output", 4, TILE), library, kernels=kernels, fastlinear="9.0.0")
        for m in (4, 8):
            layer, input = layer_and_input(m)
            with torch.no_grad():
                rows.append(fastlinear.explain(layer, input).path)
                assert_like_pytorch(layer, input, layer(input))
        assert len(launched) == count
        launched.clear()
    assert rows == ["fastlinear.kernels", "onednn", "torch.nn.functional.linear", "onednn"]


def test_row_that_cannot_be_launched_here_is_ignored(use: Callable[..., None]) -> None:
    use(row("output", 4, dataclasses.replace(TILE, block_k=48)), row("output", 8, TILE))
    assert {key.m for key in known.rows(torch.device("cpu"))} == {8}


def test_tables_that_change_while_they_are_looked_into_count(
    use: Callable[..., None], launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another thread tunes."""
    use(row("output", 64, TILE))
    layer, input = layer_and_input(4)
    find = known.rows

    def found(device: torch.device) -> Any:
        rows = find(device)
        monkeypatch.setattr(known, "rows", find)
        use(row("output", 4, TILE))
        return rows

    monkeypatch.setattr(known, "rows", found)
    with torch.no_grad():
        layer(input)
        launched.clear()
        layer(input)
    assert len(launched) == 1


@pytest.mark.parametrize("num_warps", [3, 64, 1024])
def test_row_with_a_number_of_warps_that_no_program_has_is_ignored(
    num_warps: int, use: Callable[..., None]
) -> None:
    impossible = dataclasses.replace(TILE, num_warps=num_warps)
    use(
        row("output", 4, impossible),
        row("output", 8, dataclasses.replace(impossible, kind="split_k")),
        row("gradients", 4, BackwardConfig(impossible, impossible)),
        row("output", 16, TILE),
    )
    assert {key.m for key in known.rows(torch.device("cpu"))} == {16}
    assert known.files(torch.device("cpu")).popitem()[1] == 1


class Chosen(Exception):
    """In the place of a choice, with the traits that a launcher made for it."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize(
    ("n", "k", "m"),
    [
        (64, 32, 4),
        (24, 32, 4),
        (40, 24, 16),
        (25, 32, 4),
        (32, 20, 4),
        (24, 2**10, 2**22),  # input of 2**32 elements
        (2**20, 2**11, 1),  # weight of 2**31, the last one at 2**31 - 1
        (2**20, 2**11 + 16, 1),
        (2**16 + 8, 16, 2**15),  # output
    ],
)
@pytest.mark.parametrize("product", ["output", "relu", "grad_input", "grad_weight", "gradients"])
def test_traits_are_the_launchers(
    product: str, n: int, k: int, m: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choice(*given: Any, **how: Any) -> Any:
        raise Chosen(*(one for one in given if isinstance(one, Traits)))

    for launcher, name in (
        (forward, "choose"),
        (backward, "choose_backward"),
        (backward_weight, "choose"),
    ):
        monkeypatch.setattr(launcher, name, choice)
    activation = "relu" if product == "relu" else None
    key = Key("output" if activation else product, dtype, "ieee", activation, False, "", n, k, m)
    target = launch.target_of(torch.device("cpu"))
    expected = tables.traits_of(key, target)

    def fields(rows: int, columns: int) -> Any:
        of_dtype, device = getattr(torch, dtype), torch.device("cpu")
        return (torch.Size((rows, columns)), (columns, 1), of_dtype, device, True)

    input, weight, grad = fields(m, k), fields(n, k), fields(m, n)
    transposed = (torch.Size((k, n)), (1, k), *weight[2:])
    by_forward = forward.plan_forward.__wrapped__
    plans: dict[str, Callable[[], Any]] = {
        "output": lambda: by_forward((input, weight, None), "ieee", activation, False, None),
        "grad_input": lambda: by_forward((grad, transposed, None), "ieee", None, False, None),
        "grad_weight": lambda: backward_weight.plan_backward_weight.__wrapped__(
            (grad, input, None), False, False, "ieee", None, None
        ),
        "gradients": lambda: backward.plan_backward.__wrapped__(
            (grad, weight, input), None, False, False, "ieee", None, None, False
        ),
    }
    with pytest.raises(Chosen) as chosen:
        plans[key.product]()
    (found,) = chosen.value.args
    if product == "grad_weight":
        expected = expected._replace(descriptors=False)  # no kernel of its takes them
    assert found == expected


def test_auto_takes_the_kernel_where_a_row_says_so(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(row("output", 4, SMALL), row("output", 8, TILE), row("output", 16, PYTORCH))
    for m, blocks in ((2, []), (3, [16]), (4, [16]), (5, [32]), (8, [32]), (9, []), (40, [])):
        layer, input = layer_and_input(m)
        with torch.no_grad():
            assert_like_pytorch(layer, input, layer(input))
        assert [block for _, block in launched] == blocks, f"{m} rows"
        launched.clear()


@pytest.mark.parametrize(
    "case",
    [
        "no gradient row",
        "other dtype",
        "other shape",
        "transposed",
        "unaligned",
        "no bias",
        "torch",
        "subclass",
    ],
)
def test_auto_takes_pytorch_for_what_was_not_measured(
    case: str, use: Callable[..., None], launched: list[Any]
) -> None:
    use(row("output", 4, TILE))
    layer, input = layer_and_input(4)
    with torch.set_grad_enabled(case == "no gradient row"):
        if case == "other dtype":
            layer, input = layer.double(), input.double()
        elif case == "other shape":
            layer, input = fastlinear.Linear(K + 1, N), torch.randn(4, K + 1)
        elif case == "transposed":
            input = torch.randn(K, 4).t()
        elif case == "unaligned":
            input = torch.randn(4 * K + 1)[1:].view(4, K)
        elif case == "no bias":
            layer = fastlinear.Linear(K, N, bias=False)
        elif case == "subclass":
            input = input.as_subclass(type("Mine", (Tensor,), {}))
        with fastlinear.use_backend("torch" if case == "torch" else "auto"):
            layer(input)
            if case != "subclass":
                explained = fastlinear.explain(layer, input)
                assert explained.path == "torch.nn.functional.linear", "not even the op is called"
    assert not launched


def test_each_product_takes_its_own_candidate(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(
        row("training", 4, BY_ROWS),
        row("output", 4, PYTORCH),
        row("grad_input", 4, SMALL),
        row("grad_weight", 4, PYTORCH),
    )
    layer, input = layer_and_input(4)
    input.requires_grad_()
    output = layer(input)
    assert not launched
    grad_output = torch.randn(4, N)
    gradients = torch.autograd.grad(output, [input, layer.weight, layer.bias], grad_output)
    assert launched == [("linear_forward_kernel", 16)]
    expected = torch.autograd.grad(
        F.linear(input, layer.weight, layer.bias), [input, layer.weight, layer.bias], grad_output
    )
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("case", ["both", "input alone", "expanded", "triton"])
def test_both_gradients_take_one_launch_where_a_row_says_so(
    case: str, use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(row("training", 4, BY_ROWS), row("gradients", 4, BackwardConfig(SMALL, TILE)))
    layer, input = layer_and_input(4)
    input.requires_grad_()
    layer.requires_grad_(case != "input alone")
    wanted = [one for one in (input, layer.weight, layer.bias) if one.requires_grad]
    grad_output = torch.randn(1, N).expand(4, N) if case == "expanded" else torch.randn(4, N)
    with fastlinear.use_backend("triton" if case == "triton" else "auto"):
        explained = fastlinear.explain(layer, input)
        output = layer(input)
        launched.clear()
        gradients = torch.autograd.grad(output, wanted, grad_output)
    blocks = [product.config.block_m for product in explained.products[1:] if product.config]
    assert blocks == ([] if case == "input alone" else [16, 32])
    one = case in ("both", "triton")
    assert [name for name, _ in launched] == ["linear_backward_kernel"] * one
    output = F.linear(input, layer.weight, layer.bias)
    torch.testing.assert_close(gradients, torch.autograd.grad(output, wanted, grad_output))


def test_backward_goes_by_the_backend_of_its_forward(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(row("training", 4, BY_ROWS), row("output", 4, SMALL), row("grad_weight", 4, PYTORCH))
    layer, input = layer_and_input(4)
    with fastlinear.use_backend("triton"):
        output = layer(input)
    launched.clear()
    output.backward(torch.randn(4, N))
    assert {name for name, _ in launched} >= {"linear_backward_weight_kernel"}, "never PyTorch"
    output = layer(input)
    launched.clear()
    with fastlinear.use_backend("triton"):
        output.backward(torch.randn(4, N))
    assert not launched, "the row says PyTorch"


def test_second_backward_goes_by_the_backend_of_the_forward(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(row("training", 4, BY_ROWS), row("output", 4, SMALL), row("grad_weight", 4, PYTORCH))
    layer, input = layer_and_input(4)
    input.requires_grad_()

    def launches_of_second(backend: str) -> list[str]:
        with fastlinear.use_backend("triton"):
            output = layer(input)
        with fastlinear.use_backend(backend):
            (first,) = torch.autograd.grad(output.pow(2).sum(), input, create_graph=True)
            launched.clear()
            first.pow(2).sum().backward()
        return [name for name, _ in launched]

    assert launches_of_second("auto") == launches_of_second("triton") != []


@pytest.mark.usefixtures("triton_backend")
def test_triton_takes_rows_and_never_pytorch(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(row("output", 4, SMALL), row("output", 8, PYTORCH))
    for m, block in ((4, 16), (8, 32), (16, 32)):
        layer, input = layer_and_input(m)
        with torch.no_grad():
            for _ in range(2):  # the second by the shortcut
                assert_like_pytorch(layer, input, layer(input))
        if block == 16:
            assert launched == [("linear_forward_kernel", 16)] * 2
        assert len(launched) == 2
        launched.clear()


def test_shortcuts_do_not_outlive_the_table_they_were_made_by(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    layer, input = layer_and_input(4)
    for config in (SMALL, TILE):
        use(row("output", 4, config))
        with torch.no_grad():
            layer(input)
            layer(input)
    assert [block for _, block in launched] == [16, 16, 32, 32]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("candidate", [SMALL, PYTORCH], ids=["kernel", "pytorch"])
def test_activation_has_rows_of_its_own(
    activation: str,
    candidate: Config | str,
    use: Callable[..., None],
    launched: list[tuple[str, int]],
) -> None:
    use(
        row("training", 4, BY_ROWS, activation=activation),
        row("output", 4, candidate, activation=activation),
        row("grad_weight", 4, SMALL),
    )
    layer, input = layer_and_input(4, activation=activation)
    input.requires_grad_()
    output = layer(input)
    assert [name for name, _ in launched] == ["linear_forward_kernel"] * (candidate != PYTORCH)
    grad_output = torch.randn(4, N)
    given = [input, layer.weight, layer.bias]
    gradients = torch.autograd.grad(output, given, grad_output)
    assert ("linear_backward_weight_kernel", 16) in launched
    with fastlinear.use_backend("torch"):
        expected = layer(input)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, given, grad_output))


def test_autocast_looks_its_own_dtype_up(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(row("output", 4, SMALL, dtype="bfloat16"))
    layer, input = layer_and_input(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(input).dtype == torch.bfloat16
    assert len(launched) == 1
    with torch.no_grad():
        layer(input)
    assert len(launched) == 1


def test_precision_is_part_of_what_was_measured(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(row("output", 4, SMALL, precision="tf32"))
    layer, input = layer_and_input(4)
    with torch.no_grad():
        layer(input)
        assert not launched
        torch.set_float32_matmul_precision("high")
        layer(input)
    assert len(launched) == 1


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_function_chooses_when_it_runs(
    compiler: str, use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(row("output", 4, SMALL), row("output", 8, SMALL))
    layer = fastlinear.Linear(K, N)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=compiler, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for m in (2, 3, 4, 6, 8, 9, 33, 5):
            launched.clear()
            input = torch.randn(m, K)
            assert_like_pytorch(layer, input, compiled(input))
            assert len(launched) == (2 < m <= 8), f"{m} rows"


def test_gaps_between_rows_compile_nothing_again(use: Callable[..., None]) -> None:
    use(*(row("output", 4**power, SMALL) for power in range(5)))
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = fastlinear.Linear(K, N)
    compiled = torch.compile(layer, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for m in (2, 3, 5, 9, 17, 33, 65, 129, 200, 400):
            compiled(torch.randn(m, K))
    assert counter.frame_count == 1


def test_operands_of_symbolic_sizes_compile(use: Callable[..., None]) -> None:
    use(row("output", 4, SMALL))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *operands: fastlinear.linear(*operands),
        dynamic=True,
        fullgraph=True,
        backend="eager",
    )
    for n in (N, N + 3):
        operands = torch.randn(4, K), torch.randn(n, K), torch.randn(n)
        torch.testing.assert_close(compiled(*operands), F.linear(*operands))


def test_what_is_traced_or_exported_runs_without_the_table(use: Callable[..., None]) -> None:
    use(row("output", 4, SMALL))
    layer, input = fastlinear.Linear(K, N).requires_grad_(False), torch.randn(4, K)
    traced = torch.jit.trace(layer, input)
    rows = torch.export.Dim("rows", min=1, max=64)
    for strict in (False, True):
        exported = torch.export.export(
            layer, (input,), dynamic_shapes={"input": {0: rows}}, strict=strict
        )
        assert "fastlinear" not in str(exported.graph)
        other = torch.randn(9, K)
        assert_like_pytorch(layer, other, exported.module()(other))
    assert_like_pytorch(layer, input, traced(input))


def test_threads_read_the_table_alike(use: Callable[..., None]) -> None:
    use(row("output", 4, SMALL))
    found: list[Any] = []
    key = Key("output", "float32", "ieee", None, True, "", N, K, 3)
    threads = [
        threading.Thread(target=lambda: found.append(known.row(torch.device("cpu"), key)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.row.candidate for one in found] == [SMALL] * 8


def test_explain_shows_the_row(use: Callable[..., None], path: Path) -> None:
    use(row("output", 4, SMALL), row("grad_input", 4, PYTORCH))
    layer, input = layer_and_input(4)
    with torch.no_grad():
        said = fastlinear.explain(layer, input)
    assert said.path == "fastlinear.kernels"
    (output,) = said.products
    assert (output.config, output.microseconds) == (SMALL, 2.0)
    for part in ("a table says", "2 us", "PyTorch 3 us", str(path), "2026-01-02"):
        assert part in str(said)
    with torch.no_grad():
        assert fastlinear.explain(layer, torch.randn(9, K)).path == "torch.nn.functional.linear"
    from fastlinear.explanation import info

    assert f"{path} (2 rows)" in info()["tables"]["cpu"]


def test_explained_launches_by_a_table_are_those_that_happen(
    use: Callable[..., None], launched: list[tuple[str, int]]
) -> None:
    use(row("training", 4, BY_ROWS), row("grad_input", 4, SMALL))
    layer, input = layer_and_input(4)
    input.requires_grad_()
    said = fastlinear.explain(layer, input)
    layer(input).backward(torch.randn(4, N))
    expected = [
        (product.kernel, product.config.block_m) for product in said.products if product.config
    ]
    assert launched == expected == [("linear_forward_kernel", 16)]


def test_user_s_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLINEAR_CACHE", "/a")
    assert known.user_folder() == Path("/a")
    monkeypatch.delenv("FASTLINEAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert known.user_folder() == Path("/b/fastlinear")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert known.user_folder() == Path("/c/.cache/fastlinear")


@pytest.mark.parametrize("user", ["cannot be looked into", "has no home"])
def test_shipped_table_counts_where_the_user_s_folder_does_not(
    user: str, path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[tuple[str, int]]
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    tables.write(path, table(row("output", 4, SMALL)))
    monkeypatch.setattr(known, "SHIPPED", path.parent)
    if user == "has no home":
        monkeypatch.delenv("FASTLINEAR_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", unknown)
    else:
        monkeypatch.setenv("FASTLINEAR_CACHE", "/" + 300 * "x")  # refused to root, too
    backend.use_tables()
    assert known.available
    layer, input = layer_and_input(4)
    with torch.no_grad():
        assert_like_pytorch(layer, input, layer(input))
    assert [block for _, block in launched] == [16]


def test_table_is_found_when_a_process_starts(path: Path) -> None:
    tables.write(path, table(row("output", 4, TILE)))
    code = (
        "import torch, fastlinear\n"
        "with torch.no_grad(): fastlinear.Linear(40, 24)(torch.randn(4, 40))\n"
        "import sys; print('triton' in sys.modules)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTLINEAR_CACHE": str(path.parent)}
    run = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "True", result.stderr


def test_without_a_table_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(way, "takes_ours", None)  # to call it would raise
    layer, input = layer_and_input(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_like_pytorch(layer, input, layer(input))
