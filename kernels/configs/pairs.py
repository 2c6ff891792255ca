"""The pairs of configurations that are shipped, for a launch that computes both gradients."""

import functools

from .config import BackwardConfig, Traits
from .legality import why_illegal
from .tiles import TILES_OF_PIECES, shaped

Tile = tuple[int, int, int]  # rows, columns, depth
# What several families share of the table below.
_FLOAT32 = [
    ((128, 64, 16), (128, 64, 16), 3, 8),
    ((64, 64, 16), (64, 64, 16), 3, 8),
    ((32, 64, 16), (32, 64, 16), 3, 4),
    ((16, 64, 16), (32, 64, 16), 3, 4),
]
_FLOAT64 = [
    ((64, 64, 16), (64, 64, 16), 3, 8),
    ((32, 32, 16), (32, 32, 16), 3, 4),
    ((16, 32, 16), (32, 32, 16), 3, 4),
]
# Tiles of grad_input, tiles of grad_weight, and the stages and warps of both, for a launch that
# computes both, by the target's family and the arithmetic. The first are for many rows; for few,
# grad_input's tiles are flat and deep, and grad_weight's shallow.
_PAIRS: dict[str, dict[str, list[tuple[Tile, Tile, int, int]]]] = {
    "sm_80": {
        "16-bit": [
            ((128, 128, 32), (128, 128, 32), 4, 8),
            ((128, 64, 32), (128, 64, 32), 4, 8),
            ((64, 64, 32), (64, 64, 32), 4, 4),
            ((32, 64, 64), (64, 64, 32), 4, 4),
            ((16, 64, 64), (64, 64, 16), 4, 4),
        ],
        "tf32": [
            ((128, 64, 32), (128, 64, 32), 3, 8),
            ((64, 64, 32), (64, 64, 32), 4, 4),
            ((32, 64, 32), (64, 64, 32), 4, 4),
            ((16, 64, 32), (64, 64, 16), 4, 4),
        ],
        "float32": _FLOAT32,
        "float64": _FLOAT64,
    },
    "sm_90": {
        "16-bit": [
            ((128, 256, 64), (128, 256, 64), 3, 8),
            ((128, 128, 64), (128, 128, 64), 4, 8),
            ((64, 128, 64), (64, 128, 64), 4, 4),
            ((64, 64, 64), (64, 64, 64), 4, 4),
            ((32, 64, 128), (64, 128, 32), 4, 4),
            ((16, 64, 128), (64, 128, 16), 4, 4),
            ((16, 64, 32), (64, 64, 32), 4, 4),
        ],
        "tf32": [
            ((128, 128, 32), (128, 128, 32), 4, 8),
            ((64, 128, 32), (64, 128, 32), 4, 4),
            ((64, 64, 32), (64, 64, 32), 4, 4),
            ((32, 64, 32), (64, 64, 32), 4, 4),
            ((16, 64, 64), (64, 64, 16), 4, 4),
            ((16, 32, 32), (16, 32, 32), 4, 4),
        ],
        "float32": _FLOAT32,
        "float64": [
            ((64, 64, 16), (64, 64, 16), 3, 8),
            ((32, 32, 16), (32, 32, 16), 2, 4),
            ((16, 32, 16), (32, 32, 16), 3, 4),
        ],
    },
    "sm_100": {
        "16-bit": [
            ((128, 128, 32), (128, 128, 32), 4, 8),
            ((128, 64, 32), (128, 64, 32), 4, 8),
            ((64, 64, 64), (64, 64, 64), 3, 4),
            ((32, 64, 64), (64, 64, 32), 3, 4),
            ((16, 64, 64), (64, 64, 16), 4, 4),
        ],
        "tf32": [
            ((128, 64, 32), (128, 64, 32), 4, 8),
            ((64, 64, 32), (64, 64, 32), 4, 4),
            ((32, 64, 32), (64, 64, 32), 4, 4),
            ((16, 64, 32), (64, 64, 16), 4, 4),
        ],
        "float32": [
            ((64, 64, 16), (64, 64, 16), 3, 8),
            ((32, 64, 16), (32, 64, 16), 3, 4),
            ((16, 64, 16), (32, 64, 16), 3, 4),
        ],
        "float64": _FLOAT64,
    },
    "gfx942": {
        "16-bit": [
            ((128, 128, 64), (128, 128, 64), 2, 8),
            ((128, 64, 64), (128, 64, 64), 2, 8),
            ((64, 64, 64), (64, 64, 64), 2, 4),
            ((32, 64, 64), (64, 64, 32), 2, 4),
            ((16, 64, 64), (64, 64, 16), 2, 4),
        ],
        "tf32": [
            ((128, 64, 32), (128, 64, 32), 2, 8),
            ((64, 64, 32), (64, 64, 32), 2, 4),
            ((32, 64, 32), (64, 64, 32), 2, 4),
            ((16, 64, 32), (64, 64, 16), 2, 4),
        ],
        "float32": [
            ((128, 64, 16), (128, 64, 16), 2, 8),
            ((64, 64, 16), (64, 64, 16), 2, 4),
            ((32, 64, 16), (64, 64, 16), 2, 4),
            ((16, 64, 16), (64, 64, 16), 2, 4),
        ],
        "float64": [
            ((64, 64, 16), (64, 64, 16), 2, 4),
            ((32, 32, 16), (32, 32, 16), 2, 4),
            ((16, 32, 16), (32, 32, 16), 2, 4),
        ],
    },
    "interpreter": {
        kind: [((32, 32, 32), (32, 32, 32), 1, 1)]
        for kind in ("16-bit", "tf32", "float32", "float64")
    },
}


@functools.cache
def legal_pairs(traits: Traits) -> tuple[BackwardConfig, ...]:
    """Every shipped pair of which both are legal, largest tiles first.

    Their programs are never in the same place: neither leaves less room for the other. Of
    `traits`, aligned says it of all operands, and second_product is of grad_input alone.
    """
    kind, family = traits.arithmetic, traits.target.family
    if kind == "bf16x6":  # both products have the forward's tiles
        tiles = [(tile[:3], tile[:3], *tile[3:]) for tile in TILES_OF_PIECES[family]]
    else:
        tiles = _PAIRS[family][kind]
    pairs = [
        BackwardConfig(
            shaped("forward", *input, stages, warps),
            shaped("backward_weight", *weight, stages, warps),
        )
        for input, weight, stages, warps in tiles
    ]
    return tuple(
        pair
        for pair in pairs
        if why_illegal("forward", pair.input, traits) is None
        and why_illegal("backward_weight", pair.weight, traits) is None
    )
