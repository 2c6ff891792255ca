"""The time that a configuration should take, from what it moves, computes and waits for.

Nothing here imports Triton or measures anything. The constants are fitted to one table of
measurements, of the tiled kernels on an H100 (benchmarks/results/nvidia-h100-80gb-hbm3/
kernels.json, 1,494 times): half of its times are met within 9% in 16 bits, 7% in float32 and 16% in
TF32. For other GPUs, and for the other kinds of kernels, they are assumptions.

That table's times of "output" in 16 bits by tiles of 128x256 are of a kernel whose products waited
for one another, as Triton 3.6 compiled it then (ptxas's note C7515; tiled.py has why). They are in
the fit: what the model says of that tile's forward is likely too long, by how much is not measured.
"""

import functools
import json
import math
from pathlib import Path

from .config import Config, Kernel, Target, Traits

# Multiply-adds a clock on one multiprocessor: dense peaks of NVIDIA's A100, H100 and B200 and AMD's
# MI300X data sheets, over their multiprocessors and clocks. Products of pieces are bound by the
# instructions that split operands and add sums, not by the matrix instructions.
_RATES = {
    "sm_80": {"16-bit": 1024, "tf32": 512, "float32": 64, "float64": 64},
    "sm_90": {"16-bit": 2048, "tf32": 1024, "float32": 128, "float64": 128},
    "sm_100": {"16-bit": 4096, "tf32": 2048, "float32": 128, "float64": 64},
    "gfx942": {"16-bit": 1024, "tf32": 512, "float32": 128, "float64": 128},
    # Such that each kind of kernel has shapes for which it is chosen.
    "interpreter": dict.fromkeys(("16-bit", "tf32", "float32", "float64"), 32),
}
_OF_PIECES = 192
# The part of these rates that the best tile's loop reaches.
_REACHED = {"16-bit": 0.9, "tf32": 0.3, "float32": 0.74, "float64": 0.74}
_OF_PLAIN_CORES = 128  # multiply-adds a clock, for "gemv"
# Hopper's matrix instructions of 64 rows and more have twice the rate of the others.
_SMALL_TILE = 1.6

_L2_BYTES = 43  # a clock and multiprocessor
_MEMORY = 0.62  # of the peak; the measurements include writing back what L2 was flushed with
_LATENCY = 1850  # clocks until a load from memory arrives
_ELEMENT = 25  # clocks in which a thread rounds an element of an operand to TF32
_PROLOGUE = 2050  # clocks until a program multiplies first
LAUNCH = 4.8  # microseconds, of the start and end of a kernel
_ROUND_TRIP = 2  # times _LATENCY, until the last of a split's programs knows that it is


@functools.cache
def residents() -> dict[str, dict[str, int]]:
    """Programs a multiprocessor, as compiled ahead of time: `python -m benchmarks.resources`."""
    with (Path(__file__).parent.parent / "resources.json").open(encoding="utf-8") as file:
        return json.load(file)


def resident_key(kernel: Kernel, arithmetic: str, config: Config, aligned: bool) -> str:
    """The name of a configuration in resources.json."""
    rows, columns, depth = config.tile(kernel)
    return (
        f"{kernel} {arithmetic} {config.kind} {rows}x{columns}x{depth} "
        f"s{config.num_stages} w{config.num_warps}" + ("" if aligned else " unaligned")
    )


@functools.cache
def resident_programs(
    kernel: Kernel,
    config: Config,
    traits: Traits,
) -> int:
    """Programs that share a multiprocessor: as compiled, or an estimate where it was not.

    The estimate goes by shared memory, and by registers: the accumulators and as many again as the
    smallest kernels take.
    """
    target, itemsize = traits.target, traits.dtype.itemsize
    if target.family == "interpreter":
        return 1
    compiled = residents().get(target.family, {})
    found = compiled.get(resident_key(kernel, traits.arithmetic, config, traits.aligned))
    if found is not None:
        return max(1, found)
    rows, columns, depth = config.tile(kernel)
    threads = config.num_warps * target.warp_size
    shared = 0
    if config.kind != "gemv":
        shared = config.num_stages * (rows + columns) * depth * itemsize
    accumulators = rows * columns * (depth if config.kind == "gemv" else 1) // threads
    registers = min(255, 64 + accumulators * max(4, itemsize) // 4)
    by_registers = 65_536 * target.warp_size // 32 // (threads * registers)
    return max(1, min(16, target.shared_memory // max(shared, 1), by_registers))


def rate(kind: str, target: Target) -> float:
    """Multiply-adds a clock that one multiprocessor reaches in this kind of arithmetic."""
    if kind == "bf16x6":
        return _OF_PIECES * _REACHED["float32"]
    return _RATES[target.family][kind] * _REACHED[kind]


def step_clocks(
    kernel: Kernel,
    config: Config,
    rows: int,
    columns: int,
    traits: Traits,
    reads_outputs: bool = False,
) -> tuple[float, float, float]:
    """Clocks of one step of one program: of arithmetic, of operands from L2, and of waiting.

    The first two are shared with the other programs of a multiprocessor, the third is not.

    Args:
        rows, columns: of the whole result; no more of a tile than these is loaded.
        reads_outputs: whether the weight's stride is 1 along its outputs, as grad_input's is,
            instead of along its inputs.
    """
    tile_rows, tile_columns, depth = config.tile(kernel)
    products = 2 if kernel == "gated_forward" else 1
    target, kind, itemsize = traits.target, traits.arithmetic, traits.dtype.itemsize
    threads = config.num_warps * target.warp_size
    multiply_adds = products * tile_rows * tile_columns * depth
    waiting = 0.0 if target.family == "interpreter" else _LATENCY / config.num_stages
    run = depth  # elements of weight that lie next to each other
    if config.kind == "gemv":
        computing = multiply_adds / _OF_PLAIN_CORES
        waiting /= 2  # its warps do not wait for each other
        run = tile_columns if reads_outputs else depth
    else:
        computing = multiply_adds / rate(kind, target)
        # "split_k" has weight on the instruction's rows.
        instruction_rows = tile_columns if config.kind == "split_k" else tile_rows
        if kind in ("16-bit", "tf32") and target.family == "sm_90" and instruction_rows < 64:
            computing *= _SMALL_TILE
    if kind == "float32" and config.kind != "gemv":
        # Operands come from shared memory for every product: less often for larger tiles, and most
        # slowly where neighbouring threads' elements are a row of weight apart.
        accumulators = tile_rows * tile_columns / threads
        apart = kernel != "backward_weight" and not reads_outputs
        computing *= 1 + (80 / accumulators if apart else 1.2 / math.sqrt(accumulators))
    if kind == "tf32":
        # Elements that lie the other way round than the instruction takes them are moved as well.
        slower = 2.7 if kernel == "backward_weight" else 1.5 if reads_outputs else 1.0
        waiting += _ELEMENT * slower * (tile_rows + products * tile_columns) * depth / threads
    sector = max(1.0, 32 / (run * itemsize))  # what L2 reads at least
    elements = min(tile_rows, rows) + sector * products * min(tile_columns, columns)
    return computing, elements * depth * itemsize / _L2_BYTES, waiting


def program_clocks(
    kernel: Kernel,
    config: Config,
    rows: int,
    columns: int,
    terms: int,
    traits: Traits,
    reads_outputs: bool,
    beside: int,
) -> float:
    """Clocks of a program that sums `terms` products of each element of its tile, and stores it.

    A step takes as long as its arithmetic, its operands and its waiting together would.

    Args:
        rows, columns, reads_outputs: as in `step_clocks`.
        beside: programs on its multiprocessor, itself among them.
    """
    tile_rows, tile_columns, depth = config.tile(kernel)
    step = step_clocks(kernel, config, rows, columns, traits, reads_outputs)
    computing, loading, waiting = beside * step[0], beside * step[1], step[2]
    together = math.sqrt(computing**2 + loading**2 + waiting**2)
    stored = min(tile_rows, rows) * min(tile_columns, columns)
    storing = beside * stored * traits.dtype.itemsize / _L2_BYTES
    return _PROLOGUE + math.ceil(terms / depth) * together + storing


def last_sums_time(parts: int, elements: int, target: Target) -> float:
    """Microseconds in which, after all else, a tile's last program adds parts of its elements."""
    if parts == 1:
        return 0.0
    waiting = _ROUND_TRIP * _LATENCY * (target.family != "interpreter")
    return (waiting + (parts + 1) * 4 * elements / _L2_BYTES) / target.clock


def launch_time(clocks: float, moved: float, target: Target) -> float:
    """Microseconds of a launch whose programs take so many clocks and move so many bytes.

    One hides most of the other: a mean that is close to the larger.
    """
    memory = moved / (1000 * target.memory_bandwidth * _MEMORY)
    return LAUNCH + ((clocks / target.clock) ** 4 + memory**4) ** 0.25


def modelled_time(
    kernel: Kernel,
    config: Config,
    batch: int,
    m: int,
    n: int,
    k: int,
    traits: Traits,
    reads_outputs: bool = False,
    splits: int = 1,
) -> float:
    """Microseconds of one launch of `config`, for `batch` layers of m rows, n outputs, k inputs.

    Programs run in waves, as many at a time as the multiprocessors hold. The whole takes no less
    than memory takes to deliver every operand once.

    Args:
        splits: programs that share the sum of a tile of grad_weight; a forward configuration has
            its own.
    """
    weight_gradient = kernel == "backward_weight"
    rows, columns, terms = (n, k, m) if weight_gradient else (m, n, k)
    products = 2 if kernel == "gated_forward" else 1
    tile_rows, tile_columns, depth = config.tile(kernel)
    tiles = batch * math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
    parts = splits if weight_gradient else config.splits
    terms = depth * math.ceil(math.ceil(terms / depth) / parts)

    def program(beside: int) -> float:
        return program_clocks(kernel, config, rows, columns, terms, traits, reads_outputs, beside)

    target, multiprocessors = traits.target, traits.target.multiprocessors
    if config.kind == "persistent":
        # A program stays on its multiprocessor for all of its tiles.
        clocks = _PROLOGUE + math.ceil(tiles / multiprocessors) * (program(1) - _PROLOGUE)
    else:
        resident = resident_programs(kernel, config, traits)
        waves, rest = divmod(tiles * parts, multiprocessors * resident)
        clocks = waves * program(resident)
        if rest:
            clocks += program(math.ceil(rest / multiprocessors))
    stored = min(tile_rows, rows) * min(tile_columns, columns)
    moved = batch * (m * k + products * n * k + m * n) * traits.dtype.itemsize
    if weight_gradient and parts > 1:
        moved += 8 * parts * batch * n * k
    return launch_time(clocks, moved, target) + last_sums_time(parts, stored, target)
