"""What kernels are tested with.

That is the truth that they are compared with, the error they are allowed, and the operands they
are given.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlinear.kernels.configs.config import TARGETS, BackwardConfig, Config, Kernel, Kind, Traits
from fastlinear.kernels.configs.tiles import legal_configs, legal_pairs
from fastlinear.kernels.launching import launch

# Of every kind that a forward product may be computed by.
FORWARD_KERNELS = (
    "linear_forward_kernel",
    "linear_gemv_kernel",
    "linear_split_k_kernel",
    "persistent_forward_kernel",
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# (M, N, K): shapes for kernels whose interpreted blocks are 32 x 32 x 32, with the reason for each.
SHAPES = {
    "one of each": (1, 1, 1),
    "one block": (32, 32, 32),
    "one less than a block": (31, 31, 31),
    "one more than a block": (33, 33, 33),
    "several blocks, none whole": (70, 50, 77),
    "one datapoint": (1, 40, 64),
    "one output feature": (45, 1, 40),
    "one input feature": (45, 40, 1),
    "tile groups of unequal size": (300, 70, 16),
    "many rows, few tiles: split sums": (517, 10, 20),
    "long sums": (8, 12, 700),
    "no rows": (0, 5, 7),
    "no output features": (5, 0, 7),
    "no input features": (5, 7, 0),
    "nothing at all": (0, 0, 0),
}


# dtypes that have configurations of their own, and how their products are formed.
ARITHMETICS = [
    ("float16", "ieee"),
    ("float32", "ieee"),
    ("float32", "tf32"),
    ("float32", "bf16x6"),
    ("float64", "ieee"),
]


def shipped_configs(kernel: Kernel, kind: Kind = "tiled") -> list[tuple[str, str, Config]]:
    """(dtype, precision, config) of every tile of every GPU; those that read alike once."""
    found = {}
    for target in TARGETS.values():
        for dtype, precision in ARITHMETICS:
            traits = Traits(getattr(torch, dtype), precision, True, target)
            for config in legal_configs(kernel, traits, kind):
                found[config.block_m, config.block_n, config.block_k, dtype, precision] = config
    return [(dtype, precision, config) for (*_, dtype, precision), config in found.items()]


def shipped_pairs() -> list[tuple[str, str, BackwardConfig]]:
    """(dtype, precision, pair) of every pair of every GPU; those that read alike once."""
    found = {}
    for target in TARGETS.values():
        for dtype, precision in ARITHMETICS:
            for pair in legal_pairs(Traits(getattr(torch, dtype), precision, True, target)):
                blocks = [
                    (one.block_m, one.block_n, one.block_k) for one in (pair.input, pair.weight)
                ]
                found[(*blocks, dtype, precision)] = pair
    return [(dtype, precision, pair) for (*_, dtype, precision), pair in found.items()]


def traits_of(input: Tensor, weight: Tensor, precision: str) -> Traits:
    """What decides which configurations of a forward product are legal for these operands."""
    operands = (launch.Operand(*fields) for fields in launch.describe(input, weight)[:2])
    rows, described = launch.rows_of(next(operands), batched=weight.dim() == 3), next(operands)
    return Traits(
        input.dtype,
        precision,
        aligned=launch.aligned(rows.operand, described),
        target=launch.target_of(input.device),
        descriptors=launch.describable(rows, described),
    )


def smallest_config(kind: Kind, input: Tensor, weight: Tensor, precision: str) -> Config:
    """The last of the kind's configurations that is legal for these operands; else the test skips.

    The interpreter has one of each kind.
    """
    legal = legal_configs("forward", traits_of(input, weight, precision), kind)
    if not legal:
        pytest.skip(f"no {kind} kernel takes such operands")
    return legal[-1]


@contextlib.contextmanager
def programs_in_order(order: Callable[[int, int], int]) -> Iterator[None]:
    """Has the interpreter run, as the i-th of n programs of a launch, the `order(i, n)`-th."""
    from triton.runtime.interpreter import InterpreterBuilder

    set_grid_idx = InterpreterBuilder.set_grid_idx

    def reordered(self: Any, x: int, y: int, z: int) -> None:
        set_grid_idx(self, order(x, self.grid_dim[0]), y, z)

    InterpreterBuilder.set_grid_idx = reordered
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = set_grid_idx


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float64, as a float64 tensor.

    Float64 operands are multiplied in the CPU's extended precision.
    """
    if a.dtype == torch.float64:
        wide = np.longdouble
        product = a.detach().cpu().numpy().astype(wide) @ b.detach().cpu().numpy().astype(wide)
        return torch.from_numpy(np.asarray(product, dtype=np.float64)).to(a.device)
    return a.detach().double() @ b.detach().double()


def total(tensor: Tensor, dim: int) -> Tensor:
    """`tensor.sum(dim)`, as exact as `matmul`: a product with ones."""
    ones = torch.ones(1, tensor.shape[dim], dtype=tensor.dtype, device=tensor.device)
    return matmul(ones, tensor).squeeze(dim)


def exact_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = matmul(input, weight.mT)
    if bias is None:
        return product
    return product + (bias.double() if weight.dim() == 2 else bias.double().unsqueeze(1))


def exact_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_weight, grad_bias)."""
    if weight.dim() == 3:
        return (
            matmul(grad_output, weight),
            matmul(grad_output.mT, input),
            total(grad_output, 1),
        )
    rows, features = grad_output.shape[:-1].numel(), grad_output.shape[-1]
    grad_rows, input_rows = (
        grad_output.reshape(rows, features),
        input.reshape(rows, input.shape[-1]),
    )
    return matmul(grad_output, weight), matmul(grad_rows.mT, input_rows), total(grad_rows, 0)


def native_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own result in the same dtype and precision setting."""
    if weight.dim() == 2:
        # Contiguous: on CPUs with bfloat16 instructions torch 2.13 and 2.14, or their oneDNN 3.12,
        # read the element past a row of odd length, which is NaN in what `fenced` gives.
        return F.linear(input.contiguous(), weight.contiguous(), bias)
    product = input @ weight.mT
    return product if bias is None else torch.baddbmm(bias.unsqueeze(1), input, weight.mT)


def native_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = weight.new_zeros(weight.shape[:-1], requires_grad=True)
    return torch.autograd.grad(
        native_forward(input, weight, bias), (input, weight, bias), grad_output
    )


def rounding_step(dtype: torch.dtype) -> float:
    """The spacing of numbers near 1 to which products' operands or results are rounded."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() == "high"
    return 2.0**-10 if tf32 else torch.finfo(dtype).eps


def assert_as_exact(
    result: Tensor, native: Tensor, exact: Tensor, what: str = "result", scale: float = 0.0
) -> None:
    """Fails unless the largest error of `result` is within its budget.

    The budget is twice the largest error of `native`, plus one rounding step at the size of the
    largest result, or at `scale` where the sums on the way are larger than what they end in.
    """
    assert result.shape == native.shape, (
        f"{what} has shape {tuple(result.shape)}, PyTorch's {tuple(native.shape)}"
    )
    assert result.dtype == native.dtype, f"{what} is {result.dtype}, PyTorch's {native.dtype}"
    if exact.numel() == 0:
        return
    error = (result.detach().double() - exact).abs().max().item()
    native_error = (native.detach().double() - exact).abs().max().item()
    budget = 2 * native_error + rounding_step(result.dtype) * max(scale, exact.abs().max().item())
    assert error <= budget, (
        f"{what} is off by {error:.3g}, PyTorch by {native_error:.3g}; the budget is {budget:.3g}"
    )


def sum_scale(terms: Tensor, dtype: torch.dtype, dim: int) -> float:
    """The size at which a sum over `dim` is rounded, as `assert_as_exact` takes it.

    The sum may end near 0, with PyTorch's exact by luck; its roundings are those of the largest
    sum on the way. Where the accumulator is no wider than the result each addition rounds, and
    they pile up as a random walk does, with the square root of their number.
    """
    if terms.numel() == 0:
        return 0.0
    roundings = terms.shape[dim] ** 0.5 if dtype in (torch.float32, torch.float64) else 1.0
    return roundings * terms.detach().double().cumsum(dim).abs().max().item()


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal random numbers inside a buffer of NaN.

    A kernel that reads beside its operand is seen.
    """
    size = int(np.prod(shape))
    buffer = torch.full((size + 128,), float("nan"), dtype=dtype, device=device)
    operand = buffer[64 : 64 + size].view(*shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return operand.copy_(torch.randn(*shape, dtype=wide, device=device))


def fenced(tensor: Tensor, offset: int = 64) -> Tensor:
    """`tensor` with NaN in every element of its storage that is not its own.

    Its strides stay as they are; its first element is the `offset`-th of the storage.
    """
    farthest = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    extent = 1 + farthest if tensor.numel() else 0
    size = offset + extent + 64
    buffer = torch.full((size,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    own = torch.arange(offset, offset + extent, device=tensor.device)
    # Elements of stride 0 are written more than once, with one value.
    if extent:
        buffer[own.as_strided(tensor.shape, tensor.stride()).flatten()] = tensor.flatten()
    return buffer.as_strided(tensor.shape, tensor.stride(), offset)
