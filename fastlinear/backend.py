"""Which path computes the layer.

Backends, what the kernels need of the machine, and the calls into the kernels.
"""

import functools
import os
from types import TracebackType

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _checked(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(
            f"{source} must be one of {', '.join(map(repr, BACKENDS))}, but is {backend!r}"
        )
    return backend


# Process-wide, as torch.set_float32_matmul_precision is: the layer's forward
# reads it, its backward follows its forward.
current: str = _checked(os.environ.get("FASTLINEAR_BACKEND", "auto"), "FASTLINEAR_BACKEND")


class use_backend:
    """Context manager that says which path computes `fastlinear.linear`.

    FASTLINEAR_BACKEND sets it from outside.

    The setting is the process's, like PyTorch's own precision settings. A call's backward takes the
    path of its forward.

    Args:
        backend: "auto" takes whatever is known to be fastest: `torch.nn.functional.linear`, until a
            table measured on the GPU at hand says that a kernel is faster. "triton" takes the
            kernels or raises, saying what is missing; it never falls back. "torch" is always
            `torch.nn.functional.linear`.

    Raises:
        ValueError: backend is none of these.
    """

    def __init__(self, backend: str) -> None:
        self.backend = _checked(backend, "backend")
        self.previous: list[str] = []  # a stack: one instance may be entered again within itself

    def __enter__(self) -> None:
        global current
        self.previous.append(current)
        current = self.backend

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global current
        current = self.previous.pop()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on `device_type`, or None where it is off."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def dtype_under(autocast: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """What autocast makes of `dtype`: PyTorch's lets float64 be."""
    return dtype if autocast is None or dtype == torch.float64 else autocast


@functools.cache
def _require_kernels(device: torch.device) -> None:
    """Raises RuntimeError, saying what is missing, where the kernels cannot run on `device`."""
    try:
        from fastlinear.kernels import launch
    except ImportError as error:
        raise RuntimeError(
            f"backend 'triton' needs the package triton, 3.6 or newer ({error}); "
            "install it with `pip install 'fastlinear[triton]'`, or use backend 'auto'"
        ) from error
    if launch.INTERPRETING:
        return
    if device.type != "cuda":
        raise RuntimeError(
            f"backend 'triton' takes tensors on a GPU, but these are on {device}; "
            "to run the kernels in Triton's interpreter set TRITON_INTERPRET=1 before Python "
            "starts, or use backend 'auto'"
        )
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda and capability < (8, 0):
        raise RuntimeError(
            "backend 'triton' takes NVIDIA GPUs of compute capability 8.0 or newer, "
            f"but {device} has {capability[0]}.{capability[1]}; use backend 'auto'"
        )


def _float32_precision() -> str:
    """How torch's settings want float32 products formed.

    Unset counts as "highest", as it does for cuBLAS.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `linear` by the kernels; shapes as `check_shapes` takes them."""
    check_shapes(input, weight, bias)
    _require_kernels(input.device)
    from fastlinear.kernels.forward import linear_forward

    return linear_forward(input, weight, bias, precision=_float32_precision())


def backward(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, bias: bool, batched: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `linear_backward` by the kernels.

    A gradient that is not wanted is not computed, and comes back empty.
    """
    check_backward_shapes(grad_output, input, weight, batched)
    _require_kernels(grad_output.device)
    from fastlinear.kernels.backward import linear_backward_input, linear_backward_weight

    precision = _float32_precision()
    grad_input = grad_weight = grad_bias = None
    if weight is not None:
        grad_input = linear_backward_input(grad_output, weight, precision=precision)
    if input is not None:
        grad_weight, grad_bias = linear_backward_weight(
            grad_output, input, bias, batched=batched, precision=precision
        )
    elif bias:
        # No grad_weight pass to ride on (frozen weight):
        # one read of grad_output is all there is to do.
        grad_bias = sum_rows(grad_output, batched)
    return (
        grad_output.new_empty(0) if grad_input is None else grad_input,
        grad_output.new_empty(0) if grad_weight is None else grad_weight,
        grad_output.new_empty(0) if grad_bias is None else grad_bias,
    )


def check_backward_shapes(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, batched: bool
) -> None:
    """Raises RuntimeError unless input has grad_output's leading shape, and weight its features.

    The layer's own backward sees to it; this is for a direct call of the op.
    """
    dims = 3 if batched else 2
    fits = (
        grad_output.dim() >= 1
        and (not batched or grad_output.dim() == 3)
        and (input is None or input.shape[:-1] == grad_output.shape[:-1])
        and (weight is None or (weight.dim() == dims and weight.shape[-2] == grad_output.shape[-1]))
        and (weight is None or not batched or weight.shape[0] == grad_output.shape[0])
    )
    if not fits:
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (input, weight)]
        raise RuntimeError(
            "fastlinear::linear_backward takes grad_output (*, N), input (*, K), weight (N, K), or "
            "(B, M, N), (B, M, K), (B, N, K) if batched, "
            f"but grad_output is {tuple(grad_output.shape)}, input {shapes[0]}, weight {shapes[1]}"
        )


def sum_rows(grad_output: Tensor, batched: bool) -> Tensor:
    """grad_bias by PyTorch: the sum over every dimension but features, and layers if batched."""
    if batched:
        return grad_output.sum(1)
    leading = tuple(range(grad_output.dim() - 1))
    # sum(()) would sum everything.
    return grad_output.sum(leading) if leading else grad_output.clone()


def check_shapes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises RuntimeError unless shapes are those of one layer or of B layers.

    One layer is (*, K), (N, K), (N,); B layers are (B, M, K), (B, N, K), (B, N).

    `fastlinear.linear` sees to it before; a direct call of the op must not read out of bounds
    either.
    """
    batched = weight.dim() == 3
    fits = (
        weight.dim() in (2, 3)
        and input.dim() >= 1
        and (not batched or (input.dim() == 3 and input.shape[0] == weight.shape[0]))
        and input.shape[-1] == weight.shape[-1]
        and (bias is None or bias.shape == weight.shape[:-1])
    )
    if not fits:
        raise RuntimeError(
            "fastlinear::linear takes input (*, K), weight (N, K), bias (N,), "
            "or input (B, M, K), weight (B, N, K), bias (B, N), "
            f"but input is {tuple(input.shape)}, weight {tuple(weight.shape)}, "
            f"bias {None if bias is None else tuple(bias.shape)}"
        )
