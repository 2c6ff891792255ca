"""Fixtures of what PyTorch does to a call: its compilers, and what runs."""

from collections.abc import Iterator
from typing import Any

import pytest
from networks import Function
from torch import Tensor

from fastlinear.kernels.launching import launch


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """torch._dynamo, which has compiled nothing yet."""
    import torch._dynamo

    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.fixture
def cpp_compiler() -> None:
    """What inductor needs: on a CPU it writes C++."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("inductor finds no C++ compiler")


@pytest.fixture
def plain_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels write to plain tensors, not to the suite's guarded ones."""
    monkeypatch.setattr(
        launch,
        "allocate",
        lambda like, output: like.new_empty(output.shape, dtype=output.dtype),
    )


@pytest.fixture
def kernels_ran(monkeypatch: pytest.MonkeyPatch) -> Function:
    """Says whether a kernel has run since it was last asked."""
    outputs: list[tuple[int, ...]] = []
    allocate = launch.allocate

    def recording(like: Tensor, output: launch.Operand) -> Tensor:
        outputs.append(output.shape)
        return allocate(like, output)

    def since_last_asked() -> bool:
        ran = bool(outputs)
        outputs.clear()
        return ran

    monkeypatch.setattr(launch, "allocate", recording)
    return since_last_asked


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """Of each launch the kernel's name, and the addresses of the tensors that it is given."""
    launches: list[tuple[str, list[int]]] = []
    run_kernel = launch.run

    def run(kernel: Any, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in pointers]
        launches.append((kernel.fn.__name__, addresses))
        run_kernel(kernel, plan, pointers)

    monkeypatch.setattr(launch, "run", run)
    return launches
