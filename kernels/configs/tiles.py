"""The configurations that are shipped, by kind, family of GPUs and arithmetic: those of tiles.json.

Of each list the largest tiles come first, those for any alignment last.
tests/kernels/test_compile.py compiles every one that is legal, for its target, and fails where it
spills.

- "tiled": rows, columns, depth, stages, warps of the output tiles. Those of "bf16x6", float32
  products of pieces, which other kinds do not form, have steps as deep as one instruction for
  bfloat16: their error has been determined for that (benchmarks/accuracy.py).
- "split_k": the same; the splits are the chooser's.
- "gemv": rows, outputs, depth, threads, on every GPU. Each thread loads 64 bytes of weight a step,
  or 32 where sums take the registers; neighbours read 64 bytes or more that are next to each other.
  Of every two, the first reads along the outputs (Config.reads_outputs).
- "persistent": rows, columns, depth, stages, warps, parts. In parts a tile takes less of registers
  and shared memory, which is what lets the largest have an activation.
- "pairs": tiles of grad_input, tiles of grad_weight, and the stages and warps of both, for a launch
  that computes both. The first are for many rows; for few, grad_input's tiles are flat and deep,
  and grad_weight's shallow.
"""

import functools
import json
from pathlib import Path
from typing import Any

from .config import TARGETS, BackwardConfig, Config, Kernel, Kind, Traits
from .legality import why_illegal, why_illegal_pair

_SHIPPED: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
# Of a gated pair in float32, whose other tiles take too many addresses where nothing is aligned,
# and in TF32 too much shared memory for the smallest GPUs.
_SMALLEST_GATED = (16, 32, 16, 3, 4)


def shaped(
    kernel: Kernel, rows: int, columns: int, depth: int, num_stages: int, num_warps: int
) -> Config:
    if kernel == "backward_weight":
        return Config(depth, rows, columns, num_warps, num_stages)
    return Config(rows, columns, depth, num_warps, num_stages)


@functools.cache
def legal_configs(kernel: Kernel, traits: Traits, kind: Kind = "tiled") -> tuple[Config, ...]:
    """Every shipped configuration of one kind that is legal, largest tile first.

    The arguments are those of `why_illegal`.
    """
    shipped = _shipped(kernel, kind, traits.arithmetic, traits.target.family)
    return tuple(config for config in shipped if why_illegal(kernel, config, traits) is None)


def _shipped(kernel: Kernel, kind: Kind, arithmetic: str, family: str) -> list[Config]:
    if kind == "tiled":
        tiles = _SHIPPED["tiled"][family][arithmetic]
        float32 = arithmetic in ("float32", "tf32") and family != "interpreter"
        if kernel == "gated_forward" and float32:
            tiles = [*tiles, _SMALLEST_GATED]
        return [shaped(kernel, *tile) for tile in tiles]
    if arithmetic == "bf16x6":
        return []
    if kind == "gemv" and family == "interpreter":
        return [Config(4, 64, 64, num_warps=1, num_stages=1, kind=kind)]
    if kind == "gemv":
        warp_size = TARGETS[family].warp_size
        return [
            Config(rows, outputs, depth, threads // warp_size, num_stages=1, kind=kind)
            for rows, outputs, depth, threads in _SHIPPED["gemv"][arithmetic]
        ]
    if kind == "split_k":
        splits = 3 if family == "interpreter" else 1
        return [
            Config(rows, outputs, depth, num_warps, num_stages, kind=kind, splits=splits)
            for rows, outputs, depth, num_stages, num_warps in _SHIPPED[kind][family][arithmetic]
        ]
    return [
        Config(rows, columns, depth, num_warps, num_stages, kind=kind, epilogue_parts=parts)
        for rows, columns, depth, num_stages, num_warps, parts in _SHIPPED[kind].get(family, [])
    ]


@functools.cache
def legal_pairs(traits: Traits) -> tuple[BackwardConfig, ...]:
    """Every shipped pair of which both are legal, largest tiles first.

    Their programs are never in the same place: neither leaves less room for the other. Of
    `traits`, aligned says it of all operands, and second_product is of grad_input alone.
    """
    kind, family = traits.arithmetic, traits.target.family
    tiles: list[Any]
    if kind == "bf16x6":  # both products have the forward's tiles
        tiles = [(tile[:3], tile[:3], *tile[3:]) for tile in _SHIPPED["tiled"][family][kind]]
    else:
        tiles = _SHIPPED["pairs"][family][kind]
    pairs = [
        BackwardConfig(
            shaped("forward", *(*input, stages, warps)),
            shaped("backward_weight", *(*weight, stages, warps)),
        )
        for input, weight, stages, warps in tiles
    ]
    return tuple(pair for pair in pairs if why_illegal_pair(pair, traits) is None)
