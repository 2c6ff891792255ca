"""Ranks of a process group go by the tables of one of them.

test_distributed.py has it with processes; here the others are what they have put into the store.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastlinear
from fastlinear import _machine as machine
from fastlinear import _ranks as ranks
from fastlinear import _torch_internals as internals
from fastlinear.choice import backend, known
from fastlinear.choice import table as tables
from fastlinear.choice.table import Row, Table
from fastlinear.kernels.configs.config import Config
from fastlinear.kernels.launching import launch
from fastlinear.ops import implementations

N, K = 10, 20
pytestmark = pytest.mark.skipif(not launch.INTERPRETING, reason="the table is the interpreter's")
KEY = f"fastlinear/tables/{machine.INTERPRETER}"


def table(block_m: int) -> Table:
    """For 4 rows, the output by a kernel of so many rows a block."""
    config = Config(block_m, 16, 16, num_warps=1, num_stages=1)
    row = Row("output", "float32", "ieee", None, True, "", N, K, 4, config, 1.0, 2.0, 1.0, 2.0)
    return Table(machine.INTERPRETER, "none", date="2026-01-02", rows=(row,), **machine.software())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this rank's tables are to lie."""
    monkeypatch.setenv("FASTLINEAR_CACHE", str(tmp_path))
    yield tmp_path
    monkeypatch.undo()
    backend.use_tables()


@pytest.fixture
def own(folder: Path) -> Path:
    """This rank's table."""
    path = folder / tables.file_name(machine.INTERPRETER)
    tables.write(path, table(32))
    backend.use_tables()
    return path


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dist.Store]:
    """Makes this process one of two."""

    def join(store: Any = None) -> dist.Store:
        store = dist.HashStore() if store is None else store
        monkeypatch.setattr(ranks, "in_group", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(internals, "default_store", lambda: store)
        monkeypatch.setattr(ranks, "group", lambda: id(store))
        return store

    return join


def chosen() -> int | None:
    """Rows of a block in the kernel that computes 4 rows, or None where PyTorch does."""
    layer, input = fastlinear.Linear(K, N), torch.randn(4, K)
    config = implementations._of_output(input, layer.weight, layer.bias)
    return config.block_m if isinstance(config, Config) else None


def as_another_wrote(*given: Table) -> str:
    return json.dumps([(f"/theirs/{i}.json", tables.as_text(one)) for i, one in enumerate(given)])


def test_alone_a_process_goes_by_its_own(own: Path) -> None:
    assert chosen() == 32


def test_the_first_rank_puts_its_tables_into_the_store(
    own: Path, join: Callable[..., dist.Store]
) -> None:
    store = join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == 32
    assert json.loads(store.get(KEY)) == [[str(own), tables.as_text(table(32))]]


def test_the_others_go_by_the_first_one_s(own: Path, join: Callable[..., dist.Store]) -> None:
    store = join()
    store.set(KEY, as_another_wrote(table(64)))
    with pytest.warns(RuntimeWarning, match=r"/theirs/0.json, and not by this rank's, .*all ranks"):
        assert chosen() == 64
    assert [str(path) for path in known.files(torch.device("cpu"))] == ["/theirs/0.json"]


def test_where_the_first_has_none_nobody_has(own: Path, join: Callable[..., dist.Store]) -> None:
    join().set(KEY, as_another_wrote())
    with pytest.warns(RuntimeWarning, match="tables for Triton interpreter, none, and not by"):
        assert chosen() is None


def test_a_rank_without_tables_gets_them_too(folder: Path, join: Callable[..., dist.Store]) -> None:
    """Once there is a group, the first layer that is made has it look for them."""
    backend.use_tables()
    assert not known.available
    join().set(KEY, as_another_wrote(table(64)))
    layer = fastlinear.Linear(K, N)
    assert known.available
    with pytest.warns(RuntimeWarning, match="another rank's"):
        assert chosen() == 64
    with torch.no_grad():
        assert "/theirs/0.json" in str(fastlinear.explain(layer, torch.randn(4, K)))


def test_ranks_without_tables_ask_once(folder: Path, join: Callable[..., dist.Store]) -> None:
    store = join()
    fastlinear.Linear(K, N)
    assert chosen() is None
    assert json.loads(store.get(KEY)) == []
    fastlinear.Linear(K, N)
    assert not known.available
    assert backend.settings is internals.float32_matmul_precision


def test_tables_that_were_read_before_there_was_a_group(
    own: Path, join: Callable[..., dist.Store]
) -> None:
    assert chosen() == 32
    join().set(KEY, as_another_wrote(table(64)))
    with pytest.warns(RuntimeWarning, match="another rank's"):
        assert chosen() == 64


def test_another_group_agrees_anew(own: Path, join: Callable[..., dist.Store]) -> None:
    join()
    assert chosen() == 32
    join().set(KEY, as_another_wrote(table(64)))
    with pytest.warns(RuntimeWarning, match="another rank's"):
        assert chosen() == 64


def test_another_group_may_have_tables(folder: Path, join: Callable[..., dist.Store]) -> None:
    join()
    fastlinear.Linear(K, N)
    assert chosen() is None
    assert not known.available
    join().set(KEY, as_another_wrote(table(64)))
    with pytest.warns(RuntimeWarning, match="another rank's"):
        fastlinear.convert(torch.nn.Linear(K, N))  # its report asks
    assert chosen() == 64


def test_the_same_table_from_another_place_is_the_same(
    own: Path, join: Callable[..., dist.Store]
) -> None:
    join().set(KEY, as_another_wrote(table(32)))
    assert chosen() == 32  # a warning would be an error


def test_a_store_that_cannot_agree(own: Path, join: Callable[..., dist.Store]) -> None:
    class Fake:
        def compare_set(self, *given: str) -> bytes:
            raise RuntimeError("this store cannot")

    join(Fake())
    with pytest.warns(RuntimeWarning, match="this store cannot; each goes by its own"):
        assert chosen() == 32


@pytest.mark.parametrize(("size", "expected"), [("2", True), ("1", False), (None, False)])
def test_under_torchrun_other_ranks_are_expected(
    size: str | None, expected: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what it sets in the environment, before there is a group."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    backend.use_tables()
    assert known.available is expected
