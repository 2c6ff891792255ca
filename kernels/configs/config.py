"""Configurations of the kernels, and what the choice of one goes by.

Nothing here imports Triton.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..language.arguments import Tile

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

    @property
    def blocks(self) -> Tile:
        """As kernels take them."""
        return Tile(self.block_m, self.block_n, self.block_k, self.group)

    def compile_options(self, target: Target) -> dict[str, Any]:
        """Triton's options for a launch on `target`."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if target.family.startswith("sm_"):
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
                "BackwardConfig takes input and weight of one num_warps and num_stages, a "
                f"launch's, but they are {compiled[0]} and {compiled[1]}"
            )


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """The kind of arithmetic, which decides the tiles.

    "16-bit", "float64", or of float32 "float32", "tf32" or "bf16x6".
    """
    if dtype in (torch.float16, torch.bfloat16):
        return "16-bit"
    if dtype == torch.float32:
        return "float32" if precision == "ieee" else precision
    return "float64"


class Traits(NamedTuple):
    """What of a product, besides its sizes, decides which configurations are legal, and how fast.

    dtype, precision: of the operands, and how float32 products are formed.
    aligned: whether every operand can be read 16 bytes at a time (launch.aligned) and, where
        registers are short, the result so written (launch.aligned_product); if not, the operands
        pass through registers, each element with an address of its own.
    target: the device.
    activation: whether the kernel applies one to its accumulators.
    descriptors: whether input and weight can be loaded by descriptors (launch.describable).
    wide: whether an operand or the result takes 64-bit offsets (launch.wide).
    second_product: whether a forward product adds that of a second input and weight, as a gated
        pair's grad_input does.
    """

    dtype: torch.dtype
    precision: str
    aligned: bool
    target: Target
    activation: bool = False
    descriptors: bool = False
    wide: bool = False
    second_product: bool = False

    @property
    def arithmetic(self) -> str:
        return arithmetic(self.dtype, self.precision)


LONG_SUM = 512  # terms, from which on benchmarks/accuracy.py finds pieces to err little
FEW_ROWS = 64  # which other kinds than "tiled" are for, or memory is what takes the time


def resolved_precision(
    precision: str, dtype: torch.dtype, rows: int | None, terms: int, target: Target
) -> str:
    """What `precision` means for so many rows of sums of so many terms.

    "long bf16x6" is "bf16x6", products of pieces, in long sums of many rows on NVIDIA, whose tensor
    cores the errors are known of, and "ieee" elsewhere; any other precision is itself. Only float32
    has a choice.

    rows: None where the choice may not depend on it.
    """
    if dtype != torch.float32:
        return "ieee"
    if precision != "long bf16x6":
        return precision
    many = rows is None or rows > FEW_ROWS
    pieces = target.family != "gfx942" and many and terms >= LONG_SUM
    return "bf16x6" if pieces else "ieee"
