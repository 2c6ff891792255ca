"""A drop-in `nn.Linear` whose forward and backward are fused Triton kernels."""

import importlib
from typing import TYPE_CHECKING

from fastlinear.choice.backend import batch_invariant, use_backend, use_float32_products
from fastlinear.functional import batched_linear, gated_linear, linear
from fastlinear.modules import BatchedLinear, GatedLinear, Linear

if TYPE_CHECKING:
    from fastlinear.conversion.convert import Report, convert, revert
    from fastlinear.explanation import Explanation, explain
    from fastlinear.tuning.tune import Tuned, tune

__version__ = "0.1.0"

__all__ = [
    "BatchedLinear",
    "Explanation",
    "GatedLinear",
    "Linear",
    "Report",
    "Tuned",
    "__version__",
    "batch_invariant",
    "batched_linear",
    "convert",
    "explain",
    "gated_linear",
    "linear",
    "revert",
    "tune",
    "use_backend",
    "use_float32_products",
]

# Whoever only runs layers does without these, a third of the time that the import takes.
_ON_DEMAND = dict.fromkeys(("Report", "convert", "revert"), "conversion.convert")
_ON_DEMAND |= dict.fromkeys(("Explanation", "explain"), "explanation")
_ON_DEMAND |= dict.fromkeys(("Tuned", "tune"), "tuning.tune")


def __getattr__(name: str) -> object:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)
