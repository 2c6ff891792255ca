"""Launchers: how rows lie in memory, how wide offsets are, what counts as aligned."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from fastlinear.kernels.language.arguments import Matrix
from fastlinear.kernels.launching import launch, shared_sums


def on_no_memory(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def operand(tensor: torch.Tensor) -> launch.Operand:
    return launch.Operand(*launch.describe(tensor)[0])


ROWS = {  # tensor, and (size, stride_row, stride_column), with (inner_size, stride_outer)
    "matrix": (on_no_memory(6, 5), (6, 5, 1)),
    "columns": (on_no_memory(5, 6).t(), (6, 1, 6)),
    "vector": (on_no_memory(5), (1, 0, 1)),
    "contiguous leading dimensions": (on_no_memory(2, 3, 4, 5), (24, 5, 1)),
    "sequence first": (on_no_memory(3, 2, 5).transpose(0, 1), (6, 10, 1, 3, 5)),
    "channels last": (on_no_memory(2, 5, 3, 4).permute(0, 2, 3, 1), (24, 1, 12, 12, 60)),
    "expanded": (on_no_memory(1, 1).expand(6, 5), (6, 0, 0)),
    "expanded leading dimension": (on_no_memory(4, 5).expand(3, 4, 5), (12, 5, 1, 4, 0)),
    "dimensions of one": (on_no_memory(1, 6, 1, 5), (6, 5, 1)),
}


@pytest.mark.parametrize(("tensor", "expected"), ROWS.values(), ids=ROWS)
def test_rows_are_described_without_a_copy(tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    rows = launch.rows_of(operand(tensor))
    assert not rows.copied
    size, *strides = expected
    assert rows.size == size
    assert rows.matrix == Matrix(None, 0, *strides)


def test_no_rows_need_no_copy_however_they_are_nested() -> None:
    assert launch.rows_of(operand(on_no_memory(2, 0, 2, 0, 3, 8))).size == 0


def test_rows_on_three_strides_are_copied_once() -> None:
    rows = launch.rows_of(operand(on_no_memory(2, 3, 4, 5).permute(2, 1, 0, 3)))
    assert rows.copied
    assert rows.operand.strides == (30, 10, 5, 1)
    assert rows.matrix.inner_size is None


def test_batched_rows_keep_their_batch_stride() -> None:
    rows = launch.rows_of(operand(on_no_memory(4, 5).expand(3, 4, 5)), batched=True)
    assert (rows.size, rows.matrix) == (4, Matrix(None, 0, 5, 1))


@pytest.mark.parametrize(
    ("tensor", "wide"),
    [
        # 2**31 elements: the last one's offset is 2**31 - 1.
        (on_no_memory(2**16, 2**15), False),
        (on_no_memory(2**16, 2**15 + 1), True),
        (on_no_memory(2**21, 2**11)[:, :1], True),  # few elements that reach far
        (on_no_memory(1, 1).expand(2**20, 2**20), False),  # many that are one
        (on_no_memory(0, 2**33), False),
    ],
)
def test_offsets_are_as_wide_as_the_storage_needs(tensor: torch.Tensor, wide: bool) -> None:
    assert launch.wide(operand(on_no_memory(3, 4)), None, operand(tensor)) == wide


def test_alignment_is_what_triton_can_prove(device: torch.device) -> None:
    def aligned(*tensors: torch.Tensor) -> bool:
        return launch.aligned(*map(operand, tensors))

    matrix = torch.empty(64, 64, device=device)
    assert aligned(matrix, matrix.t(), matrix[16:, 16:])
    assert not aligned(matrix[:, 1:])  # the address
    assert not aligned(matrix[:, ::2])  # no stride of 1
    assert not aligned(torch.empty(64, 40, device=device)[:, :32])  # the row stride
    assert not aligned(torch.empty(64, 80, device=device)[:, :40])  # the row's size


class OnStream:
    """Stands in for a tensor on a GPU, and for PyTorch's current stream and its capture."""

    device = torch.device("cuda", 0)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = 1, False
        monkeypatch.setattr(shared_sums, "_counters", {})
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=self.stream)
        )

    def new_zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype)

    def counters(self, count: int) -> torch.Tensor:
        return shared_sums.counters(self, count)  # type: ignore[arg-type]


def test_counters_are_each_stream_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    like = OnStream(monkeypatch)
    first = like.counters(5)
    assert like.counters(7) is first
    like.stream = 2
    assert like.counters(5) is not first
    like.stream = 1
    assert like.counters(5) is first


def test_counters_of_few_streams_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    like = OnStream(monkeypatch)
    monkeypatch.setattr(shared_sums, "MOST_STREAMS", 3)
    given = []
    for stream in range(20):
        like.stream = stream
        given.append(like.counters(5))
        assert like.counters(5) is given[-1]
        assert len(shared_sums._counters) <= 3
    assert len({one.data_ptr() for one in given}) == 20, "no two have the same"


def test_counters_of_a_graph_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    like = OnStream(monkeypatch)
    kept = like.counters(5)
    like.capturing = True
    captured = like.counters(5), like.counters(5)
    like.capturing = False
    assert like.counters(5) is kept
    assert len({id(one) for one in (kept, *captured)}) == 3
    assert all(one.dtype == torch.int32 and one.tolist() == [0] * 5 for one in captured)


def test_counters_of_graphs_that_run_in_order_are_their_stream_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    like = OnStream(monkeypatch)
    kept = like.counters(5)
    with shared_sums.replayed_in_order(like.device, 1) as counters:
        assert counters is kept
        like.capturing = True
        assert like.counters(5) is kept
        # What is made within a capture is the graph's, and none that eager calls could take.
        assert like.counters(kept.numel() + 1) is not kept
        like.stream = 2
        assert like.counters(5) is not like.counters(5)
    like.stream = 1
    assert like.counters(5) is not kept, "a user's graph"
    like.capturing = False
    assert like.counters(5) is kept
    assert list(shared_sums._counters) == [(like.device, 1)]


def test_counters_from_the_pool_of_a_graph_of_inductor_s_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It runs a function on a stream of its own before it captures it there."""
    from torch._inductor import cudagraph_trees

    like = OnStream(monkeypatch)
    with ThreadPoolExecutor() as pool:  # of threads that Inductor has nothing for
        assert pool.submit(like.counters, 5).result() is like.counters(5)
    manager = SimpleNamespace(stream=SimpleNamespace(cuda_stream=2))
    monkeypatch.setattr(
        cudagraph_trees, "get_manager", lambda index, create_if_none_exists: manager
    )
    like.stream = 2
    assert like.counters(5) is not like.counters(5)
    like.stream = 1
    assert like.counters(5) is like.counters(5)
    assert list(shared_sums._counters) == [(like.device, 1)]


@pytest.mark.parametrize(
    ("outputs", "whole", "expected"), [(48, True, True), (50, False, True), (50, True, False)]
)
def test_a_product_short_of_registers_is_aligned_with_its_outputs(
    outputs: int, whole: bool, expected: bool, device: torch.device
) -> None:
    input, weight = torch.empty(64, 32, device=device), torch.empty(outputs, 32, device=device)
    operands = operand(input), operand(weight)
    found = launch.aligned_product(*operands, features=(outputs,), whole=whole)
    assert found == expected
