"""The launches that are compiled without a GPU: `python -m benchmarks.resources` compiles them."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch

from benchmarks.shared.shapes import BATCH_SIZES, LAYERS, Layer
from benchmarks.without_gpu.case import LAYOUTS, Case, as_launched, call, launched
from fastlinear.kernels.configs.config import TARGETS, Traits
from fastlinear.kernels.configs.tiles import legal_configs, legal_pairs
from fastlinear.kernels.launching.operands import ACTIVATIONS

LARGEST = ("gelu", "gelu_tanh", "tanh")  # of activations: the others do less of the same


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
            for some in (
                _plain_cases,
                _accumulating_cases,
                _activation_cases,
                _gated_cases,
                _odd_cases,
                _split_k_cases,
                _unaligned_cases,
            ):
                found += some(target, dtype, precision)
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


def _traits(target: str, dtype: str, precision: str) -> Traits:
    """Of operands that are aligned."""
    return Traits(getattr(torch, dtype), precision, True, TARGETS[target])


def _plain_cases(target: str, dtype: str, precision: str) -> list[Case]:
    """Every tile of each product, of a layer without an activation."""
    aligned = _traits(target, dtype, precision)
    case = functools.partial(Case, target, dtype=dtype, precision=precision)
    forwards = legal_configs("forward", aligned)
    weights = legal_configs("backward_weight", aligned)
    pairs, unaligned_pairs = legal_pairs(aligned), legal_pairs(aligned._replace(aligned=False))
    products = ("output", "grad_input")
    both = ("backward", "backward_of_two")
    return [
        *(case(product, config=config) for config in forwards for product in products),
        *(case("grad_weight", config=config) for config in weights),
        case("columns", config=forwards[0]),
        *(case("grad_weight_split", config=config) for config in weights),
        case("output", config=forwards[0], wide=True),
        case("grad_weight", config=weights[0], wide=True),
        *(case(product, config=pair) for pair in pairs for product in both),
        *(case("backward", config=pair, aligned=False) for pair in unaligned_pairs),
    ]


def _by_element(product: str, target: str, dtype: str, precision: str) -> list[Case]:
    """A pass over elements, where the dtype makes a difference: in bfloat16 for each activation."""
    return [
        Case(target, product, dtype, precision, None, activation=activation)
        for activation in ACTIVATIONS
        if precision == "ieee" and (dtype == "bfloat16" or activation in LARGEST)
    ]


def _activation_cases(target: str, dtype: str, precision: str) -> list[Case]:
    """The largest tile with an activation, and the activation's gradient."""
    traits = _traits(target, dtype, precision)._replace(activation=True)
    largest = legal_configs("forward", traits)[0]
    found = [
        Case(target, "output", dtype, precision, largest, activation=activation)
        for activation in LARGEST
    ]
    return found + _by_element("grad_preactivation", target, dtype, precision)


def _gated_cases(target: str, dtype: str, precision: str) -> list[Case]:
    """Every tile of a gated pair, aligned and not, and the gate's gradient."""
    aligned = _traits(target, dtype, precision)._replace(activation=True)
    case = functools.partial(Case, target, "gated_output", dtype, precision)
    configs = legal_configs("gated_forward", aligned)
    unaligned = legal_configs("gated_forward", aligned._replace(aligned=False))
    return [
        *(case(config, activation="silu") for config in configs),
        *(case(configs[0], activation=activation) for activation in ("gelu", "gelu_tanh")),
        *_by_element("grad_products", target, dtype, precision),
        *(case(config, aligned=False, activation="silu") for config in unaligned),
    ]


def _odd_cases(target: str, dtype: str, precision: str) -> list[Case]:
    """Outputs that are not aligned, and the largest with an activation there, or of operands."""
    aligned = _traits(target, dtype, precision)
    unaligned = aligned._replace(aligned=False, activation=True)
    found = [
        Case(target, "output", dtype, precision, legal_configs("forward", aligned)[0], odd=True)
    ]
    for product, kernel in (("output", "forward"), ("gated_output", "gated_forward")):
        largest = legal_configs(kernel, unaligned)[0]
        found += [
            Case(target, product, dtype, precision, largest, activation="gelu", **given)
            for given in ({"aligned": False}, {"odd": True})
        ]
    return found


def _unaligned_cases(target: str, dtype: str, precision: str) -> list[Case]:
    """Every tile of output and grad_weight whose operands are not aligned."""
    unaligned = _traits(target, dtype, precision)._replace(aligned=False)
    return [
        Case(target, product, dtype, precision, config, aligned=False)
        for product, kernel in (("output", "forward"), ("grad_weight", "backward_weight"))
        for config in legal_configs(kernel, unaligned)
    ]


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
        found += [case(product, config=config) for product in ("output", "grad_input", "columns")]
    found += [
        case("output", config=config, activation="gelu")
        for config in legal_configs("forward", traits._replace(activation=True), "persistent")
    ]
    found += [
        case("output", config=config, aligned=False)
        for config in legal_configs("forward", traits._replace(aligned=False), "persistent")
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


# What `chosen` asks for: dtype and precision of each arithmetic, as users set them.
ARITHMETICS = (
    ("bfloat16", "ieee"),
    ("float32", "ieee"),
    ("float32", "long bf16x6"),
    ("float16", "ieee"),
    ("float32", "tf32"),
    ("float64", "ieee"),
)
ROWS = tuple(rows for rows in BATCH_SIZES if rows <= 16384)
# The first has every layer at every number of rows. These layers have all of them, and operands
# that lie in every way, at some numbers of rows.
SAMPLED, SOME_ROWS = ("mnist-1", "bert-base-up"), (1, 64, 4096)


def chosen(targets: list[str]) -> list[Case]:
    """What is launched for the layers of shapes.py at ROWS, each specialisation once.

    The configuration is the planners' choice.
    """
    found: dict[object, Case] = {}
    for target, (dtype, precision), layer in itertools.product(
        targets, ARITHMETICS, LAYERS.values()
    ):
        every = (dtype, precision) == ARITHMETICS[0]
        if not every and layer.name not in SAMPLED:
            continue
        for layout, rows in itertools.product(LAYOUTS, ROWS):
            if layout and not (every and layer.name in SAMPLED and rows in SOME_ROWS):
                continue
            sizes = (rows, layer.out_features, layer.in_features)
            case = Case(target, "", dtype, precision, None, sizes=sizes, layout=layout)
            for one in _calls(dataclasses.replace(case, bias=layer.bias), layer):
                launches = launched(target, functools.partial(call, one))
                if len(launches) == 1:  # else both gradients take a launch each
                    key = (target, launches[0].specialization(target))
                    found.setdefault(key, as_launched(one, launches[0]))
    return list(found.values())


def _calls(case: Case, layer: Layer) -> Iterator[Case]:
    """A layer's forward and backward: plain, with its activation, and gated."""
    of = functools.partial(dataclasses.replace, case)
    yield from (of(product=one) for one in ("output", "grad_input", "grad_weight", "backward"))
    if layer.activation is None:
        return
    of = functools.partial(of, activation=layer.activation)
    yield of(product="output")
    yield of(product="output", saves=False)
    yield of(product="grad_preactivation")
    if layer.activation == "silu":
        yield of(product="gated_output")
        yield of(product="gated_output", saves=False)
        yield of(product="grad_products")
        yield of(product="backward_of_two", activation=None)
