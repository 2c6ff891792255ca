"""Configurations of the kernels, and whether one is legal.

Nothing here imports Triton.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

# What is computed: the layer's output (or grad_input), both products of a gated pair, or
# grad_weight with grad_bias.
Kernel = Literal["forward", "gated_forward", "backward_weight"]

# How a forward product is computed, each in a file of its own: by tiles of rows and outputs; a few
# rows on the plain cores; some rows, with the sum over K split; by a program a multiprocessor that
# loads tiles by descriptors.
Kind = Literal["tiled", "gemv", "split_k", "persistent"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Target:
    """What a configuration has to fit.

    family: the architecture whose tiles are used:
        "sm_80", "sm_90", "sm_100", "gfx942" or "interpreter".
    shared_memory: bytes one program may use.
    multiprocessors: programs that run at once, at one a multiprocessor.
    warp_size: threads in a warp.
    clock: the highest, in MHz; memory_bandwidth: the peak, in GB/s. Only the model of times
        (model.py) asks for them.
    """

    family: str
    shared_memory: int
    multiprocessors: int
    warp_size: int
    clock: int = 1980
    memory_bandwidth: int = 3350


# One of each family, for compiling where there is no GPU; a GPU at hand describes
# itself (launch.target_of). Clocks and bandwidths are by the data sheets of A100 (80 GB, SXM), H100
# (SXM), B200 and MI300X.
TARGETS = {
    "sm_80": Target("sm_80", 166_912, 108, 32, clock=1410, memory_bandwidth=2039),
    "sm_90": Target("sm_90", 232_448, 132, 32, clock=1980, memory_bandwidth=3350),
    "sm_100": Target("sm_100", 232_448, 148, 32, clock=1965, memory_bandwidth=8000),
    "gfx942": Target("gfx942", 65_536, 304, 64, clock=2100, memory_bandwidth=5300),
}
# A few multiprocessors, so that small shapes take the same paths (tile groups, splits) as large
# ones on a GPU.
INTERPRETER = Target("interpreter", shared_memory=2**30, multiprocessors=8, warp_size=1)


@dataclass(frozen=True)
class Config:
    """Block sizes over the layer's dimensions, and how to compile.

    The dimensions are M (rows), N (out_features) and K (in_features).

    The forward kernel computes BLOCK_M x BLOCK_N tiles in steps of BLOCK_K; the grad_weight kernel
    computes BLOCK_N x BLOCK_K tiles in steps of BLOCK_M.

    num_warps, num_stages: Triton's; stages are the steps whose operands are in flight at once.
    group: rows of tiles that are walked together, for reuse in L2.
    kind: the kernel, of those that compute a forward product; the others have one.
    splits: programs that share the sum over K of each tile, in "split_k".
    epilogue_parts: column parts in which "persistent" stores a tile, one after the other.
    warp_specialize: whether warps of their own load for "persistent".
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    kind: Kind = "tiled"
    splits: int = 1
    epilogue_parts: int = 1
    warp_specialize: bool = False

    def compile_options(self, target: Target) -> dict[str, int]:
        """Triton's options for a launch on `target`."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # With warps of their own for loading, Triton shares the registers out itself.
        if target.family.startswith("sm_") and not self.warp_specialize:
            # Left to itself, ptxas may hold a small kernel to 64 or 80 registers and spill some
            # bytes; 255 is the most that a thread can have, and lets it take what it needs.
            options["maxnreg"] = 255
        return options

    @property
    def reads_outputs(self) -> bool:
        """Whether "gemv" reads weight along its outputs, not its inputs.

        A weight is read fast along the dimension of stride 1, which a transposed one has there.
        """
        return self.block_n >= 16

    def tile(self, kernel: Kernel) -> tuple[int, int, int]:
        """(rows, columns, depth): the output tile of `kernel`, and the reduction's step."""
        if kernel == "backward_weight":
            return self.block_n, self.block_k, self.block_m
        return self.block_m, self.block_n, self.block_k


@dataclass(frozen=True)
class BackwardConfig:
    """Blocks of grad_input's and of grad_weight's programs, which one launch runs side by side.

    input: as the forward kernel takes it, whose N is the layer's K.
    weight: as the grad_weight kernel takes it; with as many warps and stages, which are a launch's.
    """

    input: Config
    weight: Config

    def __post_init__(self) -> None:
        compiled = [(one.num_warps, one.num_stages) for one in (self.input, self.weight)]
        if compiled[0] != compiled[1]:
            raise ValueError(
                "both products of a launch have its warps and stages, "
                f"but they are {compiled[0]} and {compiled[1]}"
            )


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """The kind of arithmetic, which decides the tiles.

    "16-bit", "float64", or of float32 "float32", "tf32", "bf16x6" or "tf32x3".
    """
    if dtype in (torch.float16, torch.bfloat16):
        return "16-bit"
    if dtype == torch.float32:
        return "float32" if precision == "ieee" else precision
    return "float64"


# Float32 products of pieces that a matrix instruction takes (precision.prepare_operand), and how
# many of those one such product is.
OF_PIECES = {"bf16x6": 6, "tf32x3": 3}
# Those where they pay, as `resolved_precision` has it.
IN_LONG_SUMS = {f"long {products}": products for products in OF_PIECES}
LONG_SUM = 512  # terms, from which on benchmarks/accuracy.py finds pieces to err little
FEW_ROWS = 64  # which other kinds than "tiled" are for, or memory is what takes the time


def resolved_precision(precision: str, rows: int | None, terms: int, target: Target) -> str:
    """What `precision` means for so many rows of sums of so many terms.

    One of IN_LONG_SUMS is products of pieces in long sums of many rows on NVIDIA, whose tensor
    cores the errors are known of, and "ieee" elsewhere; any other precision is itself.

    rows: None where the choice may not depend on it.
    """
    if precision not in IN_LONG_SUMS:
        return precision
    many = rows is None or rows > FEW_ROWS
    pieces = target.family != "gfx942" and many and terms >= LONG_SUM
    return IN_LONG_SUMS[precision] if pieces else "ieee"


def why_illegal(
    kernel: Kernel,
    config: Config,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    activation: bool = False,
    descriptors: bool = False,
) -> str | None:
    """What is in the way of launching `config` for such operands on `target`, in words.

    None where it can be launched.

    The one predicate: the choice, the tests that compile ahead of time and any tuner go by it. Each
    kind of kernel has a rule of its own, below.

    Args:
        kernel: whose tile the configuration is.
        config: the configuration.
        dtype, precision: of the operands, and how float32 products are formed.
        aligned: whether every operand can be read 16 bytes at a time (launch.aligned) and, with an
            activation, the output so written (launch.aligned_product); if not, the
            operands pass through registers, each element with an address of its own.
        target: the device.
        activation: whether the kernel applies one to its accumulators.
        descriptors: whether input and weight can be loaded by descriptors (launch.describable).
    """
    if config.kind != "tiled" and kernel != "forward":
        return f"kind={config.kind!r} computes a forward product, no {kernel}"
    if config.kind != "tiled" and arithmetic(dtype, precision) in OF_PIECES:
        return f"kind={config.kind!r} forms no products of pieces"
    given = (dtype, precision, aligned, target, activation, descriptors)
    return _RULES[config.kind](kernel, config, *given)


def _why_no_block(config: Config, **least: int) -> str | None:
    """Says which of the named blocks is no power of two, or smaller than the least given for it."""
    for name, smallest in least.items():
        size = getattr(config, name)
        if size < smallest or size & (size - 1):
            at_least = f" of at least {smallest}" if smallest > 1 else ""
            return f"{name}={size} is not a power of two{at_least}"
    return None


def _why_no_room(operands: int, config: Config, target: Target) -> str | None:
    """Says that steps' operands, of so many bytes, are too much to be in flight at once."""
    # AMD's pipeline keeps the newest stage in registers.
    buffers = max(1, config.num_stages - 1) if target.family == "gfx942" else config.num_stages
    if buffers * operands > target.shared_memory:
        return (
            f"operands need {buffers * operands} bytes of shared memory, "
            f"{target.family} has {target.shared_memory}"
        )
    return None


# Registers of unaligned TF32, as measured by compiling: its operands pass through registers too, to
# be rounded there.
_MOST_OF_TF32 = 80


def _why_no_addresses(accumulators: int, addresses: int, kind: str, most: int = 128) -> str | None:
    """Says that unaligned operands' addresses are too many beside the accumulators.

    most: where operands are not held in registers.
    """
    # Plain multiply-adds hold their operands in registers,
    # matrix instructions read them from shared memory.
    most = 48 if kind in ("float32", "float64") else most
    if accumulators + addresses >= most:
        return (
            f"accumulators and addresses take {accumulators} + {addresses} "
            f"registers a thread of {most}"
        )
    return None


def _why_tiled_illegal(
    kernel: Kernel,
    config: Config,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    activation: bool,
    descriptors: bool,
) -> str | None:
    rows, columns, depth = config.tile(kernel)
    # Matrix instructions take no less.
    if wrong := _why_no_block(config, block_m=16, block_n=16, block_k=16):
        return wrong
    if target.family == "interpreter":
        return None
    products = 2 if kernel == "gated_forward" else 1  # of one tile of input and a weight each
    operands = (rows + products * columns) * depth
    if wrong := _why_no_room(operands * dtype.itemsize, config, target):
        return wrong
    threads = config.num_warps * target.warp_size
    words = max(4, dtype.itemsize) // 4
    accumulators = products * rows * columns * words // threads
    kind = arithmetic(dtype, precision)
    # As measured by compiling (python -m benchmarks.resources): more than these spill. Beside a sum
    # of pieces there are what it lost, and the step's part.
    if kind in OF_PIECES:
        most = 64 if target.family == "sm_90" and aligned else 32
    elif kernel != "gated_forward":
        most = 64 if activation else 128
    elif kind in ("float32", "float64"):
        most = 32
    else:
        most = 128 if kind == "16-bit" and target.family in ("sm_90", "gfx942") else 64
    if accumulators > most:
        return (
            f"accumulators take {accumulators} registers a thread, "
            f"more than the {most} that leave room for the rest"
        )
    if aligned:
        return None
    rounds = kind == "tf32" and activation and kernel != "gated_forward"
    most = _MOST_OF_TF32 if rounds else 128
    return _why_no_addresses(accumulators, operands // threads * 2, kind, most)


def _why_gemv_illegal(
    kernel: Kernel,
    config: Config,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    activation: bool,
    descriptors: bool,
) -> str | None:
    if wrong := _why_no_block(config, block_m=1, block_n=1, block_k=1):
        return wrong
    if config.block_m > 4:
        return f"block_m={config.block_m} is more rows than the 4 that the kernel is for"
    if target.family == "interpreter":
        return None
    threads = config.num_warps * target.warp_size
    words = max(4, dtype.itemsize) // 4
    # Each element of a weight tile has one for every row.
    accumulators = config.block_m * config.block_n * config.block_k * words // threads
    # As measured by compiling: twice as many spill where operands are unaligned.
    if accumulators > 64:
        return (
            f"accumulators take {accumulators} registers a thread, "
            "more than the 64 that leave room for the rest"
        )
    return None


def _why_split_k_illegal(
    kernel: Kernel,
    config: Config,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    activation: bool,
    descriptors: bool,
) -> str | None:
    if wrong := _why_no_block(config, block_m=16, block_n=16, block_k=16):
        return wrong
    if target.family == "interpreter":
        return None
    operands = (config.block_m + config.block_n) * config.block_k
    if wrong := _why_no_room(operands * dtype.itemsize, config, target):
        return wrong
    threads = config.num_warps * target.warp_size
    words = max(4, dtype.itemsize) // 4
    accumulators = config.block_m * config.block_n * words // threads
    if accumulators > 64:
        return (
            f"accumulators take {accumulators} registers a thread, "
            "more than the 64 that leave room for the parts that are added"
        )
    if aligned:
        return None
    kind = arithmetic(dtype, precision)
    most = _MOST_OF_TF32 if kind == "tf32" else 128
    return _why_no_addresses(accumulators, operands // threads * 2, kind, most)


def persistent_shared_memory(config: Config, itemsize: int) -> int:
    """Bytes that a program of "persistent" takes at most.

    That is the operands of all stages, what threads exchange a part of the output through, and
    barriers. How much of a part is exchanged at once is Triton's choice: with rows of 16 bytes to
    store, half of it or less; else all of it.
    """
    operands = config.num_stages * (config.block_m + config.block_n) * config.block_k * itemsize
    part = config.block_m * config.block_n // config.epilogue_parts * itemsize
    return operands + max(part, 32 * 1024) + 512


def _why_persistent_illegal(
    kernel: Kernel,
    config: Config,
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    target: Target,
    activation: bool,
    descriptors: bool,
) -> str | None:
    if wrong := _why_no_block(config, block_m=16, block_n=32, block_k=16):
        return wrong
    if config.epilogue_parts not in (1, 2, 4):
        return f"epilogue_parts={config.epilogue_parts} is neither 1, 2 nor 4"
    if arithmetic(dtype, precision) != "16-bit":
        return f"{dtype} is not of 16 bits"
    if not descriptors:
        return "descriptors cannot describe such operands"
    if target.family == "interpreter":
        return None
    if target.family not in ("sm_90", "sm_100"):
        return f"{target.family} loads nothing by descriptors"
    shared = persistent_shared_memory(config, dtype.itemsize)
    if shared > target.shared_memory:
        return (
            f"a program needs {shared} bytes of shared memory, "
            f"{target.family} has {target.shared_memory}"
        )
    computing = config.num_warps
    if config.warp_specialize and target.family == "sm_90":
        if config.num_warps != 4:
            return f"Triton ignores warp_specialize with num_warps={config.num_warps}"
        if config.epilogue_parts != 1:
            return "Triton 3.6 cannot compile warp_specialize with a tile in parts"
        computing = 8  # Triton has two groups of so many warps share a tile, and one more load
    threads = computing * target.warp_size
    accumulators = config.block_m * config.block_n // threads
    # As measured by compiling, for any number of outputs: more than these spill. An activation is
    # applied to one part at a time, but where warps are specialized registers are too few for that.
    parts = 1 if config.warp_specialize else config.epilogue_parts
    most = min(128, 32 * parts) if activation else 128
    if accumulators > most:
        return (
            f"accumulators take {accumulators} registers a thread, "
            f"more than the {most} that leave room for the rest"
        )
    return None


_RULES = {
    "tiled": _why_tiled_illegal,
    "gemv": _why_gemv_illegal,
    "split_k": _why_split_k_illegal,
    "persistent": _why_persistent_illegal,
}
