"""What the launchers launch, for GPUs and operands that are not there.

A `Case` is one launch. Its operands are on the device "meta", which has shapes, strides and
addresses but no memory, and a target stands in for the GPU: the planners choose, and Triton
specialises its kernels, as they do in a call. It needs Triton without its interpreter
(TRITON_INTERPRET unset).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastlinear.kernels.backward import elementwise
from fastlinear.kernels.backward import grad_weight as backward_weight
from fastlinear.kernels.backward import linear as backward
from fastlinear.kernels.configs.config import TARGETS, BackwardConfig, Config, Kernel, Kind
from fastlinear.kernels.forward import gated
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.language.arguments import Tile
from fastlinear.kernels.launching import launch

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PLANNERS: list[Any] = [
    planner
    for module in (backward, backward_weight, elementwise, forward, gated)
    for name, planner in vars(module).items()
    if name.startswith("plan_") and hasattr(planner, "cache_clear")
]
SIZE = 4096  # rows, outputs and inputs of a case that says nothing of them
UNALIGNED = SIZE - 3
DESCRIBED = SIZE - 8  # inputs that descriptors can describe and that 16 does not divide
LAYOUTS = ("", "offset", "sliced", "nested", "transposed")

_current = "sm_90"  # the target that stands in
_made: list["Made"] = []


class Made(NamedTuple):
    """A launch as a launcher has made it."""

    kernel: Any
    launch: launch.Launch
    pointers: tuple[Tensor | None, ...]

    def specialization(self, target: str) -> tuple[Any, ...]:
        """What Triton compiles a kernel anew for; AMD's loads also go by how large a tensor is."""
        pointers = [
            None
            if one is None
            else (one.dtype, one.data_ptr() % 16, target == "gfx942" and is_small(one))
            for one in self.pointers
        ]
        scalars = [
            one if one in (None, 1) else (type(one), one % 16 == 0, one < 2**31)
            for one in (*itertools.chain(*dict(self.launch.strides).values()), *self.launch.scalars)
        ]
        constants = sorted(self.launch.constants.items(), key=lambda item: item[0])
        return self.kernel.__name__, *pointers, *scalars, str(constants)

    def compile(self) -> Any:
        """Triton's CompiledKernel, for the target that is current."""
        return self.kernel.run(
            *self.launch.arguments(self.pointers),
            grid=self.launch.grid,
            warmup=True,
            enable_fp_fusion=True,  # as launches are made
            **self.launch.constants,
        )


def is_small(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() < 2**31


@dataclass(frozen=True)
class Case:
    """One launch, as one call makes it.

    product: "output", "columns" (that of an input given as X.t()), "grad_input", "grad_weight",
        "grad_weight_split", "backward", "backward_of_two", "grad_preactivation", "gated_output" or
        "grad_products".
    config: None where the kernel has none.
    aligned: pointers, sizes and strides divide by 16.
    wide: operands lie so far apart that offsets take 64 bits.
    odd: as many outputs as may be, where `aligned` says nothing of them.
    accumulates: grad_weight is added to what is there.
    sizes: rows, out_features and in_features of a layer of a model; None for SIZE of each.
    layout: one of LAYOUTS, of the rows.
    bias, saves: whether there is one, and whether backward's operands are saved.
    """

    target: str
    product: str
    dtype: str
    precision: str
    config: Config | BackwardConfig | None
    aligned: bool = True
    wide: bool = False
    activation: str | None = None
    odd: bool = False
    accumulates: bool = False
    sizes: tuple[int, int, int] | None = None
    layout: str = ""
    bias: bool = True
    saves: bool = True

    @property
    def label(self) -> str:
        configs = [config for config, _ in self.products()]
        blocks, notes = "-", ""
        if configs:
            config = configs[0]
            blocks = "+".join(f"{one.block_m}x{one.block_n}x{one.block_k}" for one in configs)
            blocks += f" s{config.num_stages} w{config.num_warps}"
            if config.kind != "tiled":
                blocks = f"{config.kind} {blocks}"
            notes += " splits" if config.splits > 1 else ""
            notes += f" {config.epilogue_parts} parts" if config.epilogue_parts > 1 else ""
        notes += ("" if self.aligned else " unaligned") + (" int64" if self.wide else "")
        notes += " odd" if self.odd else ""
        notes += " accumulates" if self.accumulates else ""
        notes += f" {self.activation}" if self.activation else ""
        if self.sizes:
            notes += ("" if self.bias else " no bias") + ("" if self.saves else " inference")
            notes += f" {self.layout}" if self.layout else ""
            notes += " of " + "x".join(map(str, self.sizes))
        return (
            f"{self.target:7} {self.product:18} {self.dtype:9} {self.precision:6} {blocks}{notes}"
        )

    @property
    def name(self) -> str:
        """The label without its padding."""
        return " ".join(self.label.split())

    def products(self) -> list[tuple[Config, Kernel]]:
        """Each product's configuration, and the kernel whose tile it is."""
        if self.config is None:
            return []
        if isinstance(self.config, BackwardConfig):
            return [(self.config.input, "forward"), (self.config.weight, "backward_weight")]
        weight = self.product.startswith("grad_weight")
        return [(self.config, "backward_weight" if weight else "forward")]

    @property
    def described(self) -> bool:
        """Whether operands are unaligned in the way that descriptors allow."""
        persistent = isinstance(self.config, Config) and self.config.kind == "persistent"
        return persistent and not self.aligned

    def extents(self) -> tuple[int, int, int]:
        """M, N and K."""
        if self.sizes:
            return self.sizes
        size = SIZE if self.aligned else UNALIGNED
        rows, outputs = size, UNALIGNED if self.odd else size
        if isinstance(self.config, Config) and self.config.kind == "gemv":
            rows = self.config.block_m
        return rows, outputs, DESCRIBED if self.described else size


class Operands:
    """Those of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.m, self.n, self.k = case.extents()
        self.dtype = getattr(torch, case.dtype)

    def tensor(self, *shape: int) -> Tensor:
        """A contiguous one, whose address divides by 16 unless that is what the case is about."""
        case = self.case
        off = case.layout == "offset" or not (case.aligned or case.sizes or case.described)
        storage = torch.empty(math.prod(shape) + off, dtype=self.dtype, device="meta")
        return storage[int(off) :].view(shape)

    def rows(self, features: int) -> Tensor:
        """(M, features), or (2, M / 2, features) on two strides."""
        case, m = self.case, self.m
        if case.wide:
            stride = 16 * (2**31 // max(1, m - 1) // 16 + 1)
            stride += 0 if case.aligned else 8 if case.described else 1
            return self.tensor((m - 1) * stride + features).as_strided((m, features), (stride, 1))
        if case.layout == "sliced":
            return self.tensor(m, 2 * features)[:, :features]
        if case.layout == "nested" and m % 2 == 0:
            return self.tensor(2, m, features)[:, : m // 2]
        if case.layout == "transposed" or case.product == "columns":
            return self.tensor(features, m).t()
        return self.tensor(m, features)

    @property
    def read(self) -> list[Tensor]:
        """What the products are formed of."""
        outputs, inputs = self.rows(self.n), self.rows(self.k)
        product = self.case.product
        if product.startswith("backward"):
            return [outputs, inputs, self.weight]
        if product.startswith("grad_weight"):
            return [outputs, inputs]
        return [outputs if product == "grad_input" else inputs, self.weight]

    @property
    def bias(self) -> Tensor | None:
        return self.tensor(self.n) if self.case.bias else None

    @property
    def weight(self) -> Tensor:
        return self.tensor(self.n, self.k)

    @property
    def main_grad(self) -> Tensor | None:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.tensor(self.n, self.k).to(wide) if self.case.accumulates else None


def call(case: Case) -> Any:
    """Calls the launcher of `case`: in its configuration, or as it chooses for a model's layer."""
    of = Operands(case)
    product, act, bias = case.product, case.activation, case.bias
    config = None if case.sizes else case.config
    given: dict[str, Any] = {"precision": case.precision, "config": config}
    # With sums that are split, unless the layer has its own number.
    splits = None if case.sizes else 1 if case.accumulates and product == "backward" else 4
    if product in ("output", "columns") and act is None:
        return forward.linear_forward(of.rows(of.k), of.weight, of.bias, **given)
    if product == "output":
        given |= {"activation": act, "save_preactivation": case.saves}
        return forward.linear_activation_forward(of.rows(of.k), of.weight, of.bias, **given)
    if product == "grad_input":
        return backward.linear_backward_input(of.rows(of.n), of.weight, **given)
    if product.startswith("grad_weight"):
        given |= {"main_grad": of.main_grad}
        given |= {"splits": splits if product.endswith("split") or case.sizes else 1}
        return backward_weight.linear_backward_weight(of.rows(of.n), of.rows(of.k), bias, **given)
    if product == "backward":
        given |= {"main_grad": of.main_grad, "splits": splits}
        return backward.linear_backward(of.rows(of.n), of.rows(of.k), of.weight, bias, **given)
    if product == "backward_of_two":
        given |= {"second_weight": of.weight, "splits": splits}
        grad_products = of.tensor(of.m, 2 * of.n)
        return backward.linear_backward(grad_products, of.rows(of.k), of.weight, bias, **given)
    saved = of.tensor(of.m, of.n)
    if product == "grad_preactivation":
        return elementwise.activation_backward(of.rows(of.n), saved, act)
    if product == "gated_output":
        given |= {"activation": act, "save_products": case.saves}
        biases = of.bias, of.bias
        return gated.gated_linear_forward(of.rows(of.k), of.weight, of.weight, *biases, **given)
    assert product == "grad_products", product
    return elementwise.gate_backward(of.rows(of.n), saved, saved, act)


KIND_OF_KERNEL: dict[str, Kind] = {
    "linear_gemv_kernel": "gemv",
    "linear_split_k_kernel": "split_k",
    "persistent_forward_kernel": "persistent",
}


def as_launched(case: Case, made: Made) -> Case:
    """`case` with the configuration and precision of its launch, and whether that is aligned."""
    constants = made.launch.constants
    kind = KIND_OF_KERNEL.get(made.kernel.__name__, "tiled")

    def config(tile: Tile) -> Config:
        return Config(
            *tile[:3],
            num_warps=constants["num_warps"],
            num_stages=constants["num_stages"],
            kind=kind,
            splits=2 if kind == "split_k" and None not in made.launch.scalars else 1,
            epilogue_parts=constants.get("EPILOGUE_PARTS", 1),
        )

    described = (launch.Operand(*launch.describe(one)[0]) for one in Operands(case).read)
    case = dataclasses.replace(
        case,
        precision=constants["OPTIONS"].precision,
        aligned=launch.aligned(*described),
    )
    if "WEIGHT_TILE" in constants:
        pair = BackwardConfig(config(constants["INPUT_TILE"]), config(constants["WEIGHT_TILE"]))
        return dataclasses.replace(case, config=pair)
    tile = constants.get("TILE")
    return dataclasses.replace(case, config=tile and config(tile))


@functools.cache
def _stand_in() -> None:
    """Has launchers note what they launch, for the target that is current."""

    def note(kernel: Any, launched: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:
        _made.append(Made(kernel, launched, pointers))

    launch.run = note
    launch.target_of = lambda device: TARGETS[_current]  # type: ignore[assignment]
    driver: Any = SimpleNamespace(
        get_current_target=lambda: GPU_TARGETS[_current],
        get_current_device=lambda: list(GPU_TARGETS).index(_current),
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)


def aim(target: str) -> None:
    """Has launchers launch for `target` from here on."""
    global _current
    _stand_in()
    if _current != target:
        _current = target
        for planner in PLANNERS:
            planner.cache_clear()


def launched(target: str, calls: Callable[[], Any]) -> list[Made]:
    """What is launched within `calls`, for `target`; nothing is compiled or run."""
    aim(target)
    _made.clear()
    calls()
    return _made.copy()


def compile_case(case: Case) -> Any:
    """Triton's CompiledKernel of the one launch of `case`."""
    (made,) = launched(case.target, lambda: call(case))
    return made.compile()
