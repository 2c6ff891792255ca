"""Says what a call would do: which path, why, with which kernels, and what that moves."""

import dataclasses
import importlib.metadata
import math
import platform
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlinear import backend
from fastlinear.functional import why_not
from fastlinear.kernels.configs import Config
from fastlinear.modules import Linear

PYTORCH = "torch.nn.functional.linear"
KERNELS = "fastlinear.kernels"


@dataclass(frozen=True)
class Product:
    """One of the matrix products of a layer, as `explain` expects it.

    name: what it computes: "output", "grad_input" or "grad_weight".
    kernel: the Triton kernel's name, or None on PyTorch's path.
    config: its blocks, warps and stages, or None on PyTorch's path.
    splits: programs that share a sum, whose parts a second launch adds.
    operations: multiplications and additions of the product itself.
    bytes: what has to move if every operand is read once and every result written once.
    """

    name: str
    kernel: str | None
    config: Config | None
    splits: int
    operations: int
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """What a layer would do with an input; printed, it is a page of text.

    backend: the setting: "auto", "triton" or "torch".
    path: "fastlinear.kernels", "torch.nn.functional.linear", or None where the call would raise.
    reason: why that path, or what the call would raise.
    device, dtype: where and in what the products are computed.
    input_shape, weight_shape: (*, in_features), (out_features, in_features).
    activation: what PyTorch then applies to the output, in a pass of its own.
    products: the forward product, and those of backward for what needs a gradient.
    versions: of fastlinear, torch, triton (None if not installed) and Python.
    """

    backend: str
    path: str | None
    reason: str
    device: str
    dtype: str
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    activation: str | None
    products: tuple[Product, ...]
    versions: dict[str, str | None]

    def as_dict(self) -> dict[str, Any]:
        """The same in dictionaries and tuples, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"input {self.input_shape}, weight {self.weight_shape}, {self.dtype} on {self.device}",
            f"backend {self.backend!r} takes {self.path or 'no path'}: {self.reason}",
        ]
        for product in self.products:
            lines.append(
                f"  {product.name:12} {_scaled(product.operations)}op {_scaled(product.bytes)}B  "
                + _launch_in_words(product)
            )
        if self.activation is not None:
            lines.append(f"  {self.activation:12} PyTorch, in a pass of its own")
        versions = (f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*lines, ", ".join(versions)])


def explain(layer: nn.Linear, input: Tensor) -> Explanation:
    """Says what `layer(input)` would do here and now, by the settings in force.

    It launches no kernel. Operands that the kernels do not take go through PyTorch once, to see
    whether it takes them.

    Args:
        layer: a `fastlinear.Linear`, or an `nn.Linear` to compare with.
        input: (*, in_features); only its shape, strides, dtype and device matter.

    Returns:
        An Explanation, to print or to take apart with `as_dict()`.

    Raises:
        TypeError: layer is not an `nn.Linear`, or input not a Tensor.
        RuntimeError: what PyTorch raises for an input of that shape or dtype.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"explain() takes an nn.Linear, but layer is {type(layer).__name__}")
    if not isinstance(input, Tensor):
        raise TypeError(f"explain() takes a Tensor, but input is {type(input).__name__}")
    weight, bias = layer.weight, layer.bias
    autocast = backend.autocast_dtype(input.device.type)
    unsupported = why_not(input, weight, bias)
    if unsupported is not None:
        with torch.no_grad():
            F.linear(input, weight, bias)  # raises where PyTorch does not take them either

    path: str | None
    refusal = None if unsupported is None else f"the kernels take {unsupported}"
    dtype = backend.dtype_under(autocast, input.dtype)
    # What PyTorch does with operands that the kernels do not take is its own business.
    products = () if unsupported else _products(input, layer, dtype, planned=False)
    if not isinstance(layer, Linear):
        path, reason = PYTORCH, "the layer is no fastlinear.Linear (see fastlinear.convert)"
    elif backend.current == "torch":
        path, reason = PYTORCH, "this backend has no other"
    elif backend.current == "auto":
        path, reason = PYTORCH, refusal or "no measurement says that a kernel is faster here"
    elif refusal is not None:
        path, reason = None, f"it raises TypeError: {refusal}"
    else:
        try:
            products = _products(input, layer, dtype, planned=True)
            path, reason = KERNELS, "this backend has no other"
        except RuntimeError as error:
            path, reason, products = None, f"it raises RuntimeError: {error}", ()
    return Explanation(
        backend=backend.current,
        path=path,
        reason=reason,
        device=_device_name(input.device),
        dtype=str(dtype).removeprefix("torch."),
        input_shape=tuple(input.shape),
        weight_shape=tuple(weight.shape),
        activation=getattr(layer, "activation", None),
        products=products,
        versions=versions(),
    )


def versions() -> dict[str, str | None]:
    """Of fastlinear, torch, triton and Python; None for what is not installed."""
    import fastlinear

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "fastlinear": fastlinear.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


def info() -> dict[str, Any]:
    """What `python -m fastlinear info` prints: versions, settings, and each device's path."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "backend": backend.current,
        "float32 products": backend.float32_precision(),
        "devices": {_device_name(device): _kernels_on(device) for device in devices},
    }


def _kernels_on(device: torch.device) -> str:
    try:
        target = backend.launchers().forward.launch.target_of(device)
    except RuntimeError as error:
        return str(error)
    if target.family == "interpreter":
        return "kernels run in Triton's interpreter"
    return f"kernels run, with the tiles of {target.family}"


def _device_name(device: torch.device) -> str:
    return (
        f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    )


def _products(
    input: Tensor, layer: nn.Linear, dtype: torch.dtype, *, planned: bool
) -> tuple[Product, ...]:
    """The products of a call on `input`, with the kernels' plans for them if `planned`."""
    rows = math.prod(input.shape[:-1])
    n, k = layer.weight.shape
    bias = 0 if layer.bias is None else n
    operations = 2 * rows * n * k
    moved = {
        "output": rows * k + n * k + bias + rows * n,
        "grad_input": rows * n + n * k + rows * k,
        "grad_weight": rows * n + rows * k + n * k + bias,
    }
    wanted = {"output": True}
    if torch.is_grad_enabled():
        wanted |= {"grad_input": input.requires_grad, "grad_weight": layer.weight.requires_grad}
    plans = _plans(input, layer, dtype) if planned else {}
    products = []
    for name in (name for name in wanted if wanted[name]):
        kernel, config, splits = plans[name]() if planned else (None, None, 1)
        products.append(
            Product(name, kernel, config, splits, operations, moved[name] * dtype.itemsize)
        )
    return tuple(products)


def _plans(input: Tensor, layer: nn.Linear, dtype: torch.dtype) -> dict[str, Any]:
    """By product, a function that gives (kernel, config, splits) as the launchers would."""
    launchers, precision = backend.launchers(), backend.float32_precision()
    launch = launchers.forward.launch
    weight, bias = layer.weight, layer.bias
    # Under autocast operands are cast, which keeps their strides.
    x, w, b = (
        fields and launch.Operand(*fields)._replace(dtype=dtype)
        for fields in launch.describe(input, weight, bias)
    )
    grad_output = x.contiguous(*input.shape[:-1], weight.shape[0])
    turned = w._replace(shape=w.shape[::-1], strides=w.strides[::-1])

    def forward(*operands: Any) -> tuple[str, Config, int]:
        plan = launchers.forward.plan_forward(operands, precision, None)
        return "linear_forward_kernel", plan.config, 1

    def backward_weight() -> tuple[str, Config, int]:
        plan = launchers.backward.plan_backward_weight(
            (grad_output, x, None),
            bias is not None and bias.requires_grad,
            False,
            precision,
            None,
            None,
        )
        splits = 1 if plan.partial_weight is None else plan.partial_weight.shape[0]
        return "linear_backward_weight_kernel", plan.config, splits

    return {
        "output": lambda: forward(x, w, b),
        "grad_input": lambda: forward(grad_output, turned, None),
        "grad_weight": backward_weight,
    }


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _launch_in_words(product: Product) -> str:
    config = product.config
    if product.kernel is None or config is None:
        return "PyTorch"
    words = [
        product.kernel,
        f"blocks {config.block_m} x {config.block_n} x {config.block_k}",
        _counted(config.num_warps, "warp"),
        _counted(config.num_stages, "stage"),
    ]
    return ", ".join(words + [f"{product.splits} splits"] * (product.splits > 1))


def _scaled(number: int) -> str:
    """`number` in a column, with the prefix that leaves one to three digits before the point."""
    scaled, prefixes = float(number), " kMGTP"
    while scaled >= 1000 and len(prefixes) > 1:
        scaled, prefixes = scaled / 1000, prefixes[1:]
    return f"{scaled:6.4g} {prefixes[0].strip()}"
