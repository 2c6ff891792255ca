"""Compiles the kernels for GPUs that are not there; `python -m benchmarks.resources` runs it.

It needs Triton without its interpreter (TRITON_INTERPRET unset).
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlinear.kernels import activation as activation_pass
from fastlinear.kernels import (
    backward_weight,
    gated,
    gated_backward,
    gemv,
    grouped,
    launch,
    persistent,
    split_k,
    tiled,
)
from fastlinear.kernels.configs import TARGETS, BackwardConfig, Config, Kernel, Traits
from fastlinear.kernels.operands import ACTIVATIONS, FROM_OUTPUT
from fastlinear.kernels.pairs import legal_pairs
from fastlinear.kernels.tiles import legal_configs

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}

# Strides that are 1, by product and layout: Triton compiles a kernel anew for those.
FORWARD_LAYOUTS = {
    "output": ("stride_ik", "stride_wk"),  # input (M, K) and weight (N, K), both contiguous
    "grad_input": ("stride_ik", "stride_wn"),  # weight transposed
    "columns": ("stride_im", "stride_wk"),  # input given as X.t()
}

LARGEST = ("gelu", "gelu_tanh", "tanh")  # of activations: the others do less of the same

# By kind.
FORWARD_KERNELS = {
    "tiled": tiled.linear_forward_kernel,
    "gemv": gemv.linear_gemv_kernel,
    "split_k": split_k.linear_split_k_kernel,
    "persistent": persistent.persistent_forward_kernel,
}


@dataclass(frozen=True)
class Case:
    """One kernel, as one call would compile it."""

    target: str
    # "output", "grad_input", "columns", "grad_weight", "grad_weight_split", "backward",
    # "backward_of_two", "grad_preactivation", "gated_output" or "grad_products"
    product: str
    dtype: str
    precision: str
    config: Config | BackwardConfig | None
    aligned: bool = True  # pointers, sizes and strides divisible by 16
    wide: bool = False  # 64-bit offsets
    activation: str | None = None
    odd: bool = False  # as many outputs as may be, where `aligned` says nothing of them
    accumulates: bool = False  # grad_weight is added to what is there

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
        return (
            f"{self.target:7} {self.product:18} {self.dtype:9} {self.precision:6} {blocks}{notes}"
        )

    def products(self) -> list[tuple[Config, Kernel]]:
        """Each product's configuration, and the kernel whose tile it is."""
        if self.config is None:
            return []
        if isinstance(self.config, BackwardConfig):
            return [(self.config.input, "forward"), (self.config.weight, "backward_weight")]
        weight = self.product.startswith("grad_weight")
        return [(self.config, "backward_weight" if weight else "forward")]

    @property
    def name(self) -> str:
        """The label without its padding."""
        return " ".join(self.label.split())


def cases(targets: list[str]) -> list[Case]:
    """Every shipped configuration, in every dtype, for every product, on `targets`.

    Alignments and layouts are covered in part.
    """
    found = []
    for target in targets:
        for dtype, precision in [
            ("bfloat16", "ieee"),
            ("float32", "tf32"),
            ("float32", "bf16x6"),
            ("float32", "ieee"),
            ("float64", "ieee"),
        ]:
            aligned = Traits(getattr(torch, dtype), precision, True, TARGETS[target])
            unaligned = aligned._replace(aligned=False)
            forwards = legal_configs("forward", aligned)
            weights = legal_configs("backward_weight", aligned)
            for config in forwards:
                found += [
                    Case(target, product, dtype, precision, config)
                    for product in ("output", "grad_input")
                ]
            found += [Case(target, "grad_weight", dtype, precision, config) for config in weights]
            found += [Case(target, "columns", dtype, precision, forwards[0])]
            found += [
                Case(target, "grad_weight_split", dtype, precision, config) for config in weights
            ]
            found += [Case(target, "output", dtype, precision, forwards[0], wide=True)]
            found += [Case(target, "grad_weight", dtype, precision, weights[0], wide=True)]
            for pair in legal_pairs(aligned):
                found += [
                    Case(target, product, dtype, precision, pair)
                    for product in ("backward", "backward_of_two")
                ]
            for pair in legal_pairs(unaligned):
                found += [Case(target, "backward", dtype, precision, pair, aligned=False)]
            found += _accumulating_cases(target, dtype, precision)
            for activation in LARGEST:
                given = {"activation": activation}
                largest = legal_configs("forward", aligned._replace(activation=True))[0]
                found += [Case(target, "output", dtype, precision, largest, **given)]
            found += [
                Case(target, "grad_preactivation", dtype, precision, None, activation=activation)
                for activation in ACTIVATIONS
                if precision == "ieee" and (dtype == "bfloat16" or activation in LARGEST)
            ]
            gated_forwards = legal_configs("gated_forward", aligned._replace(activation=True))
            for gated_config in gated_forwards:
                found += [
                    Case(target, "gated_output", dtype, precision, gated_config, activation="silu")
                ]
            for activation in ("gelu", "gelu_tanh"):
                given = {"activation": activation}
                found += [
                    Case(target, "gated_output", dtype, precision, gated_forwards[0], **given)
                ]
            found += [
                Case(target, "grad_products", dtype, precision, None, activation=activation)
                for activation in ACTIVATIONS
                if precision == "ieee" and (dtype == "bfloat16" or activation in LARGEST)
            ]
            for config in legal_configs("gated_forward", unaligned._replace(activation=True)):
                given = {"aligned": False, "activation": "silu"}
                found += [Case(target, "gated_output", dtype, precision, config, **given)]
            found += [Case(target, "output", dtype, precision, forwards[0], odd=True)]
            # The largest that has an activation where operands are not aligned, or outputs not.
            for product, kernel in (("output", "forward"), ("gated_output", "gated_forward")):
                largest = legal_configs(kernel, unaligned._replace(activation=True))[0]
                found += [
                    Case(target, product, dtype, precision, largest, activation="gelu", **given)
                    for given in ({"aligned": False}, {"odd": True})
                ]
            found += _split_k_cases(target, dtype, precision)
            for config in legal_configs("forward", unaligned):
                found += [Case(target, "output", dtype, precision, config, aligned=False)]
            for config in legal_configs("backward_weight", unaligned):
                found += [Case(target, "grad_weight", dtype, precision, config, aligned=False)]
        found += _far_cases(target)
        found += gemv_cases(target)
        # float16 differs from bfloat16 in the type of the instructions alone:
        # the largest tile stands for the rest.
        half = Traits(torch.float16, "ieee", True, TARGETS[target])
        for product, kernel in (("output", "forward"), ("grad_weight", "backward_weight")):
            largest = legal_configs(kernel, half)[0]
            found += [Case(target, product, "float16", "ieee", largest)]
        found += persistent_cases(target)
    return found


def _accumulating_cases(target: str, dtype: str, precision: str) -> list[Case]:
    """Every tile of grad_weight that is added to what is there.

    Of sums in slices, which are added in parts of a tile, the largest alone.
    """
    aligned = Traits(getattr(torch, dtype), precision, True, TARGETS[target])
    case = functools.partial(Case, target, dtype=dtype, precision=precision, accumulates=True)
    found = []
    for traits in (aligned, aligned._replace(aligned=False)):
        given = {"aligned": traits.aligned}
        weights, pairs = legal_configs("backward_weight", traits), legal_pairs(traits)
        found += [case("grad_weight", config=config, **given) for config in weights]
        found += [case("grad_weight_split", config=weights[0], **given)]
        found += [case("backward", config=pair, **given) for pair in pairs]
    return found


def _far_cases(target: str) -> list[Case]:
    """The largest that are legal with 64-bit offsets, where those leave few registers."""
    case = functools.partial(Case, target, wide=True)
    unaligned = Traits(torch.bfloat16, "ieee", False, TARGETS[target], wide=True)
    tf32 = unaligned._replace(dtype=torch.float32, precision="tf32")
    float32 = unaligned._replace(dtype=torch.float32)
    float64 = unaligned._replace(dtype=torch.float64)
    gated_pairs = legal_configs("gated_forward", unaligned._replace(aligned=True, activation=True))
    pieces = legal_pairs(float32._replace(precision="bf16x6"))
    pairs_of_two = legal_pairs(tf32._replace(second_product=True))
    half, rounded, exact, double = (
        legal_configs("forward", traits)[0] for traits in (unaligned, tf32, float32, float64)
    )
    return [
        case("output", "bfloat16", "ieee", half, odd=True),
        case("output", "float32", "tf32", rounded, odd=True),
        case("grad_input", "float32", "ieee", exact, aligned=False),
        case("grad_input", "float64", "ieee", double, aligned=False),
        case("backward", "float32", "ieee", legal_pairs(float32)[0], aligned=False),
        case("backward", "float32", "bf16x6", pieces[0], aligned=False),
        case("backward_of_two", "float32", "tf32", pairs_of_two[0], aligned=False),
        case("gated_output", "bfloat16", "ieee", gated_pairs[0], activation="gelu"),
    ]


def persistent_cases(target: str) -> list[Case]:
    """Those of the kernels that load by descriptors."""
    traits = Traits(torch.bfloat16, "ieee", True, TARGETS[target], descriptors=True)
    shipped = legal_configs("forward", traits, "persistent")
    if not shipped:
        return []
    case = functools.partial(Case, target, dtype="bfloat16", precision="ieee")
    found = [case("output", config=shipped[0], wide=True)]
    for config in shipped:
        found += [case(product, config=config) for product in FORWARD_LAYOUTS]
        found += [case("output", config=config, aligned=False)]
    found += [
        case("output", config=config, activation="gelu")
        for config in legal_configs("forward", traits._replace(activation=True), "persistent")
    ]
    far = legal_configs("forward", traits._replace(aligned=False, wide=True), "persistent")
    found += [case("output", config=far[0], aligned=False, wide=True)]
    return found


def gemv_cases(target: str) -> list[Case]:
    """Every shipped configuration of a few rows, for the layout of weight that it is for.

    TF32 is not told from float32. Those of most rows, which take most registers, are also
    unaligned and have an activation.
    """
    found = []
    for dtype in ("bfloat16", "float32", "float64"):
        traits = Traits(getattr(torch, dtype), "ieee", True, TARGETS[target])
        for config in legal_configs("forward", traits, "gemv"):
            product = "grad_input" if config.reads_outputs else "output"
            found += [Case(target, product, dtype, "ieee", config)]
            if config.block_m == 4:
                worst = {"aligned": False, "activation": "gelu"}
                found += [Case(target, product, dtype, "ieee", config, **worst)]
                if dtype == "bfloat16":
                    found += [Case(target, product, dtype, "ieee", config, wide=True)]
    return found


def _split_k_cases(target: str, dtype: str, precision: str) -> list[Case]:
    """Every tile with K split, the largest in all other ways that it may be called."""
    traits = Traits(getattr(torch, dtype), precision, True, TARGETS[target])
    aligned, unaligned = (
        [
            dataclasses.replace(config, splits=4)
            for config in legal_configs("forward", traits._replace(aligned=one), "split_k")
        ]
        for one in (True, False)
    )
    if not aligned:
        return []  # pieces, which this kind forms no products of
    arguments = (target, "output", dtype, precision)
    found = [Case(*arguments, config) for config in aligned]
    found += [Case(*arguments, aligned[0], odd=True)]
    if precision == "tf32":
        return [*found, Case(target, "grad_input", dtype, precision, unaligned[0], aligned=False)]
    largest = aligned[0]
    found += [
        Case(target, "grad_input", dtype, precision, largest),
        Case(*arguments, dataclasses.replace(largest, splits=1)),
        Case(*arguments, unaligned[0], aligned=False),
    ]
    if dtype != "float64":
        largest = legal_configs("forward", traits._replace(activation=True), "split_k")[0]
        activated = dataclasses.replace(largest, splits=4)
        found += [Case(*arguments, activated, activation="gelu")]
    return found


def compile_case(case: Case) -> Any:
    """Compiles as Triton's own launcher would for these arguments.

    Returns Triton's CompiledKernel.
    """
    dtype = getattr(torch, case.dtype)
    accumulator = "*fp64" if dtype == torch.float64 else "*fp32"
    constants: dict[str, Any] = {
        "HAS_BIAS": True,
        "ACTIVATION": case.activation,
        "SAVE_PREACTIVATION": case.activation is not None,
        "OFFSET_DTYPE": tl.int64 if case.wide else tl.int32,
    }
    if case.activation is None:
        constants["preactivation_ptr"] = None
    pointers: dict[str, str] = {}
    if case.product in ("grad_preactivation", "grad_products"):
        kernel = (
            activation_pass.activation_backward_kernel
            if case.product == "grad_preactivation"
            else gated_backward.gate_backward_kernel
        )
        constants |= {
            "ACC_DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
            "FROM_OUTPUT": case.activation in FROM_OUTPUT,
            "NESTED_GRAD_OUTPUT": False,
            "stride_gn": 1,
            "BLOCK_M": 1024 // activation_pass.ACTIVATION_BLOCK,
            "BLOCK_N": activation_pass.ACTIVATION_BLOCK,
        }
        options = {}
    else:
        constants |= {
            "ACC_DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
            "INPUT_PRECISION": case.precision,
            "UPCAST": False,
            "SUM_STEPS_APART": launch.sum_steps_apart(dtype, case.precision),
            "SUM_BY_DOT": dtype.itemsize == 2,
            "NESTED_GRAD_OUTPUT": False,
            "NESTED_INPUT": False,
        }
        for config, product in case.products():
            prefix = ""
            if isinstance(case.config, BackwardConfig):
                prefix = "INPUT_" if product == "forward" else "WEIGHT_"
            constants |= {
                f"{prefix}BLOCK_M": config.block_m,
                f"{prefix}BLOCK_N": config.block_n,
                f"{prefix}BLOCK_K": config.block_k,
                f"{prefix}GROUP": config.group,
            }
            options = config.compile_options(TARGETS[case.target])
        parts = {"partial_weight_ptr": accumulator, "partial_bias_ptr": accumulator}
        parts["counter_ptr"] = "*i32"
        if case.product.startswith(("grad_weight", "backward")):
            constants |= {"stride_gn": 1, "stride_ik": 1, "ACCUMULATE": case.accumulates}
            if case.product.startswith("grad_weight"):
                kernel = backward_weight.linear_backward_weight_kernel
                constants["SPLIT"] = case.product.endswith("split")
            else:
                # A launch that splits has all that another has, but for what it adds a tile to.
                kernel = grouped.linear_backward_kernel
                constants |= {"stride_wk": 1, "SPLIT": not case.accumulates}
                constants["SECOND_PRODUCT"] = case.product == "backward_of_two"
                if case.product == "backward":
                    constants["second_weight_ptr"] = None
            if constants["SPLIT"]:
                pointers |= parts
            else:
                constants |= dict.fromkeys(parts)
            if case.accumulates:
                pointers["grad_weight_ptr"] = accumulator
        elif case.product == "gated_output":
            kernel = gated.gated_linear_forward_kernel
            constants |= {
                "HAS_GATE_BIAS": True,
                "HAS_UP_BIAS": True,
                "SAVE_PRODUCTS": True,
                "stride_ik": 1,
                "stride_gk": 1,
                "stride_uk": 1,
            }
        else:
            config = case.config
            kernel = FORWARD_KERNELS[config.kind]
            constants |= dict.fromkeys(FORWARD_LAYOUTS[case.product], 1)
            split = config.splits > 1
            constants["SPLIT"] = split
            pointers = {"partial_ptr": accumulator, "counter_ptr": "*i32"}
            if not split:
                constants |= {"partial_ptr": None, "counter_ptr": None, "splits": 1}
            constants |= {
                "INPUT_TRANSPOSED": case.product == "columns",
                "WEIGHT_TRANSPOSED": case.product == "grad_input",
                "EPILOGUE_PARTS": config.epilogue_parts,
            }
            if case.product == "grad_input":
                constants |= {"HAS_BIAS": False, "bias_ptr": None}

    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name == "zero":
            signature[name] = "fp32"
            continue
        if name.endswith("_ptr"):
            signature[name] = pointers.get(name, POINTER[dtype])
        else:
            signature[name] = "i64" if case.wide and name.startswith("stride_") else "i32"
        if case.aligned and not (case.odd and name == "N"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": True, **options}  # as kernels are launched
    return triton.compile(source, target=GPU_TARGETS[case.target], options=options)
