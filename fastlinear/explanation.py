"""Says what a call would do: which path, why, with which kernels, and what that moves."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlinear import _machine as machine
from fastlinear import _torch_internals as internals
from fastlinear import main_grad
from fastlinear._torch_internals import Linear as TorchLinear
from fastlinear.choice import backend, known
from fastlinear.choice.launchers import launchers
from fastlinear.choice.table import LIBRARIES
from fastlinear.choice.way import tables_say_so
from fastlinear.kernels.configs.config import Config
from fastlinear.kernels.launching.operands import FROM_OUTPUT
from fastlinear.modules import Linear, activation_of, is_as_written
from fastlinear.ops.arguments import why_not

if TYPE_CHECKING:
    from fastlinear.planned import Plan

PYTORCH = "torch.nn.functional.linear"
KERNELS = "fastlinear.kernels"


@dataclass(frozen=True)
class Product:
    """One of the matrix products of a layer, as `explain` expects it.

    name: what it computes: "output", "activation" where PyTorch applies it, "grad_preactivation"
        where there is one, "grad_input", "grad_weight" (with grad_bias) or, where that alone is
        wanted, "grad_bias".
    kernel: the Triton kernel's name, or None where PyTorch computes it; "linear_backward_kernel"
        computes both grad_input and grad_weight, in one launch. "onednn" and "epilogue" are
        PyTorch's own linear of oneDNN's and its product with cuBLASLt's epilogue.
    config: its blocks, warps and stages, or None where no kernel of ours computes it.
    splits: programs that share a sum; the last of them adds the parts.
    precision: how its float32 products are formed: "ieee", "tf32" or "bf16x6"; None where
        PyTorch computes it. Other dtypes have one way, "ieee".
    operations: multiplications and additions of the product itself, or of the sum.
    bytes: what has to move if every operand is read once and every result written once.
    microseconds: the launch's time on the device: measured, if there is a `table`, or modelled;
        None where neither is known.
    table: the file that the choice is from, with its date, and PyTorch's microseconds there; or
        None where there is none.
    """

    name: str
    kernel: str | None
    config: Config | None
    splits: int
    precision: str | None
    operations: int
    bytes: int
    microseconds: float | None = None
    table: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What a layer would do with an input; printed, it is a page of text.

    backend: the setting: "auto", "triton" or "torch".
    path: "fastlinear.kernels", "onednn", "epilogue", "torch.nn.functional.linear", or None where
        the call would raise.
    reason: why that path, or what the call would raise.
    device, dtype: where and in what the products are computed.
    input_shape, weight_shape: (*, in_features), (out_features, in_features).
    activation: the layer's; the kernels apply it within the output's product.
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
            f"input {self.input_shape}, weight {self.weight_shape}, {self.dtype} on {self.device}"
            + ("" if self.activation is None else f", then {self.activation}"),
            f"backend {self.backend!r} takes {self.path or 'no path'}: {self.reason}",
        ]
        for product in self.products:
            lines.append(
                f"  {product.name:18} {_scaled(product.operations)}op {_scaled(product.bytes)}B  "
                + _launch_in_words(product)
            )
        versions = (f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*lines, ", ".join(versions)])


def explain(layer: nn.Linear, input: Tensor) -> Explanation:
    """Says what `layer(input)` would do here and now, by the settings in force.

    It launches no kernel. Operands that the kernels do not take go through PyTorch once, to see
    whether it takes them. Backward is explained for a contiguous gradient of the output.

    Args:
        layer: a `fastlinear.Linear`, or an `nn.Linear` to compare with.
        input: (*, in_features), as the layer would get it; its values do not matter.

    Returns:
        An Explanation, to print or to take apart with `as_dict()`.

    Raises:
        TypeError: layer is not an `nn.Linear`, or input not a Tensor.
        Exception: whatever PyTorch raises for an input of that shape or dtype.
    """
    if not isinstance(layer, TorchLinear):
        raise TypeError(f"explain() takes an nn.Linear, but layer is {type(layer).__name__}")
    if not isinstance(input, Tensor):
        raise TypeError(f"explain() takes a Tensor, but input is {type(input).__name__}")
    weight, bias = _parameters(layer)
    unsupported = why_not(input, weight, bias)
    if unsupported is not None:
        with torch.no_grad():
            F.linear(input, weight, bias)  # raises where PyTorch does not take them either

    dtype = backend.dtype_under(backend.autocast_dtype(input.device.type), input.dtype)
    activation = activation_of(layer)
    path, reason, planned = _path(layer, input, weight, bias, unsupported)
    products: tuple[Product, ...] = ()
    if path is not None and unsupported is None:  # the rest is PyTorch's own business
        try:
            plans: dict[str, Plan] = {}
            if planned:
                from fastlinear.planned import plans_of

                plans = plans_of(input, weight, bias, activation, dtype)
                named = (plans[one].kernel for one in ("output", "grad_input", "grad_weight"))
                first = next(filter(None, named), None)
                path = first if first in LIBRARIES else path
            products = _products(input, weight, bias, activation, dtype, plans)
            if isinstance(layer, Linear) and layer.accumulate_into_main_grad:
                by = "the kernel" if main_grad.by_the_kernels(input) else "PyTorch"
                reason += f"; grad_weight is added to weight.main_grad by {by}"
        except RuntimeError as error:
            path, reason = None, f"it raises RuntimeError: {error}"
    return Explanation(
        backend=backend.current,
        path=path,
        reason=reason,
        device=machine.in_words(input.device),
        dtype=str(dtype).removeprefix("torch."),
        input_shape=() if input.is_nested else tuple(input.shape),
        weight_shape=tuple(weight.shape),
        activation=activation,
        products=products,
        versions=machine.versions(),
    )


def _parameters(layer: TorchLinear) -> tuple[Tensor, Tensor | None]:
    """weight and bias, once, and in eval mode: a parametrization may count its evaluations."""
    training = {module: module.training for module in layer.modules()}
    try:
        layer.eval()
        return layer.weight, layer.bias
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _path(
    layer: TorchLinear,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unsupported: str | None,
) -> tuple[str | None, str, bool]:
    """(path, reason, whether kernels are launched)."""
    if "forward" in vars(layer) or type(layer).forward not in (TorchLinear.forward, Linear.forward):
        return None, "the layer has a forward of its own, which is not known here", False
    if internals.linear_is_patched():
        return None, "nn.Linear.forward is replaced, by what is not known here", False
    if isinstance(layer, Linear) and not is_as_written(Linear):
        return None, "fastlinear.Linear.forward is replaced, by what is not known here", False
    if not isinstance(layer, Linear):
        return PYTORCH, "the layer is no fastlinear.Linear (see fastlinear.convert)", False
    if backend.current == "torch":
        return PYTORCH, "this backend has no other", False
    if backend.current == "auto":
        if unsupported is not None:
            return PYTORCH, f"the kernels take {unsupported}", False
        if known.available and tables_say_so(input, weight, bias, activation_of(layer)):
            return KERNELS, "a table says that it is faster here", True
        return PYTORCH, "no measurement says that a kernel is faster here", False
    if unsupported is not None:
        return None, f"it raises TypeError: the kernels take {unsupported}", False
    if input.is_meta:
        return KERNELS, "but on meta tensors there is nothing to launch", False
    if backend.invariant:
        return KERNELS, "within batch_invariant() there is no other", True
    return KERNELS, "this backend has no other", True


def info() -> dict[str, Any]:
    """What `python -m fastlinear info` prints: versions, settings, and each device's path."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "versions": machine.versions(),
        "backend": backend.current,
        "float32 products": backend.float32_precision(),
        **_launches(),
        "devices": {machine.in_words(device): _kernels_on(device) for device in devices},
        "tables": {machine.in_words(device): _tables_of(device) for device in devices},
    }


def _launches() -> dict[str, str]:
    """How kernels are launched, where that takes longer than it could."""
    try:
        launchers()
    except RuntimeError:
        return {}
    import triton

    from fastlinear.kernels.launching.compiled_launch import KNOWN, known

    if known(triton.__version__):
        return {}
    return {
        "launches": f"all by Triton, which takes longer: direct ones are for Triton {KNOWN[0]} to "
        f"{KNOWN[-1]}, this is {triton.__version__}"
    }


def _tables_of(device: torch.device) -> str:
    if not known.available:
        return "none"
    files = known.files(device)
    return ", ".join(f"{path} ({_counted(rows, 'row')})" for path, rows in files.items()) or "none"


def _kernels_on(device: torch.device) -> str:
    try:
        target = launchers().forward.launch.target_of(device)
    except RuntimeError as error:
        return str(error)
    if target.family == "interpreter":
        return "kernels run in Triton's interpreter"
    return f"kernels run, with the tiles of {target.family}"


def _products(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    plans: "dict[str, Plan]",
) -> tuple[Product, ...]:
    """The products of a call on `input`, with the kernels' plans, where there are any."""
    rows = math.prod(input.shape[:-1])
    n, k = weight.shape
    product = 2 * rows * n * k
    recording = torch.is_grad_enabled()
    bias_wanted = recording and bias is not None and bias.requires_grad
    found = [("output", product, rows * k + n * k + (bias is not None) * n + rows * n)]
    if activation is not None and not plans:  # PyTorch's, in a pass of its own
        found.append(("activation", 0, 2 * rows * n))
    wanted = input.requires_grad or weight.requires_grad or bias_wanted
    if recording and wanted and activation is not None:
        if plans and activation not in FROM_OUTPUT:
            found[0] = ("output", product, found[0][2] + rows * n)  # the pre-activation
        found.append(("grad_preactivation", 0, 3 * rows * n))
    if recording and input.requires_grad:
        found.append(("grad_input", product, rows * n + n * k + rows * k))
    if recording and weight.requires_grad:
        found.append(("grad_weight", product, rows * n + rows * k + n * k + bias_wanted * n))
    elif bias_wanted:
        found.append(("grad_bias", rows * n, rows * n + n))  # a sum of PyTorch's
    by_pytorch = {"kernel": None, "config": None, "splits": 1, "precision": None}
    products = []
    for name, operations, elements in found:
        planned: Any = plans[name]._asdict() if name in plans else by_pytorch
        moved = elements * dtype.itemsize
        products.append(Product(name, operations=operations, bytes=moved, **planned))
    return tuple(products)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _launch_in_words(product: Product) -> str:
    config = product.config
    measured: list[str] = []
    if product.microseconds is not None:
        source = product.table or "by the model"
        measured = [f"{product.microseconds:.4g} us ({source})"]
    if config is None:
        named: str = product.kernel or "PyTorch"
        return ", ".join([named, *measured])
    words = [
        str(product.kernel),
        f"blocks {config.block_m} x {config.block_n} x {config.block_k}",
        _counted(config.num_warps, "warp"),
        _counted(config.num_stages, "stage"),
    ]
    words += [f"{product.splits} splits"] * (product.splits > 1)
    words += [str(product.precision)] * (product.precision != "ieee")
    return ", ".join(words + measured)


def _scaled(number: int) -> str:
    """`number` in a column, with the prefix that leaves one to three digits before the point."""
    scaled, prefixes = float(number), " kMGTP"
    while scaled >= 999.95 and len(prefixes) > 1:
        scaled, prefixes = scaled / 1000, prefixes[1:]
    return f"{scaled:6.4g} {prefixes[0].strip()}"
