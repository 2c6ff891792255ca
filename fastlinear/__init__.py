"""A drop-in `nn.Linear` whose forward and backward are fused Triton kernels."""

from fastlinear.backend import use_backend
from fastlinear.convert import Report, convert, revert
from fastlinear.explain import Explanation, explain
from fastlinear.functional import linear
from fastlinear.modules import Linear

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Linear",
    "Report",
    "__version__",
    "convert",
    "explain",
    "linear",
    "revert",
    "use_backend",
]
