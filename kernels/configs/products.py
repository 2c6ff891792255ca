"""A layer's products of contiguous tensors, without the tensors: what launchers make of them.

A table's rows are of such products. Nothing here imports Triton.
"""

from typing import Any

import torch

from .config import BackwardConfig, Config, Kernel, Target, Traits
from .legality import why_illegal, why_illegal_pair

# Which kernel a product is of; "gradients" is grad_input and grad_weight, in one launch.
KERNEL_OF: dict[str, Kernel] = {
    "output": "forward",
    "grad_input": "forward",
    "grad_weight": "backward_weight",
}


def traits_of(
    product: str,
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    activation: str | None = None,
) -> Traits:
    """What launchers find of a product of contiguous tensors, whose addresses divide by 16.

    aligned is as launch.aligned_product has it, wide as launch.wide and descriptors as
    launch.describable.

    Args:
        product: of those in KERNEL_OF, or "gradients".
        n, k, m: out_features, in_features and rows.
        dtype, precision, target: as Traits has them.
        activation: the layer's, which only the output's kernel applies.
    """
    applies = product == "output" and activation is not None
    wide = max(m * k, n * k, m * n) > 2**31
    # Rows of n elements are read of gradients, and of the output written.
    read = (k,) if product == "output" else (n, k)
    whole = (n, k) if applies or wide else read
    return Traits(
        dtype,
        precision,
        aligned=all(size % 16 == 0 for size in whole),
        target=target,
        activation=applies,
        descriptors=all(size * dtype.itemsize % 16 == 0 for size in read),
        wide=wide,
    )


def why_illegal_for(product: str, config: Any, traits: Traits) -> str | None:
    """`why_illegal` of what computes a product; None too where that is no configuration."""
    if isinstance(config, BackwardConfig):
        if config.input.kind != "tiled":
            return "one launch of both gradients computes tiles"
        return why_illegal_pair(config, traits)
    return why_illegal(KERNEL_OF[product], config, traits) if isinstance(config, Config) else None
