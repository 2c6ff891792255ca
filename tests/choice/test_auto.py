"""The backend "auto": kernels where a row of a table says so, else PyTorch."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_up import SMALL, TILE, K, N, assert_like_pytorch, layer_and_input, row
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastlinear
from fastlinear.choice import known
from fastlinear.choice.table import BY_ROWS, PYTORCH, Key
from fastlinear.kernels.configs.config import BackwardConfig, Config
from fastlinear.kernels.launching import launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETING, reason="the table is the interpreter's")


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
