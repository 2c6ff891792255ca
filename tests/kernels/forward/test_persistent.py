"""The kernel that loads tiles by descriptors: values, layouts, legality, launches."""

import contextvars
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from oracle import assert_as_exact, exact_forward, fenced, native_forward, normal
from torch import Tensor
from triton.runtime import _allocation

from fastlinear.kernels.configs.config import TARGETS, Config, Kernel, Traits
from fastlinear.kernels.configs.legality import why_illegal
from fastlinear.kernels.configs.tiles import legal_configs
from fastlinear.kernels.forward.linear import (
    linear_activation_forward,
    linear_forward,
    plan_forward,
)
from fastlinear.kernels.language.arguments import Matrix
from fastlinear.kernels.launching import compiled_launch, launch
from fastlinear.ops.elementwise import ACTIVATIONS

# (M, N, K): interpreted blocks are 32 x 32 x 32, and there are 8 programs.
SHAPES = {
    "one block": (32, 32, 32),
    "one less than a block": (31, 31, 31),
    "several blocks, none whole": (70, 50, 77),
    "one datapoint": (1, 40, 64),
    "one output feature": (45, 1, 40),
    "one input feature": (45, 40, 1),
    "several tiles a program, groups of unequal size": (260, 40, 40),
    "long sums": (8, 12, 700),
}


def configs(device: torch.device, activation: bool = False) -> list[Config]:
    """Every one for the device; the interpreter has one."""
    target = launch.target_of(device)
    traits = Traits(torch.bfloat16, "ieee", True, target, activation, descriptors=True)
    found = list(legal_configs("forward", traits, "persistent"))
    if not found:
        pytest.skip("this GPU loads nothing by descriptors")
    return found


def matrix(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, transposed: bool = False
) -> Tensor:
    """Normal random numbers, in rows (or columns) 16 bytes or more apart with NaN between them."""
    if transposed:
        return matrix(columns, rows, dtype, device).t()
    padded = normal((rows, -(columns + 1) // 8 * -8), dtype, device)
    return fenced(padded[:, :columns])


@pytest.mark.parametrize("weight_transposed", [False, True], ids=["weight", "weight.t()"])
@pytest.mark.parametrize("input_transposed", [False, True], ids=["input", "input.t()"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_persistent_matches_float64(
    shape: tuple[int, int, int],
    input_transposed: bool,
    weight_transposed: bool,
    device: torch.device,
) -> None:
    m, n, k = shape
    input = matrix(m, k, torch.bfloat16, device, input_transposed)
    weight = matrix(n, k, torch.bfloat16, device, weight_transposed)
    bias = normal((2 * n,), torch.bfloat16, device)[::2]
    native, exact = native_forward(input, weight, bias), exact_forward(input, weight, bias)
    for config in configs(device):
        output = linear_forward(input, weight, bias, config=config)
        assert output.is_contiguous()
        assert_as_exact(output, native, exact, str(config))


@pytest.mark.parametrize("change", [{"epilogue_parts": 1}, {"epilogue_parts": 2}, {}], ids=str)
def test_persistent_stores_a_tile_in_parts(change: dict[str, int], device: torch.device) -> None:
    """And in float16; without an activation parts are of no use, and still are to be right."""
    input, weight = matrix(70, 40, torch.float16, device), matrix(50, 40, torch.float16, device)
    bias = normal((50,), torch.float16, device)
    config = dataclasses.replace(configs(device)[-1 if change else 0], **change)
    output = linear_forward(input, weight, bias, config=config)
    native, exact = native_forward(input, weight, bias), exact_forward(input, weight, bias)
    assert_as_exact(output, native, exact)


def test_persistent_without_bias_with_leading_dimensions(device: torch.device) -> None:
    input = normal((2, 5, 7, 40), torch.bfloat16, device)
    weight = normal((33, 40), torch.bfloat16, device)
    native, exact = native_forward(input, weight, None), exact_forward(input, weight, None)
    for config in configs(device):
        assert_as_exact(linear_forward(input, weight, config=config), native, exact, str(config))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_persistent_applies_an_activation(activation: str, device: torch.device) -> None:
    input, weight = matrix(40, 40, torch.float16, device), matrix(50, 40, torch.float16, device)
    bias = normal((50,), torch.float16, device)
    native, exact = native_forward(input, weight, bias), exact_forward(input, weight, bias)
    for config in configs(device, activation=True):
        output, preactivation = linear_activation_forward(
            input, weight, bias, activation, True, config=config
        )
        assert preactivation is not None
        assert_as_exact(preactivation, native, exact, "pre-activation")
        applied = ACTIVATIONS[activation](exact)
        assert_as_exact(output, ACTIVATIONS[activation](native), applied, "output")


def test_persistent_adds_bias_before_rounding(device: torch.device) -> None:
    # 1 + 2**-9 rounds to 1 in bfloat16: were the product rounded first,
    # the bias of -1 would leave 0.
    input = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    input[0, :2] = torch.tensor([1 + 2**-7, 2**-9])
    weight = torch.ones(1, 8, dtype=torch.bfloat16, device=device)
    bias = torch.tensor([-1 - 2**-7], dtype=torch.bfloat16, device=device)
    for config in configs(device):
        assert linear_forward(input, weight, bias, config=config).item() == 2**-9


@pytest.mark.parametrize(
    ("rows", "columns", "strides", "expected"),
    [
        pytest.param(5, 24, (24, 1), False, id="rows"),
        pytest.param(5, 24, (1, 8), True, id="columns"),
        pytest.param(5, 7, (8, 1), False, id="rows of an odd size, apart"),
        pytest.param(5, 7, (7, 1), None, id="rows next to each other, of an odd size"),
        pytest.param(5, 24, (28, 1), None, id="every other row starts off 16 bytes"),
        pytest.param(5, 24, (48, 2), None, id="every other column"),
        pytest.param(5, 24, (0, 1), None, id="one row for all"),
        pytest.param(5, 24, (16, 1), None, id="rows that overlap"),
        pytest.param(0, 24, (24, 1), None, id="no rows"),
        pytest.param(5, 0, (8, 1), None, id="no columns"),
        pytest.param(1, 24, (24, 1), False, id="one row"),
        pytest.param(24, 1, (1, 24), True, id="one column"),
    ],
)
def test_descriptors_describe(
    rows: int, columns: int, strides: tuple[int, int], expected: bool | None
) -> None:
    matrix = Matrix(None, 0, *strides)
    assert launch.transposed_in_memory(rows, columns, matrix, itemsize=2) is expected


def test_operands_are_describable_or_not(device: torch.device) -> None:
    def describable(input: Tensor, weight: Tensor) -> bool:
        fields = launch.describe(input, weight)[:2]
        rows, described = (launch.Operand(*one) for one in fields)
        return launch.describable(launch.rows_of(rows, batched=weight.dim() == 3), described)

    x, w = (torch.empty(16, 24, dtype=torch.float16, device=device) for _ in range(2))
    assert describable(x, w)
    assert describable(x.view(2, 8, 24), w)
    assert describable(x[:, 8:], w[:, 8:])
    assert not describable(x[:, 1:-7], w[:, 8:]), "an address off 16 bytes"
    assert not describable(x[:, 8:], w[:, 1:-7]), "an address off 16 bytes"
    assert not describable(x, w.expand(3, 16, 24)), "a batch of layers"
    assert not describable(x.view(2, 8, 24).transpose(0, 1), w), "rows on two strides"
    assert not describable(x[:1].expand(16, 24), w)
    assert not describable(x, w[:1].expand(16, 24))


SM_90 = TARGETS["sm_90"]
LARGE = Config(128, 256, 64, 8, 4, kind="persistent", epilogue_parts=4)


@pytest.mark.parametrize(
    ("change", "given", "reason"),
    [
        ({}, {}, None),
        ({}, {"aligned": False}, None),  # what descriptors need is another question
        ({}, {"activation": True}, None),
        ({}, {"target": TARGETS["sm_100"]}, None),
        ({}, {"descriptors": False}, "descriptors cannot describe such operands"),
        ({}, {"dtype": torch.float32}, "torch.float32 is not of 16 bits"),
        ({}, {"target": TARGETS["sm_80"]}, "sm_80 loads nothing by descriptors"),
        ({}, {"target": TARGETS["gfx942"]}, "gfx942 loads nothing by descriptors"),
        ({"block_k": 48}, {}, "block_k=48 is not a power of two"),
        ({"epilogue_parts": 3}, {}, "epilogue_parts=3 is neither 1, 2 nor 4"),
        ({"epilogue_parts": 1}, {}, "a program needs 262656 bytes of shared memory"),
        ({"num_warps": 4}, {}, "accumulators take 256 registers a thread, more than the 128"),
        (
            {"epilogue_parts": 2},
            {"activation": True},
            "accumulators take 128 registers a thread, more than the 64",
        ),
        ({"epilogue_parts": 2}, {"aligned": False}, None),
        ({"epilogue_parts": 2}, {"wide": True}, None),
        (
            {"epilogue_parts": 2},
            {"aligned": False, "wide": True},
            "accumulators take 128 registers a thread, more than the 64",
        ),
        (
            {},
            {"aligned": False, "wide": True, "activation": True},
            "accumulators take 128 registers a thread, more than the 64",
        ),
    ],
)
def test_predicate_says_why_of_persistent(
    change: dict[str, Any], given: dict[str, Any], reason: str | None
) -> None:
    traits = Traits(torch.bfloat16, "ieee", True, SM_90, descriptors=True)
    said = why_illegal("forward", dataclasses.replace(LARGE, **change), traits._replace(**given))
    assert said is None if reason is None else reason in str(said)


@pytest.mark.parametrize("kernel", ["backward_weight", "gated_forward"])
def test_persistent_is_for_forward_products(kernel: Kernel) -> None:
    traits = Traits(torch.bfloat16, "ieee", True, SM_90, descriptors=True)
    assert f"computes a forward product, no {kernel}" in str(why_illegal(kernel, LARGE, traits))


@pytest.mark.parametrize(("m", "programs"), [(1, 2), (100, 8), (300, 8)])
def test_persistent_programs_are_no_more_than_tiles(m: int, programs: int) -> None:
    def fields(*shape: int) -> launch.Fields:
        return shape, (shape[1], 1), torch.bfloat16, torch.device("cpu"), True

    config = Config(32, 32, 32, 1, 1, kind="persistent")
    if not launch.INTERPRETING:
        pytest.skip("the interpreter has 8 multiprocessors, a GPU has its own")
    plan = plan_forward((fields(m, 40), fields(64, 40), None), "ieee", None, False, config)
    assert plan.launch.launch.grid == (programs,)


def test_persistent_offsets_are_wide_where_the_output_is(device: torch.device) -> None:
    config = configs(device)[0]

    def wide(*shape: int) -> bool:
        def fields(*shape: int) -> launch.Fields:
            return shape, (shape[1], 1), torch.bfloat16, device, True

        m, n = shape
        plan = plan_forward((fields(m, 8), fields(n, 8), None), "ieee", None, False, config)
        return bool(plan.launch.launch.constants["OPTIONS"].wide)

    assert not wide(2**16, 2**15)
    assert wide(2**16, 2**15 + 8)


@pytest.mark.parametrize("direct", [False, True], ids=["by Triton", "direct"])
def test_launch_lends_memory_and_leaves_a_users_allocator_be(
    direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton asks the allocator of the context, which is another one in each thread."""
    asked: list[Any] = []

    def start(*arguments: Any, **options: Any) -> Any:
        asked.append(_allocation._allocator.get())
        return SimpleNamespace(run=start, function=None, packed_metadata=None)

    class Kernel:
        arg_names = ("input_ptr",)

        def __getitem__(self, grid: tuple[int]) -> Any:
            return start

    def launch_all() -> None:
        triton.set_allocator(mine)
        kernel = Kernel()
        for describes in (True, False):
            launched = launch.Launch((1,), (), {}, describes=describes)
            for _ in range(2):  # the second is direct, if any is
                launch.run(kernel, launched, (torch.empty(1),))
            assert bool(launched.compiled) == direct

    def mine(size: int, alignment: int, stream: int | None) -> Any:
        raise AssertionError("nothing is launched")

    driver = SimpleNamespace(get_current_stream=lambda device: 0)
    monkeypatch.setattr(compiled_launch, "DIRECT", direct)
    monkeypatch.setattr(compiled_launch, "watched", lambda kernel: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    contextvars.Context().run(launch_all)
    assert asked == [compiled_launch._memory] * 2 + [mine] * 2
