"""Compares what Triton gives its launcher with what a direct launch gives it.

Run it as `python tests/compare_launches.py`, without TRITON_INTERPRET and GPUs. Triton compiles for
an H100 and goes all of its own way, up to the loader of binaries and the launcher, which are stood
in for. Exits with 1 where they differ in more than the hooks.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import fastlinear
from fastlinear.kernels import compiled_launch, launch
from fastlinear.kernels.configs import Target

HOOKS = slice(6, 9)  # launch_metadata, launch_enter_hook, launch_exit_hook

given: list[tuple[Any, ...]] = []
memory: dict[Any, Tensor] = {}


class Launcher:
    """In the place of triton.backends.nvidia.driver.CudaLauncher."""

    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None:
        given.append(arguments)


def allocate(like: Tensor, output: launch.Operand) -> Tensor:
    """The same memory for the same output of every call."""
    key = output, len(given)
    if key not in memory:
        memory[key] = like.new_empty_strided(output.shape, output.strides, dtype=output.dtype)
    return memory[key]


def addressed(argument: Any) -> Any:
    if argument is None:
        return 0
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


def main() -> None:
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 77,
            launcher_cls=Launcher,
            utils=SimpleNamespace(
                load_binary=lambda name, binary, *given: (1, hash(binary), 32, 0, 1024),
                get_device_properties=lambda device: {"max_shared_mem": 232448},
            ),
        )
    )
    target = Target(family="sm_90", shared_memory=232448, multiprocessors=132, warp_size=32)
    launch.target_of = lambda device: target  # type: ignore[assignment]
    launch.allocate = allocate

    assert compiled_launch.DIRECT
    layer = fastlinear.Linear(64, 32)
    input = torch.randn(4096, 64, requires_grad=True)
    grad_output = torch.randn(4096, 32)
    passes = []
    for _ in range(2):
        with fastlinear.use_backend("triton"):
            layer(input).backward(grad_output)
        passes.append([[addressed(one) for one in arguments] for arguments in given])
        given.clear()
    by_triton, direct = passes
    print(f"{len(by_triton)} launches by Triton {triton.__version__}, {len(direct)} direct")
    for theirs, ours in zip(by_triton, direct, strict=True):
        assert ours[HOOKS] == [0, 0, 0]
        assert theirs[HOOKS] != [0, 0, 0]  # it was Triton's own way
        theirs[HOOKS] = ours[HOOKS]
    sys.exit(by_triton != direct)


if __name__ == "__main__":
    main()
