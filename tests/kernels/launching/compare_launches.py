"""Compares what Triton gives its launcher with what a direct launch gives it.

Run it as `python tests/kernels/launching/compare_launches.py`, without TRITON_INTERPRET and GPUs.
Triton compiles for an H100 and goes all of its own way, up to the loader of binaries and the
launcher, which are stood in for. Exits with 1 where they differ in more than the hooks.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import _allocation

import fastlinear
from fastlinear.kernels.configs.config import Target
from fastlinear.kernels.launching import compiled_launch, launch

FUNCTION = 4
HOOKS = slice(6, 9)  # launch_metadata, launch_enter_hook, launch_exit_hook

given: list[list[Any]] = []
names: dict[int, str] = {}
memory: list[Tensor] = []  # that a call has been given; the next like it is given the same
taken = 0


class Launcher:
    """In the place of triton.backends.nvidia.driver.CudaLauncher."""

    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None:
        # A kernel that makes descriptors asks the allocator for memory.
        given.append([*map(addressed, arguments), _allocation._allocator.get()])


def load(name: str, binary: bytes, *options: Any) -> tuple[Any, ...]:
    """(module, function, registers, spilled bytes, most threads), as the loader gives them."""
    names[hash(binary)] = name
    return 1, hash(binary), 32, 0, 1024


def allocate(like: Tensor, output: launch.Operand) -> Tensor:
    global taken
    if taken == len(memory):
        memory.append(like.new_empty_strided(output.shape, output.strides, dtype=output.dtype))
    taken += 1
    return memory[taken - 1]


def addressed(argument: Any) -> Any:
    if argument is None:
        return 0
    if isinstance(argument, tuple):  # a Matrix is as good as a plain tuple
        return tuple(map(addressed, argument))
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def calls() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor, int]]:
    """What is compared, of every kernel a launch: (layer, input, out_features)."""
    half = torch.float16
    gate, up = normal(64, 32), normal(64, 32)
    return {
        "tiled": (fastlinear.Linear(64, 256), normal(4096, 64), 256),
        "activation": (fastlinear.Linear(64, 32, activation="gelu"), normal(4096, 64), 32),
        "gated": (lambda input: fastlinear.gated_linear(input, gate, up), normal(128, 32), 64),
        "few rows": (fastlinear.Linear(64, 32), normal(2, 64).detach(), 32),
        "unaligned": (fastlinear.Linear(63, 31), normal(64 * 63 + 1)[1:].view(64, 63), 31),
        "descriptors": (
            fastlinear.Linear(1024, 1024, dtype=half),
            normal(8192, 1024, dtype=half),
            1024,
        ),
    }


def launches(layer: Callable[[Tensor], Tensor], input: Tensor, grad_output: Tensor) -> list[Any]:
    global taken
    taken = 0
    given.clear()
    with fastlinear.use_backend("triton"):
        layer(input).backward(grad_output)
    return given.copy()


def main() -> None:
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 77,
            launcher_cls=Launcher,
            utils=SimpleNamespace(
                load_binary=load,
                unload_module=lambda module: None,
                get_device_properties=lambda device: {"max_shared_mem": 232448},
            ),
        )
    )
    target = Target(family="sm_90", shared_memory=232448, multiprocessors=132, warp_size=32)
    launch.target_of = lambda device: target  # type: ignore[assignment]
    launch.allocate = allocate

    assert compiled_launch.DIRECT
    differing = []
    for name, (layer, input, out_features) in calls().items():
        operands = layer, input, torch.randn(len(input), out_features, dtype=input.dtype)
        memory.clear()
        compiled_launch.DIRECT = False
        by_triton = launches(*operands)
        compiled_launch.DIRECT = True
        launches(*operands)  # the first of a kind goes Triton's way
        direct = launches(*operands)
        kernels = ", ".join(names[arguments[FUNCTION]] for arguments in direct)
        print(f"{name}: {len(by_triton)} by Triton, {len(direct)} direct: {kernels}")
        for theirs, ours in zip(by_triton, direct, strict=True):
            assert ours[HOOKS] == [0, 0, 0]
            assert theirs[HOOKS] != [0, 0, 0]  # it was Triton's own way
            theirs[HOOKS] = ours[HOOKS]
        if by_triton != direct:
            differing.append(name)
    print(f"Triton {triton.__version__}: {len(differing)} differ", *differing)
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
