"""How many programs of a compiled kernel share a multiprocessor, and the waves that makes.

A prediction from what a kernel takes and what a multiprocessor has; nothing here is measured.
"""

import math
from dataclasses import dataclass

from benchmarks.without_gpu.case import Case
from fastlinear.kernels.backward.elementwise import BLOCK, WIDEST
from fastlinear.kernels.configs.config import TARGETS

SIDE = 4096  # waves are for this many rows, outputs and inputs


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has for its resident programs.

    warps, programs: the most that can be resident.
    registers: of one thread's width, in each of the 4 parts that warps are dealt to, for a whole
        warp (a GPU with 65,536 registers for warps of 32 has 512).
    register_step: a thread's registers are given out in steps of this many.
    shared_memory, shared_step, shared_reserved: bytes, the step that they are given out in, and
        what each program takes besides its own.
    tensor_columns: of the memory that tcgen05's accumulators lie in.
    """

    warps: int
    programs: int
    shared_memory: int
    shared_step: int
    shared_reserved: int
    registers: int = 512
    register_step: int = 8
    tensor_columns: int | None = None


# NVIDIA: "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide, the
# steps from cuda_occupancy.h of the CUDA toolkit, tensor memory from the PTX ISA's chapter on
# tcgen05. AMD: LLVM's AMDGPU backend (GCNSubtarget, for gfx90a and newer), whose own figure for
# the registers ("; Occupancy:" in the assembly) this one agrees with; local memory from ROCm's
# table of GPU specifications.
_HOPPER = {"warps": 64, "programs": 32, "shared_memory": 228 * 1024}
_CUDA = {"shared_step": 128, "shared_reserved": 1024}
LIMITS = {
    "sm_80": Limits(warps=64, programs=32, shared_memory=164 * 1024, **_CUDA),
    "sm_90": Limits(**_HOPPER, **_CUDA),
    "sm_100": Limits(**_HOPPER, **_CUDA, tensor_columns=512),
    "gfx942": Limits(
        warps=32, programs=16, shared_memory=64 * 1024, shared_step=512, shared_reserved=0
    ),
}


def resident_programs(
    target: str, registers: int, shared: int, warps: int, tensor_columns: int = 0
) -> int:
    """Programs that one multiprocessor of `target` holds at once.

    Args:
        target: a key of LIMITS.
        registers: of one thread.
        shared: bytes of shared memory of one program.
        warps: of one program.
        tensor_columns: of tensor memory that one program allocates.
    """
    limits = LIMITS[target]
    registers = math.ceil(max(registers, 1) / limits.register_step) * limits.register_step
    warps_by_registers = 4 * (limits.registers // registers)
    bounds = [limits.programs, min(limits.warps, warps_by_registers) // warps]
    taken = math.ceil(shared / limits.shared_step) * limits.shared_step + limits.shared_reserved
    if taken:
        bounds.append(limits.shared_memory // taken)
    if limits.tensor_columns and tensor_columns:
        bounds.append(limits.tensor_columns // tensor_columns)
    return min(bounds)


def occupancy(target: str, resident: int, warps: int) -> int:
    """The resident warps, as percent of the most that a multiprocessor can hold."""
    return round(100 * resident * warps / LIMITS[target].warps)


def programs(case: Case) -> int:
    """Programs of `case` for SIDE rows, outputs and inputs; of two layers, for SIDE each.

    For as few rows as "gemv" is for.
    """
    if case.config is None:
        return math.ceil(SIDE / WIDEST) * math.ceil(SIDE * WIDEST / BLOCK)
    total = 0
    for config, kernel in case.products():
        rows, columns, _ = config.tile(kernel)
        layers = 2 if case.product == "backward_of_two" and kernel == "backward_weight" else 1
        row_tiles = 1 if config.kind == "gemv" else math.ceil(SIDE / rows)
        total += layers * row_tiles * math.ceil(SIDE / columns)
    return total


def waves(case: Case, resident: int) -> float | None:
    """How many times over `case` fills its target, for SIDE rows, outputs and inputs.

    None where not one program fits.
    """
    if not resident:
        return None
    return round(programs(case) / (TARGETS[case.target].multiprocessors * resident), 2)
