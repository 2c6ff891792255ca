"""The configurations that are shipped: tiles for each family of GPUs and kind of arithmetic."""

import functools

from .config import TARGETS, Config, Kernel, Kind, Traits
from .legality import why_illegal

# "tiled": (rows, columns, depth, stages, warps) of the output tiles, largest first, by the target's
# family and the arithmetic. tests/test_compile.py compiles every one that is legal, for its target,
# and fails where it spills.
_TILES: dict[str, dict[str, list[tuple[int, int, int, int, int]]]] = {
    "sm_80": {
        "16-bit": [
            (128, 128, 32, 4, 8),
            (128, 64, 32, 4, 8),
            (64, 64, 64, 3, 4),
            (64, 64, 32, 4, 4),
            (32, 64, 64, 4, 4),
            (16, 64, 128, 3, 4),
            (16, 64, 32, 4, 4),
        ],
        "tf32": [(128, 64, 32, 3, 8), (64, 64, 32, 4, 4), (32, 64, 32, 4, 4), (16, 64, 32, 4, 4)],
        "float32": [
            (128, 64, 16, 3, 8),
            (64, 64, 16, 3, 8),
            (32, 64, 16, 3, 4),
            (16, 64, 16, 3, 4),
        ],
        "float64": [(64, 64, 16, 3, 8), (32, 32, 16, 3, 4), (16, 32, 16, 3, 4)],
    },
    "sm_90": {
        "16-bit": [
            (128, 256, 64, 3, 8),
            (128, 128, 64, 4, 8),
            (64, 128, 64, 4, 4),
            (128, 64, 32, 4, 8),
            (64, 64, 64, 4, 4),
            (32, 64, 128, 4, 4),
            (16, 64, 128, 4, 4),
            (16, 64, 32, 4, 4),
        ],
        "tf32": [
            (128, 128, 32, 4, 8),
            (64, 128, 32, 4, 4),
            (64, 64, 32, 4, 4),
            (32, 64, 32, 4, 4),
            (16, 64, 64, 4, 4),
            (16, 32, 32, 4, 4),
        ],
        "float32": [
            (128, 64, 16, 3, 8),
            (64, 64, 16, 3, 8),
            (32, 64, 16, 3, 4),
            (16, 64, 16, 3, 4),
        ],
        "float64": [(64, 64, 16, 3, 8), (32, 32, 16, 2, 4), (16, 32, 16, 3, 4)],
    },
    "sm_100": {
        "16-bit": [
            (128, 128, 32, 4, 8),
            (128, 64, 32, 4, 8),
            (64, 64, 64, 3, 4),
            (32, 64, 64, 3, 4),
            (16, 64, 64, 4, 4),
            (16, 64, 32, 4, 4),
        ],
        "tf32": [
            (128, 64, 32, 4, 8),
            (64, 64, 32, 4, 4),
            (32, 64, 32, 4, 4),
            (16, 64, 32, 4, 4),
        ],
        "float32": [
            (64, 64, 16, 3, 8),
            (32, 64, 16, 3, 4),
            (16, 64, 16, 3, 4),
        ],
        "float64": [(64, 64, 16, 3, 8), (32, 32, 16, 3, 4), (16, 32, 16, 3, 4)],
    },
    "gfx942": {
        "16-bit": [
            (128, 128, 64, 2, 8),
            (128, 64, 64, 2, 8),
            (64, 64, 64, 2, 4),
            (32, 64, 64, 2, 4),
            (16, 64, 64, 2, 4),
        ],
        "tf32": [(128, 64, 32, 2, 8), (64, 64, 32, 2, 4), (32, 64, 32, 2, 4), (16, 64, 32, 2, 4)],
        "float32": [
            (128, 64, 16, 2, 8),
            (64, 64, 16, 2, 4),
            (32, 64, 16, 2, 4),
            (16, 64, 16, 2, 4),
        ],
        "float64": [(64, 64, 16, 2, 4), (32, 32, 16, 2, 4), (16, 32, 16, 2, 4)],
    },
    "interpreter": {
        kind: [(32, 32, 32, 1, 1)] for kind in ("16-bit", "tf32", "float32", "float64")
    },
}
# The same for float32 products of pieces, which other kinds do not form. A step is as deep as one
# instruction for bfloat16, which is what their error has been determined for
# (benchmarks/accuracy.py).
TILES_OF_PIECES: dict[str, list[tuple[int, int, int, int, int]]] = {
    "sm_80": [
        (128, 64, 16, 3, 8),
        (64, 64, 16, 3, 4),
        (32, 64, 16, 3, 4),
        (16, 64, 16, 3, 4),
    ],
    "sm_90": [
        (128, 128, 16, 3, 8),
        (128, 64, 16, 3, 8),
        (64, 64, 16, 3, 4),
        (32, 64, 16, 3, 4),
        (16, 64, 16, 3, 4),
    ],
    "sm_100": [
        (128, 64, 16, 3, 8),
        (64, 64, 16, 3, 4),
        (32, 64, 16, 3, 4),
        (16, 64, 16, 3, 4),
    ],
    "gfx942": [
        (128, 128, 16, 2, 8),
        (128, 64, 16, 2, 8),
        (64, 64, 16, 2, 4),
        (16, 64, 16, 2, 4),
    ],
    "interpreter": [(32, 32, 16, 1, 1)],
}

# Of a gated pair in float32, whose other tiles take too many addresses where nothing is aligned,
# and in TF32 too much shared memory for the smallest GPUs.
_SMALLEST_GATED = (16, 32, 16, 3, 4)

# "split_k": (rows, outputs, depth, stages, warps), those for any alignment last. The splits are the
# chooser's.
_SPLIT_K: dict[str, dict[str, list[tuple[int, int, int, int, int]]]] = {
    "sm_80": {
        "16-bit": [
            (64, 64, 64, 4, 4),
            (32, 64, 128, 4, 4),
            (16, 64, 128, 4, 4),
            (32, 64, 32, 4, 4),
        ],
        "tf32": [(32, 64, 64, 4, 4), (16, 64, 64, 4, 4), (32, 64, 32, 4, 4)],
        "float32": [(32, 64, 16, 4, 4), (16, 64, 16, 4, 4)],
        "float64": [(32, 32, 16, 4, 4), (16, 32, 16, 4, 4)],
    },
    "sm_90": {
        "16-bit": [
            (64, 128, 64, 4, 8),
            (32, 64, 128, 5, 4),
            (16, 64, 128, 5, 4),
            (32, 64, 32, 4, 4),
        ],
        "tf32": [(32, 64, 64, 5, 4), (16, 64, 64, 5, 4), (32, 64, 32, 4, 4)],
        "float32": [(32, 64, 16, 4, 4), (16, 64, 16, 4, 4)],
        "float64": [(32, 64, 16, 4, 4), (16, 64, 16, 4, 4), (16, 32, 16, 4, 4)],
    },
    "sm_100": {
        "16-bit": [
            (64, 128, 64, 4, 8),
            (32, 64, 128, 5, 4),
            (16, 64, 128, 5, 4),
            (32, 64, 32, 4, 4),
        ],
        "tf32": [(32, 64, 64, 5, 4), (16, 64, 64, 5, 4), (32, 64, 32, 4, 4)],
        "float32": [(32, 64, 16, 4, 4), (16, 64, 16, 4, 4)],
        "float64": [(16, 32, 16, 4, 4)],
    },
    "gfx942": {
        "16-bit": [(64, 64, 64, 2, 4), (32, 64, 128, 2, 4), (16, 64, 128, 2, 4)],
        "tf32": [(32, 64, 64, 2, 4), (16, 64, 64, 2, 4), (32, 64, 32, 2, 4)],
        "float32": [(32, 64, 64, 2, 4), (16, 64, 64, 2, 4), (32, 64, 16, 2, 4)],
        "float64": [(32, 32, 32, 2, 4), (16, 32, 32, 2, 4), (16, 32, 16, 2, 4)],
    },
    "interpreter": {
        kind: [(32, 32, 16, 1, 1)] for kind in ("16-bit", "tf32", "float32", "float64")
    },
}
# "gemv": (rows, outputs, depth, threads) on every GPU, by the arithmetic. Each thread loads 64
# bytes of weight a step, or 32 where sums take the registers; neighbours read 64 bytes or more that
# are next to each other. Of every two, the first reads along the outputs (Config.reads_outputs).
_GEMV_TILES: dict[str, list[tuple[int, int, int, int]]] = {
    "16-bit": [
        (4, 32, 128, 256),
        (4, 2, 1024, 128),
        (2, 32, 256, 256),
        (2, 4, 1024, 128),
        (1, 32, 256, 256),
        (1, 4, 1024, 128),
    ],
    "float32": [
        (4, 32, 128, 256),
        (4, 4, 512, 128),
        (2, 32, 128, 256),
        (2, 4, 512, 128),
        (1, 32, 128, 256),
        (1, 4, 512, 128),
    ],
    "float64": [
        (4, 16, 128, 256),
        (4, 4, 256, 128),
        (2, 16, 128, 256),
        (2, 4, 256, 128),
        (1, 16, 128, 256),
        (1, 4, 256, 128),
    ],
}
_GEMV_TILES["tf32"] = _GEMV_TILES["float32"]
# "persistent": (rows, columns, depth, stages, warps, parts), in the same order. In parts a tile
# takes less of registers and shared memory, which is what lets the largest have an activation.
_PERSISTENT = {
    "sm_90": [(128, 256, 64, 4, 8, 4), (256, 128, 64, 4, 8, 2), (128, 128, 64, 4, 8, 2)],
    "sm_100": [(128, 256, 64, 4, 8, 4), (256, 128, 64, 4, 8, 2), (128, 128, 64, 4, 8, 2)],
    "interpreter": [(32, 32, 32, 1, 1, 4)],
}


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
        of_pieces = arithmetic == "bf16x6"
        tiles = TILES_OF_PIECES[family] if of_pieces else _TILES[family][arithmetic]
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
            for rows, outputs, depth, threads in _GEMV_TILES[arithmetic]
        ]
    if kind == "split_k":
        splits = 3 if family == "interpreter" else 1
        return [
            Config(rows, outputs, depth, num_warps, num_stages, kind=kind, splits=splits)
            for rows, outputs, depth, num_stages, num_warps in _SPLIT_K[family][arithmetic]
        ]
    return [
        Config(rows, columns, depth, num_warps, num_stages, kind=kind, epilogue_parts=parts)
        for rows, columns, depth, num_stages, num_warps, parts in _PERSISTENT.get(family, [])
    ]
