"""float32 products of bfloat16 pieces: their error, special values, and who takes them.

The interpreter's products are exact and their sums rounded to nearest; test_accuracy.py has how
tensor cores cut them off.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import exact_backward, exact_forward, matmul, normal
from torch import Tensor

import fastlinear
from fastlinear import _torch_internals as internals
from fastlinear.choice import backend
from fastlinear.kernels.backward.elementwise import elementwise_backward_kernel
from fastlinear.kernels.backward.grad_weight import linear_backward_weight, plan_backward_weight
from fastlinear.kernels.backward.linear import linear_backward, linear_backward_input, plan_backward
from fastlinear.kernels.configs import config as configs
from fastlinear.kernels.configs.choose_pair import choose_pair
from fastlinear.kernels.configs.config import LONG_SUM, TARGETS, resolved_precision
from fastlinear.kernels.forward.gated import gated_linear_forward, plan_gated_forward
from fastlinear.kernels.forward.linear import linear_forward, plan_forward
from fastlinear.kernels.launching import launch

INFINITY, NAN = float("inf"), float("nan")
ROUNDING = 2.0**-24  # the largest error of one operation, of its result
# Of an element's error, in roundings of its terms' sizes: what is left out, and a few roundings.
BUDGET = 4


def check(result: Tensor, a: Tensor, b: Tensor, exact: Tensor) -> None:
    """Fails unless each element of `result`, a sum over products of a and b, is near `exact`."""
    budget = BUDGET * ROUNDING * matmul(a.abs(), b.abs())
    assert ((result.double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_pieces_are_for_long_sums_of_many_rows_on_nvidia(target: launch.Target) -> None:
    asked, expected = "long bf16x6", "ieee" if target.family == "gfx942" else "bf16x6"
    assert resolved_precision(asked, torch.float32, 65, LONG_SUM, target) == expected
    assert resolved_precision(asked, torch.float32, None, LONG_SUM, target) == expected
    assert resolved_precision(asked, torch.float32, 64, LONG_SUM, target) == "ieee"
    assert resolved_precision(asked, torch.float32, 65, LONG_SUM - 1, target) == "ieee"
    for precision in ("ieee", "tf32", "bf16x6"):
        assert resolved_precision(precision, torch.float32, 65, LONG_SUM, target) == precision


def test_plans_take_pieces_by_the_length_of_their_sums(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(launch, "target_of", lambda device: TARGETS["sm_90"])
    asked = "long bf16x6"

    def fields(*shape: int, dtype: torch.dtype = torch.float32) -> launch.Operand:
        described = launch.Operand(shape, shape, dtype, device, True)
        return described.contiguous(*shape)

    def forward(
        rows: int, k: int, batch_invariant: bool = False, dtype: torch.dtype = torch.float32
    ) -> str:
        operands = fields(rows, k, dtype=dtype), fields(48, k, dtype=dtype), None
        plan = plan_forward.__wrapped__(operands, asked, None, False, None, batch_invariant)
        return str(plan.launch.launch.constants["OPTIONS"].precision)

    def gated(rows: int, k: int, batch_invariant: bool = False) -> str:
        operands = fields(rows, k), fields(48, k), fields(48, k), None, None
        given = (asked, "silu", False, None, batch_invariant)
        plan = plan_gated_forward.__wrapped__(operands, *given)
        return str(plan.kernel.constants["OPTIONS"].precision)

    def grad_weight(rows: int, dtype: torch.dtype = torch.float32) -> tuple[str, int]:
        operands = fields(rows, 96, dtype=dtype), fields(rows, 48, dtype=dtype), None
        plan = plan_backward_weight.__wrapped__(operands, False, False, asked, None, None)
        return str(plan.launch.launch.constants["OPTIONS"].precision), plan.splits

    assert (forward(96, LONG_SUM - 1), forward(96, LONG_SUM)) == ("ieee", "bf16x6")
    assert forward(64, LONG_SUM) == "ieee"
    assert (gated(96, LONG_SUM - 1), gated(96, LONG_SUM)) == ("ieee", "bf16x6")
    for product in (forward, gated):  # a row alone gets what it gets among others
        assert product(1, LONG_SUM, batch_invariant=True) == "bf16x6"
        assert product(96, LONG_SUM - 1, batch_invariant=True) == "ieee"
    assert grad_weight(LONG_SUM - 1)[0] == "ieee"
    assert grad_weight(3 * LONG_SUM + 5) == ("bf16x6", 3), "a part's sum is long too"
    assert forward(96, LONG_SUM, dtype=torch.bfloat16) == "ieee"
    assert grad_weight(LONG_SUM, torch.bfloat16)[0] == "ieee"
    assert grad_weight(3 * LONG_SUM + 5, torch.float64)[1] > 3, "other dtypes have no pieces"


def test_one_launch_for_all_gradients_forms_them_in_one_way(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(launch, "target_of", lambda device: TARGETS["sm_90"])
    one_launch = "fastlinear.kernels.backward.linear.choose_backward"  # wherever it may be
    monkeypatch.setattr(one_launch, lambda *given: choose_pair(*given))

    def backward(
        rows: int,
        outputs: int,
        two: bool = False,
        batch_invariant: bool = False,
        only_input: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> str | None:
        one = launch.Operand((1,), (1,), dtype, device, True)
        weight = one.contiguous(outputs, 96)
        input = None if only_input else one.contiguous(rows, 96)
        operands = one.contiguous(rows, (1 + two) * outputs), weight, input
        given = (True, False, "long bf16x6", None, None, batch_invariant)
        plan = plan_backward.__wrapped__(operands, weight if two else None, *given)
        formed = str(plan.launch.launch.constants["OPTIONS"].precision)
        return None if plan.config is None else formed

    assert backward(LONG_SUM, LONG_SUM) == "bf16x6"
    assert backward(LONG_SUM - 1, LONG_SUM - 1) == "ieee"
    assert backward(96, LONG_SUM) is backward(LONG_SUM, 96) is None, "a launch for each"
    assert backward(96, LONG_SUM, dtype=torch.bfloat16) == "ieee", "which has no choice"
    # Of two layers one launch computes the sum, in any case.
    assert backward(LONG_SUM, LONG_SUM // 2, two=True) == "bf16x6", "a sum over both"
    assert backward(LONG_SUM, LONG_SUM, two=True) == "bf16x6"
    assert backward(96, LONG_SUM, two=True) == backward(LONG_SUM, 96, two=True) == "ieee"
    assert backward(96, LONG_SUM, two=True, only_input=True) == "bf16x6"
    for rows in (1, 96, LONG_SUM):  # a row's grad_input is the same in all of them
        for only_input in (False, True):
            assert backward(rows, LONG_SUM, True, True, only_input) == "ieee"


def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the products are formed that are launched from here on."""
    found: list[str] = []
    run = launch.run

    def spy(kernel: object, plan: launch.Launch, pointers: tuple[Tensor | None, ...]) -> None:
        if kernel is not elementwise_backward_kernel:
            found.append(plan.constants["OPTIONS"].precision)
        run(kernel, plan, pointers)

    monkeypatch.setattr(launch, "run", spy)
    return found


NUMBER = 2.0**-126 + 2.0**-149  # whose last bit is below those of bfloat16, and in no piece


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of 32 terms count as long, and 17 rows as many: the interpreter is slow."""
    monkeypatch.setattr(configs, "LONG_SUM", 32)
    monkeypatch.setattr(configs, "FEW_ROWS", 16)


# (rows, inputs, outputs): what has a long sum over inputs, over rows, and over outputs.
LONG = {"output": (17, 32, 3), "grad_weight": (32, 3, 17), "grad_input": (17, 3, 32)}


@pytest.mark.usefixtures("triton_backend", "small")
@pytest.mark.parametrize("product", LONG)
def test_a_layer_takes_pieces_within_use_float32_products(
    product: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    rows, inputs, outputs = LONG[product]
    layer = fastlinear.Linear(inputs, outputs, device=device)
    input = normal((rows, inputs), torch.float32, device).requires_grad_()
    launched = taken(monkeypatch)
    with fastlinear.use_float32_products("bf16x6"):
        layer(input).backward(normal((rows, outputs), torch.float32, device))
    if product == "output":
        assert launched == ["bf16x6", "ieee"], "one launch for both gradients"
    else:
        assert launched[0] == "ieee"
        assert sorted(launched[1:]) == ["bf16x6", "ieee"]


@pytest.mark.usefixtures("triton_backend", "small")
def test_pieces_are_opted_in_to(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    layer, gated = (
        kind(32, 3, device=device) for kind in (fastlinear.Linear, fastlinear.GatedLinear)
    )
    input = normal((17, 32), torch.float32, device)
    launched = taken(monkeypatch)
    with torch.no_grad():
        layer(input), gated(input)
        with fastlinear.use_float32_products("bf16x6"):
            layer(input), gated(input), gated(input[:16])
        assert launched == ["ieee", "ieee", "bf16x6", "bf16x6", "ieee"]
        torch.set_float32_matmul_precision("high")
        with fastlinear.use_float32_products("bf16x6"):
            layer(input)
    assert launched[-1] == "tf32", "pieces stand in for exact float32 alone"


@pytest.mark.usefixtures("triton_backend", "small")
def test_a_call_like_one_outside_takes_pieces_within(device: torch.device) -> None:
    """Plans and shortcuts of the other products are not taken over."""
    number = torch.zeros(17, 32, device=device)
    number[:, 0] = NUMBER
    ones = torch.ones(3, 32, device=device)
    with torch.no_grad():
        for _ in range(3):
            assert (fastlinear.linear(number, ones) == NUMBER).all()
            with fastlinear.use_float32_products("bf16x6"):
                inside = fastlinear.linear(number, ones)
                assert (inside != NUMBER).all()
                torch.testing.assert_close(inside, number[:, :3] * 0 + NUMBER, rtol=1e-6, atol=0)


def test_use_float32_products_nests_and_restores() -> None:
    again = fastlinear.use_float32_products("bf16x6")
    assert backend.float32_precision() == "ieee"
    with again, again, fastlinear.batch_invariant():
        inner = backend.settings()
        assert backend.float32_precision() == "long bf16x6"
        with fastlinear.use_float32_products("ieee"):
            assert backend.float32_precision() == "ieee"
            assert backend.settings() != inner
            with again:
                assert backend.settings() == inner
            assert backend.float32_precision() == "ieee"
        assert backend.settings() == inner
    assert backend.float32_precision() == "ieee"
    assert backend.settings == internals.float32_matmul_precision
    with pytest.raises(ZeroDivisionError), again:
        raise ZeroDivisionError
    assert backend.float32_precision() == "ieee"


def test_use_float32_products_names_the_choices() -> None:
    with pytest.raises(ValueError, match="one of 'ieee', 'bf16x6', but is 'tf32x3'"):
        fastlinear.use_float32_products("tf32x3")


def test_use_float32_products_is_not_entered_within_a_compiled_function(
    device: torch.device,
) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def call(input: Tensor) -> Tensor:
        with fastlinear.use_float32_products("bf16x6"):
            return fastlinear.linear(input, input)

    with pytest.raises(Exception, match="enter it around the call"):
        call(normal((4, 4), torch.float32, device))


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 30, 1), (33, 31, 17), (20, 50, 100), (9, 5, 0)])
def test_pieces_in_forward_and_grad_input(
    shape: tuple[int, int, int], device: torch.device
) -> None:
    m, n, k = shape
    input, weight = normal((m, k), torch.float32, device), normal((n, k), torch.float32, device)
    output = linear_forward(input, weight, precision="bf16x6")
    check(output, input, weight.mT, exact_forward(input, weight, None))
    # grad_output @ weight.mT: the same numbers, with an operand that lies the other way.
    grad_input = linear_backward_input(input, weight.mT.contiguous(), precision="bf16x6")
    assert torch.equal(grad_input, output)


def test_pieces_in_grad_weight(device: torch.device) -> None:
    grad_output, input = (normal((150, size), torch.float32, device) for size in (40, 33))
    _, exact, exact_bias = exact_backward(grad_output, input, input.new_zeros(40, 33))
    for splits in (1, 3):
        grad_weight, grad_bias = linear_backward_weight(
            grad_output, input, True, precision="bf16x6", splits=splits
        )
        assert grad_bias is not None
        check(grad_weight, grad_output.mT, input, exact)
        torch.testing.assert_close(grad_bias, exact_bias.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
def test_pieces_in_one_launch_for_all_gradients(
    splits: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    grad_output, input = (normal((40, size), torch.float32, device) for size in (68, 20))
    weights = [normal((34, 20), torch.float32, device) for _ in range(2)]
    both = torch.cat(weights)
    expected = exact_backward(grad_output, input, both)
    given = {"precision": "bf16x6", "splits": splits}
    launched = taken(monkeypatch)
    for weight, second in ((both, None), weights):
        grad_input, grad_weight, _ = linear_backward(
            grad_output, input, weight, True, second_weight=second, **given
        )
        assert grad_input is not None
        assert grad_weight is not None
        check(grad_input, grad_output, both, expected[0])
        check(grad_weight, grad_output.mT, input, expected[1])
    assert launched == ["bf16x6"] * 2


def test_pieces_in_a_gated_pair(device: torch.device) -> None:
    input = normal((20, 50), torch.float32, device)
    weights = [normal((40, 50), torch.float32, device) for _ in range(2)]
    output, *products = gated_linear_forward(
        input, *weights, None, None, "silu", True, precision="bf16x6"
    )
    for product, weight in zip(products, weights, strict=True):
        assert product is not None
        check(product, input, weight.mT, exact_forward(input, weight, None))
    gate, up = products
    torch.testing.assert_close(output, F.silu(gate) * up)


def test_three_pieces_are_the_whole_number(device: torch.device) -> None:
    """A product with 1 is exact, from either side, between 2**-110 and the largest numbers."""
    exponents = torch.randint(-110, 128, (500, 1), device=device)
    numbers = torch.ldexp(1 + torch.rand(500, 1, device=device), exponents)
    numbers = torch.cat([numbers, -numbers]).clamp(-3.39e38, 3.39e38)
    one = torch.ones(1, 1, device=device)
    assert torch.equal(linear_forward(numbers, one, precision="bf16x6"), numbers)
    assert torch.equal(linear_forward(one, numbers, precision="bf16x6"), numbers.T)


def test_six_products_of_pieces_are_enough_the_smallest_first(device: torch.device) -> None:
    input, weight = (1 + torch.rand(200, 1, device=device) / 64 for _ in range(2))
    product = linear_forward(input, weight, precision="bf16x6")
    error = (product.double() / matmul(input, weight.mT) - 1).abs().max().item()
    # 1 of what is left out, 1 of the last addition's rounding, and little of those before it.
    assert error <= 2.1 * ROUNDING


def test_additions_to_the_total_lose_nothing(device: torch.device) -> None:
    input = torch.zeros(1, 16 * 65, device=device)
    input[0, 16::16] = 2.0**-25  # 64 of them, each too small beside 1
    input[0, 0] = 1
    output = linear_forward(input, torch.ones_like(input), precision="bf16x6")
    assert output.item() == 1 + 2.0**-19


SPECIAL = [0.0, -0.0, 1.0, -1.5, 1e-30, -1e20, INFINITY, -INFINITY, NAN]


# Infinity times the zeros that pad a tile is a NaN in columns that are not stored.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_pieces_pass_nan_and_infinity_on(device: torch.device) -> None:
    numbers = torch.tensor(SPECIAL, device=device)
    numbers = torch.cat(
        [numbers, torch.tensor([0x7FFFFFFF, 0x7F800001, -1]).int().view(torch.float32)]
    )
    product = linear_forward(numbers[:, None], numbers[:, None], precision="bf16x6")
    torch.testing.assert_close(product, numbers[:, None] * numbers, equal_nan=True)
    # In sums of several steps, infinity stays, and only infinities of both signs are NaN.
    pairs = list(itertools.product(SPECIAL, repeat=2))
    input = torch.zeros(len(pairs), 40, device=device)
    input[:, [3, 30]] = torch.tensor(pairs, device=device)
    total = linear_forward(input, torch.ones(1, 40, device=device), precision="bf16x6")
    torch.testing.assert_close(total[:, 0], input[:, 3] + input[:, 30], equal_nan=True)


def test_pieces_of_the_largest_numbers_are_finite(device: torch.device) -> None:
    largest = torch.finfo(torch.float32).max
    numbers = torch.tensor([[largest], [-largest], [3.397e38]], device=device)
    half = torch.full((1, 1), 0.5, device=device)
    product = linear_forward(numbers, half, precision="bf16x6")
    torch.testing.assert_close(product, 0.5 * numbers, rtol=2.0**-7, atol=0.0)


def test_pieces_of_the_smallest_numbers_lose_little(device: torch.device) -> None:
    numbers = torch.tensor([[1e-38], [-3e-39], [2e-40], [1e-36]], device=device)
    product = linear_forward(numbers, torch.ones(1, 1, device=device), precision="bf16x6")
    torch.testing.assert_close(product, numbers, rtol=2.0**-21, atol=2.0**-131)
