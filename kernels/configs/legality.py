"""Whether a configuration is legal: whether it fits the device, and is compiled without spilling.

Nothing here imports Triton.
"""

from .config import BackwardConfig, Config, Kernel, Target, Traits

MOST_THREADS = 1024  # that a program can have


def why_illegal(kernel: Kernel, config: Config, traits: Traits) -> str | None:
    """What is in the way of launching `config` for such operands, in words.

    None where it can be launched.

    The one predicate: the choice, the tests that compile ahead of time and any tuner go by it. Each
    kind of kernel has a rule of its own, below.

    Args:
        kernel: whose tile the configuration is.
        config: the configuration.
        traits: of the operands and the device.
    """
    if config.kind != "tiled" and kernel != "forward":
        return f"kind={config.kind!r} computes a forward product, no {kernel}"
    if config.kind != "tiled" and traits.arithmetic == "bf16x6":
        return f"kind={config.kind!r} forms no products of pieces"
    if wrong := _why_no_block(config, num_warps=1):
        return wrong
    most = MOST_THREADS // max(32, traits.target.warp_size)
    if config.num_warps > most:
        return f"num_warps={config.num_warps} is more than the {most} that a program can have"
    return _RULES[config.kind](kernel, config, traits)


def why_illegal_pair(pair: BackwardConfig, traits: Traits) -> str | None:
    """`why_illegal` of one launch of both gradients: of the first of its two that is."""
    wrong = why_illegal("forward", pair.input, traits)
    return wrong or why_illegal("backward_weight", pair.weight, traits)


def _why_no_block(config: Config, **least: int) -> str | None:
    """Says which of the named sizes is no power of two, or smaller than the least given for it."""
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


# Registers that accumulators and unaligned operands' addresses may take together, as measured by
# compiling. FAR is with 64-bit offsets, which take more, of a plain product's weight most of all
# where it is read along its outputs.
_MOST_OF_16_BIT = 128  # matrix instructions read their operands from shared memory
_MOST_OF_TF32 = 80  # where operands pass through registers too, to be rounded there
_MOST_OF_PLAIN = 48  # multiply-adds hold their operands in registers
_MOST_OF_FAR_PLAIN = 32
_MOST_OF_FAR_PIECES = 48


def _why_no_addresses(accumulators: int, addresses: int, most: int) -> str | None:
    """Says that unaligned operands' addresses are too many beside the accumulators."""
    if accumulators + addresses >= most:
        return (
            f"accumulators and addresses take {accumulators} + {addresses} "
            f"registers a thread of {most}"
        )
    return None


def _why_tiled_illegal(kernel: Kernel, config: Config, traits: Traits) -> str | None:
    rows, columns, depth = config.tile(kernel)
    # Matrix instructions take no less.
    if wrong := _why_no_block(config, block_m=16, block_n=16, block_k=16):
        return wrong
    target = traits.target
    if target.family == "interpreter":
        return None
    products = 2 if kernel == "gated_forward" else 1  # of one tile of input and a weight each
    operands = (rows + products * columns) * depth
    if wrong := _why_no_room(operands * traits.dtype.itemsize, config, target):
        return wrong
    threads = config.num_warps * target.warp_size
    words = max(4, traits.dtype.itemsize) // 4
    accumulators = products * rows * columns * words // threads
    kind = traits.arithmetic
    # As measured by compiling (python -m benchmarks.resources): more than these spill. Beside a sum
    # of pieces there are what it lost, and the step's part.
    if kind == "bf16x6":
        most = 64 if target.family == "sm_90" and traits.aligned else 32
    elif kernel != "gated_forward":
        most = 64 if traits.activation else 128
    elif kind in ("float32", "float64"):
        most = 32
    elif kind == "tf32" and target.family == "sm_80" and config.num_warps == 4:
        most = 32  # of 64, those of silu spill as Triton 3.8 compiles them
    else:
        roomy = kind == "16-bit" and target.family in ("sm_90", "gfx942") and not traits.wide
        most = 128 if roomy else 64
    if accumulators > most:
        return (
            f"accumulators take {accumulators} registers a thread, "
            f"more than the {most} that leave room for the rest"
        )
    if traits.aligned:
        return None
    eight = config.num_warps == 8 and target.family == "sm_80"
    if kind == "bf16x6" and kernel == "backward_weight" and eight:
        return "with unaligned pieces eight warps spill on sm_80, as Triton 3.8 compiles them"
    most = _MOST_OF_16_BIT
    if kind in ("float32", "float64"):
        most = _MOST_OF_FAR_PLAIN if traits.wide and kernel == "forward" else _MOST_OF_PLAIN
    elif kind == "bf16x6" and traits.wide and kernel != "gated_forward":
        most = _MOST_OF_FAR_PIECES
    elif kind == "tf32" and kernel == "forward" and (traits.activation or traits.second_product):
        most = _MOST_OF_TF32
    return _why_no_addresses(accumulators, operands // threads * 2, most)


def _why_gemv_illegal(kernel: Kernel, config: Config, traits: Traits) -> str | None:
    if wrong := _why_no_block(config, block_m=1, block_n=1, block_k=1):
        return wrong
    if config.block_m > 4:
        return f"block_m={config.block_m} is more rows than the 4 that the kernel is for"
    target = traits.target
    if target.family == "interpreter":
        return None
    threads = config.num_warps * target.warp_size
    words = max(4, traits.dtype.itemsize) // 4
    # Each element of a weight tile has one for every row.
    accumulators = config.block_m * config.block_n * config.block_k * words // threads
    # As measured by compiling: twice as many spill where operands are unaligned.
    if accumulators > 64:
        return (
            f"accumulators take {accumulators} registers a thread, "
            "more than the 64 that leave room for the rest"
        )
    return None


def _why_split_k_illegal(kernel: Kernel, config: Config, traits: Traits) -> str | None:
    if wrong := _why_no_block(config, block_m=16, block_n=16, block_k=16):
        return wrong
    target = traits.target
    if target.family == "interpreter":
        return None
    operands = (config.block_m + config.block_n) * config.block_k
    if wrong := _why_no_room(operands * traits.dtype.itemsize, config, target):
        return wrong
    threads = config.num_warps * target.warp_size
    words = max(4, traits.dtype.itemsize) // 4
    accumulators = config.block_m * config.block_n * words // threads
    if accumulators > 64:
        return (
            f"accumulators take {accumulators} registers a thread, "
            "more than the 64 that leave room for the parts that are added"
        )
    if traits.aligned:
        return None
    of_kind = {"16-bit": _MOST_OF_16_BIT, "tf32": _MOST_OF_TF32}
    most = of_kind.get(traits.arithmetic, _MOST_OF_PLAIN)
    return _why_no_addresses(accumulators, operands // threads * 2, most)


def persistent_shared_memory(config: Config, itemsize: int) -> int:
    """Bytes that a program of "persistent" takes at most.

    That is the operands of all stages, what threads exchange a part of the output through, and
    barriers. How much of a part is exchanged at once is Triton's choice: with rows of 16 bytes to
    store, half of it or less; else all of it.
    """
    operands = config.num_stages * (config.block_m + config.block_n) * config.block_k * itemsize
    part = config.block_m * config.block_n // config.epilogue_parts * itemsize
    return operands + max(part, 32 * 1024) + 512


def _why_persistent_illegal(kernel: Kernel, config: Config, traits: Traits) -> str | None:
    if wrong := _why_no_block(config, block_m=16, block_n=32, block_k=16):
        return wrong
    if config.epilogue_parts not in (1, 2, 4):
        return f"epilogue_parts={config.epilogue_parts} is neither 1, 2 nor 4"
    if traits.arithmetic != "16-bit":
        return f"{traits.dtype} is not of 16 bits"
    if not traits.descriptors:
        return "descriptors cannot describe such operands"
    target = traits.target
    if target.family == "interpreter":
        return None
    if target.family not in ("sm_90", "sm_100"):
        return f"{target.family} loads nothing by descriptors"
    shared = persistent_shared_memory(config, traits.dtype.itemsize)
    if shared > target.shared_memory:
        return (
            f"a program needs {shared} bytes of shared memory, "
            f"{target.family} has {target.shared_memory}"
        )
    threads = config.num_warps * target.warp_size
    accumulators = config.block_m * config.block_n // threads
    # As measured by compiling, for any number of outputs: more than these spill. An activation is
    # applied to one part at a time, and so are addresses found, which take registers where they are
    # 64 bits wide and not of whole rows.
    parts = config.epilogue_parts
    if target.family == "sm_100" and not traits.aligned and accumulators > 32 * parts:
        return f"in {parts} parts unaligned outputs spill on sm_100, as Triton 3.9 compiles them"
    claims = (traits.activation, traits.wide and not traits.aligned).count(True)
    most = min(128, 32 * parts // claims) if claims else 128
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
