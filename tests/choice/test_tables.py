"""Tables of what was measured: reading them, finding them, and ignoring bad ones."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import SMALL, TILE, assert_like_pytorch, layer_and_input, row, table

import fastlinear
from fastlinear import _machine as machine
from fastlinear._files import user_folder
from fastlinear.choice import backend, known, way
from fastlinear.choice import table as tables
from fastlinear.choice.table import BY_ROWS, PYTORCH
from fastlinear.kernels.backward import grad_weight as backward_weight
from fastlinear.kernels.backward import linear as backward
from fastlinear.kernels.configs.config import BackwardConfig, Traits
from fastlinear.kernels.configs.products import traits_of
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.launching import launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETING, reason="the table is the interpreter's")


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
    tables.write(path, table(little, more, **{name: machine.software()[name] + ".1+local"}))
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
    for kernels, count in ((machine.software()["kernels"], 1), ("0" * 16, 0)):
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
    product = "output" if activation else product
    of_dtype, target = getattr(torch, dtype), launch.target_of(torch.device("cpu"))
    expected = traits_of(product, n, k, m, of_dtype, "ieee", target, activation)

    def fields(rows: int, columns: int) -> Any:
        device = torch.device("cpu")
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
        plans[product]()
    (found,) = chosen.value.args
    if product == "grad_weight":
        expected = expected._replace(descriptors=False)  # no kernel of its takes them
    assert found == expected


def test_user_s_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLINEAR_CACHE", "/a")
    assert user_folder() == Path("/a")
    monkeypatch.delenv("FASTLINEAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert user_folder() == Path("/b/fastlinear")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert user_folder() == Path("/c/.cache/fastlinear")


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
