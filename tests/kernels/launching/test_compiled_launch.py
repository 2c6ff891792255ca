"""Launches that go straight to the compiled kernel: always the one that Triton would take.

Triton's compiler and launcher are stood in for, so that no GPU is needed and what would be launched
can be looked at; what Triton specialises on is asked of Triton.
"""

import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton._C.libtriton import native_specialize_impl
from triton.backends.amd.compiler import HIPBackend
from triton.backends.nvidia.compiler import CUDABackend

import fastlinear
from fastlinear.choice import way
from fastlinear.kernels.backward import grad_weight as backward_weight
from fastlinear.kernels.backward import grouped
from fastlinear.kernels.backward import linear as backward
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.language.indexing import locate_tile
from fastlinear.kernels.launching import compiled_launch, launch

STREAM = 77


class Launched(NamedTuple):
    """What got to the launcher. direct: not by Triton's own way."""

    direct: bool
    compiled: Any
    grid: tuple[int, ...]
    stream: int
    arguments: list[Any]


def addressed(argument: Any) -> Any:
    """Launchers take addresses as well as tensors, and 0 for None."""
    if argument is None:
        return 0
    if isinstance(argument, tuple):  # a Matrix, as good as a plain one
        return tuple(map(addressed, argument))
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


class Triton:
    """Stands in for Triton: it compiles nothing, and notes down what it is told to launch."""

    def __init__(self, backend: type = CUDABackend) -> None:
        self.backend = backend
        self.compiled: dict[Any, Any] = {}
        self.launches: list[Launched] = []

    def specialised(self, kernel: Any, arguments: Any, constants: dict[str, Any]) -> Any:
        """What a kernel compiled for these arguments is good for, in Triton's own words."""
        kinds = [native_specialize_impl(self.backend, one, False, True, True) for one in arguments]
        return id(kernel), tuple(kinds), repr(sorted(constants.items()))

    def run(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        """In the place of JITFunction.run."""
        self.fusion = constants.pop("enable_fp_fusion", "Triton's own")
        key = self.specialised(kernel, arguments, constants)
        if key not in self.compiled:
            self.compiled[key] = SimpleNamespace(
                run=partial(self.take, key), function=id(key), packed_metadata=("of", id(key))
            )
        constexprs = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        given = [addressed(one) for one in (*arguments, *constexprs)]
        self.launches.append(Launched(False, key, (*grid, 1, 1)[:3], STREAM, given))
        return self.compiled[key]

    def take(self, key: Any, *given: Any) -> None:
        """In the place of the launcher of a compiled kernel."""
        *grid, stream, function, metadata, launch_metadata, enter, leave = given[:9]
        compiled = self.compiled[key]
        assert (function, metadata) == (compiled.function, compiled.packed_metadata)
        assert (launch_metadata, enter, leave) == (None, None, None)
        arguments = [addressed(one) for one in given[9:]]
        self.launches.append(Launched(True, key, tuple(grid), stream, arguments))

    def checked_run(self, kernel: Any, launched: launch.Launch, pointers: Any) -> None:
        """`launch.run`, whose way must make no difference to what is launched."""
        count = len(self.launches)
        compiled_launch.run(kernel, launched, pointers)
        (found,) = self.launches[count:]
        arguments = launched.arguments(pointers)
        assert found.compiled == self.specialised(kernel, arguments, launched.constants)
        constexprs = [launched.constants[name] for name in kernel.arg_names[len(arguments) :]]
        assert found.arguments == [addressed(one) for one in (*arguments, *constexprs)]
        assert found.grid == (*launched.grid, 1, 1)[:3]
        assert found.stream == STREAM

    @property
    def ways(self) -> str:
        """T for every launch by Triton's own way, d for every direct one."""
        return "".join("d" if one.direct else "T" for one in self.launches)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Triton:
    """Launches get there, of kernels that nothing has been compiled for yet."""
    stub = Triton()
    driver = SimpleNamespace(get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(compiled_launch, "DIRECT", True)
    monkeypatch.setattr(launch, "run", stub.checked_run)
    monkeypatch.setattr(
        type(locate_tile), "run", lambda kernel, *given, **named: stub.run(kernel, *given, **named)
    )
    forget_plans()
    monkeypatch.setattr(way, "_ways", {})
    return stub


def forget_plans() -> None:
    forward.plan_forward.cache_clear()
    backward.plan_backward.cache_clear()
    backward_weight.plan_backward_weight.cache_clear()


@pytest.fixture(autouse=True)
def plans_of_this_test_only() -> Iterator[None]:
    yield
    forget_plans()


def operands(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Inputs (4, 16) whose memory lies in all ways."""
    matrix = torch.randn(64, 64, device=device)
    return {
        "fresh": lambda: torch.randn(4, 16, device=device),
        "rows": lambda: matrix[8:12, :16],
        "columns at 64 bytes": lambda: matrix[:4, 16:32],
        "columns at 4 bytes": lambda: matrix[:4, 1:17],
        "transposed": lambda: matrix[:16, :4].t(),
        "of a cat": lambda: torch.cat([matrix[:3, :16], matrix[:5, :16]])[2:6],
        "of a cat, at 4 bytes": lambda: torch.cat([matrix[0, :1], matrix[0, :64]])[1:].view(4, 16),
        "one row for all": lambda: matrix[0, :16].expand(4, 16),
    }


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_views_launch_what_triton_would_launch(
    biased: bool, stub: Triton, device: torch.device, triton_backend: None
) -> None:
    layer = fastlinear.Linear(16, 8, bias=biased, device=device)
    for _ in range(2):
        launches = len(stub.launches)
        for make in operands(device).values():
            layer(make().requires_grad_()).sum().backward()
    assert set(stub.ways[launches:]) == {"d"}
    assert len({one.compiled for one in stub.launches}) > 3


def test_other_sizes_never_launch_a_kernel_specialised_on_theirs(
    stub: Triton, device: torch.device, triton_backend: None
) -> None:
    for rows, features, outputs in itertools.product((1, 2, 15, 16, 17), (1, 16, 18), (1, 32)):
        layer = fastlinear.Linear(features, outputs, device=device)
        for _ in range(2):
            layer(torch.randn(rows, features, device=device)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_never_launch_each_others_kernels(
    dtype: torch.dtype, stub: Triton, device: torch.device, triton_backend: None
) -> None:
    layer = fastlinear.Linear(64, 4, device=device)
    for kind, needed in itertools.product((torch.float32, dtype) * 2, (True, False)):
        # So many rows that they are summed in several parts.
        input = torch.randn(4096, 64, dtype=kind, device=device, requires_grad=needed)
        layer.to(kind)(input).sum().backward()
    for kernel in (grouped.linear_backward_kernel, backward_weight.linear_backward_weight_kernel):
        launches = [one for one in stub.launches if one.compiled[0] == id(kernel)]
        assert any(one.direct for one in launches)


def test_gated_and_activated_layers_launch_directly(
    stub: Triton, device: torch.device, triton_backend: None
) -> None:
    input = torch.randn(8, 16, device=device, requires_grad=True)
    gate, up = (torch.randn(32, 16, device=device, requires_grad=True) for _ in range(2))
    activated = fastlinear.Linear(16, 32, device=device, activation="gelu")
    for call in (lambda: fastlinear.gated_linear(input, gate, up), lambda: activated(input)):
        call().sum().backward()
        launches = len(stub.launches)
        call().sum().backward()
        assert set(stub.ways[launches:]) == {"d"}


MOVES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "data": lambda weight, other: setattr(weight, "data", other),
    "set_": lambda weight, other: weight.set_(other),
    "data, transposed": lambda weight, other: setattr(weight, "data", other.t()),
    "data, unaligned": lambda weight, other: setattr(
        weight, "data", torch.cat([other.flatten(), other[0]])[1:257].view(16, 16)
    ),
    "copy_": lambda weight, other: weight.copy_(other),
    "resize_": lambda weight, other: weight.requires_grad_(False).resize_(2 * len(weight), 16),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@torch.no_grad()
def test_a_weight_that_moved_is_found_where_it_is(
    move: Callable[[Tensor, Tensor], object],
    stub: Triton,
    device: torch.device,
    triton_backend: None,
) -> None:
    layer = fastlinear.Linear(16, 16, bias=False, device=device)
    input = torch.randn(4, 16, device=device)
    for _ in range(3):
        layer(input)
    for _ in range(2):
        move(layer.weight, torch.randn(16, 16, device=device))
        for _ in range(2):
            layer(input)
            assert stub.launches[-1].arguments[1][0] == layer.weight.data_ptr()


@triton.jit
def some_kernel(first_ptr, second_ptr, third_ptr, size, BLOCK: triton.language.constexpr):
    """Never run."""


def a_launch() -> launch.Launch:
    return launch.Launch((5,), (16,), {"BLOCK": 32, "num_warps": 4})


def three(offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Tensors that start so many elements of 4 bytes past an address that divides by 16."""
    return tuple(torch.empty(64, device=device)[offset:] for offset in offsets)


def test_the_alignment_of_every_pointer_counts(stub: Triton, device: torch.device) -> None:
    launched = a_launch()
    choices = list(itertools.product((0, 1), repeat=3))
    for offsets in choices * 2 + [(4, 0, 8), (3, 2, 1)]:
        launch.run(some_kernel, launched, three(offsets, device))
    assert stub.ways == "T" * 8 + "d" * 10


def test_another_kernel_is_not_taken_for_the_first(stub: Triton, device: torch.device) -> None:
    launched, pointers = a_launch(), three((0, 0, 0), device)
    other = triton.jit(some_kernel.fn)
    for kernel in (some_kernel, other, other, some_kernel):
        launch.run(kernel, launched, pointers)
    assert stub.ways == "TTdT"


@pytest.mark.parametrize(("setting", "expected"), [(None, True), ("0", "Triton's own")])
def test_products_fuse_with_sums_unless_the_user_decides(
    setting: str | None,
    expected: object,
    stub: Triton,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton 3.9 warns where nobody does."""
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    if setting is not None:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", setting)
    launch.run(some_kernel, a_launch(), three((0, 0, 0), device))
    assert stub.fusion == expected


def test_what_is_kept_is_bounded(
    stub: Triton, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_launch, "LARGEST_CACHE", 3)
    launched = a_launch()
    for offsets in list(itertools.product((0, 1), repeat=3)) * 2:
        launch.run(some_kernel, launched, three(offsets, device))
        assert len(launched.compiled) <= 3


def test_what_triton_does_not_hand_out_is_not_kept(
    stub: Triton, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, pointers = a_launch(), three((0, 0, 0), device)
    with monkeypatch.context() as within:
        within.setattr(type(some_kernel), "run", lambda kernel, *given, **named: None)
        compiled_launch.run(some_kernel, launched, pointers)
    assert not launched.compiled
    launch.run(some_kernel, launched, pointers)
    launch.run(some_kernel, launched, pointers)
    assert stub.ways == "Td"


def hook(*given: Any, **named: Any) -> None:
    """For Triton to call."""


@contextmanager
def chained(chain: Any) -> Iterator[None]:
    chain.add(hook)
    yield
    chain.remove(hook)


@contextmanager
def assigned(knobs: Any, name: str, value: Any) -> Iterator[None]:
    with knobs.scope():
        setattr(knobs, name, value)
        yield
    knobs.__dict__.pop(name, None)


@contextmanager
def before_the_kernel() -> Iterator[None]:
    some_kernel.pre_run_hooks.append(hook)
    yield
    some_kernel.pre_run_hooks.remove(hook)


RUNTIME, COMPILATION = triton.knobs.runtime, triton.knobs.compilation
WATCHES: dict[str, Callable[[], Any]] = {
    "launch_enter_hook": lambda: chained(RUNTIME.launch_enter_hook),
    "launch_exit_hook": lambda: chained(RUNTIME.launch_exit_hook),
    "launch_enter_hook, assigned": lambda: assigned(RUNTIME, "launch_enter_hook", hook),
    "launch_exit_hook, assigned": lambda: assigned(RUNTIME, "launch_exit_hook", hook),
    "add_stages_inspection_hook": lambda: assigned(RUNTIME, "add_stages_inspection_hook", hook),
    "debug": lambda: assigned(RUNTIME, "debug", True),
    "instrumentation_mode": lambda: assigned(COMPILATION, "instrumentation_mode", "proton"),
    "pre_run_hooks": before_the_kernel,
}


@pytest.mark.parametrize("watch", WATCHES.values(), ids=WATCHES)
def test_triton_launches_itself_while_something_watches(
    watch: Callable[[], Any], stub: Triton, device: torch.device
) -> None:
    launched, pointers = a_launch(), three((0, 0, 0), device)
    for _ in range(2):
        launch.run(some_kernel, launched, pointers)
    with watch():
        for offsets in ((0, 0, 0), (0, 0, 0), (1, 0, 0)):  # the last is not to be kept either
            launch.run(some_kernel, launched, three(offsets, device))
    for offsets in ((0, 0, 0), (1, 0, 0), (1, 0, 0)):
        launch.run(some_kernel, launched, three(offsets, device))
    assert stub.ways == "TdTTTdTd"


def test_the_tritons_that_are_known() -> None:
    for version in ("3.6.0", "3.7.0", "3.7.1", "3.7.1+rocm6.4", "3.8.0", "3.9.0"):
        assert compiled_launch.known(version)
    for version in ("3.5.1", "3.10.0", "3.70.0", "3.99.0", "4.3.7", "3.6"):
        assert not compiled_launch.known(version)


@pytest.mark.skipif(
    not compiled_launch.known(triton.__version__), reason="all launches go Triton's own way"
)
def test_triton_itself_gives_its_launcher_the_same() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).parent / "compare_launches.py"
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == "", "Triton 3.9 warns of a default that it is left to take"
    launched = set(re.findall(r"\w+_kernel", run.stdout))
    assert launched == {
        "linear_forward_kernel",
        "linear_split_k_kernel",
        "linear_gemv_kernel",
        "persistent_forward_kernel",
        "linear_backward_kernel",
        "linear_backward_weight_kernel",
        "elementwise_backward_kernel",
        "gated_linear_forward_kernel",
    }


def test_an_unknown_triton_launches_itself(
    stub: Triton, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_launch, "DIRECT", False)
    launched, pointers = a_launch(), three((0, 0, 0), device)
    for _ in range(3):
        launch.run(some_kernel, launched, pointers)
    assert stub.ways == "TTT"
    assert not launched.compiled


class Elsewhere:
    """A tensor on another GPU."""

    is_cuda = True
    dtype = torch.float32

    def __init__(self, device: int, address: int) -> None:
        self.device = torch.device("cuda", device)
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def test_launches_are_made_on_the_device_of_their_operands(
    stub: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, streams = [0], []

    @contextmanager
    def on(device: Any) -> Iterator[None]:
        previous, current[0] = current[0], getattr(device, "index", device)
        yield
        current[0] = previous

    def stream_of(device: int) -> int:
        streams.append((device, current[0]))
        return STREAM

    driver = SimpleNamespace(get_current_stream=stream_of)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)

    launches = a_launch(), a_launch()
    for _ in range(2):
        for at in (0, 1):
            for index, launched in enumerate(launches):
                with on(at):
                    pointers = tuple(Elsewhere(index, 1024 * one) for one in (1, 2, 3))
                    launch.run(some_kernel, launched, pointers)
                    assert current == [at]
    assert stub.ways == "TTdddddd"
    assert streams == [(0, 0), (1, 1)] * 3


@pytest.mark.parametrize("most", [compiled_launch.LARGEST_CACHE, 1], ids=["kept", "forgotten"])
def test_threads_launch_their_own_operands(
    most: int, stub: Triton, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_launch, "LARGEST_CACHE", most)
    launched = a_launch()
    tensors = [three((index % 2, 0, index % 3), device) for index in range(6)]
    expected = {tuple(map(addressed, pointers)) for pointers in tensors}

    def work(pointers: tuple[Tensor, ...]) -> None:
        for _ in range(50):
            compiled_launch.run(some_kernel, launched, pointers)

    threads = [threading.Thread(target=work, args=(pointers,)) for pointers in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stub.launches) == 300
    assert len(launched.compiled) <= most + len(threads)
    for one in stub.launches:
        first, second, third = one.arguments[:3]
        assert (first, second, third) in expected
        kinds = [kind for _, kind in one.compiled[1][:3]]
        assert kinds == ["" if address % 16 else "D" for address in one.arguments[:3]]


class OnAmd(Elsewhere):
    """As large as it says, for Triton (ptr_range) and for the launcher."""

    is_cuda = False

    def __init__(self, address: int, size: int) -> None:
        super().__init__(0, address)
        self.size = size

    def ptr_range(self) -> int:
        return self.size

    def untyped_storage(self) -> Any:
        return SimpleNamespace(nbytes=lambda: self.size)


def test_on_amd_the_size_of_every_storage_counts(
    stub: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_launch, "AMD", True)
    stub.backend = HIPBackend
    launched = a_launch()
    sizes = list(itertools.product((2**31 - 1, 2**31), repeat=3))
    for sizes_of_three in sizes * 2:
        pointers = tuple(OnAmd(1024, size) for size in sizes_of_three)
        launch.run(some_kernel, launched, pointers)
    assert stub.ways == "T" * 8 + "d" * 8
