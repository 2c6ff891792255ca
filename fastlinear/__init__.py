"""A drop-in `nn.Linear` whose forward and backward are fused Triton kernels."""

from fastlinear.backend import batch_invariant, use_backend, use_float32_products
from fastlinear.convert import Report, convert, revert
from fastlinear.explain import Explanation, explain
from fastlinear.functional import batched_linear, gated_linear, linear
from fastlinear.modules import BatchedLinear, GatedLinear, Linear

__version__ = "0.1.0"

__all__ = [
    "BatchedLinear",
    "Explanation",
    "GatedLinear",
    "Linear",
    "Report",
    "__version__",
    "batch_invariant",
    "batched_linear",
    "convert",
    "explain",
    "gated_linear",
    "linear",
    "revert",
    "use_backend",
    "use_float32_products",
]
