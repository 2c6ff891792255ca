"""Numbers that are none, too large, too small or zero, and memory that is no operand's.

Each kind of forward kernel, backward, and gated pairs. How near other numbers come to float64, the
tests of the kernels say.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import guards
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from oracle import smallest_config
from torch import Tensor

import fastlinear
from fastlinear.kernels.backward.gated import gated_linear_backward
from fastlinear.kernels.backward.grad_weight import linear_backward_weight
from fastlinear.kernels.backward.linear import linear_backward
from fastlinear.kernels.configs.config import Config, Kind
from fastlinear.kernels.forward import linear as forward
from fastlinear.kernels.forward.gated import gated_linear_forward
from fastlinear.kernels.forward.linear import linear_forward
from fastlinear.kernels.launching import launch, shared_sums
from fastlinear.ops.elementwise import ACTIVATIONS

INFINITY, NAN = float("inf"), float("nan")

# What NaN and infinities come to is what is tested, and numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=forward.KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def dtype(kind: Kind) -> torch.dtype:
    """One that the kind takes."""
    return torch.float16 if kind == "persistent" else torch.float32


Linear = Callable[..., Tensor]


@pytest.fixture
def linear(kind: Kind) -> Linear:
    """`linear_forward` by a kernel of the kind, in blocks of 32 or so."""

    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        config = smallest_config(kind, input, weight, "ieee")
        return linear_forward(input, weight, bias, config=config)

    return call


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def with_values(tensor: Tensor, values: dict[tuple[int, ...], float]) -> Tensor:
    """`tensor` with these in place of its numbers there."""
    for index, value in values.items():
        tensor[index] = value
    return tensor


def assert_like(result: Tensor | None, expected: Tensor) -> None:
    """Fails unless NaN and infinities are where they are in `expected`, which is float64."""
    assert result is not None
    assert not expected.isfinite().all(), "there is nothing to find"
    assert expected.isfinite().any(), "there is nowhere to leak to"
    torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=1e-1, equal_nan=True)


# NaN and infinity: of the rows, columns and sums that they are in, and of no other.

OPERANDS = {
    "input": {(3, 5): NAN, (20, 0): INFINITY, (32, 39): -INFINITY},
    "weight": {(0, 7): NAN, (31, 39): INFINITY, (34, 0): -INFINITY},
    "bias": {(2,): NAN, (33,): -INFINITY},
}


@pytest.mark.parametrize("operand", OPERANDS)
def test_nan_and_infinity_of_an_operand_are_where_torch_has_them(
    operand: str, linear: Linear, dtype: torch.dtype, device: torch.device
) -> None:
    shapes = {"input": (37, 40), "weight": (35, 40), "bias": (35,)}
    given = {name: normal(*size, dtype=dtype, device=device) for name, size in shapes.items()}
    with_values(given[operand], OPERANDS[operand])
    expected = F.linear(*(one.double() for one in given.values()))
    assert_like(linear(*given.values()), expected)


def test_infinities_of_both_signs_in_one_sum_are_nan(
    linear: Linear, dtype: torch.dtype, device: torch.device
) -> None:
    """Whether they meet in one step of a sum, in two, or in the parts of a split one."""
    input = torch.ones(3, 200, dtype=dtype, device=device)
    with_values(input, {(0, 0): INFINITY, (0, 1): -INFINITY})
    with_values(input, {(1, 0): INFINITY, (1, 199): -INFINITY})
    weight = torch.ones(5, 200, dtype=dtype, device=device)
    assert_like(linear(input, weight), F.linear(input.double(), weight.double()))


BACKWARD = {
    "grad_output": {(3, 5): NAN, (69, 0): INFINITY, (40, 34): -INFINITY},
    "input": {(0, 7): NAN, (69, 39): INFINITY, (33, 0): -INFINITY},
    "weight": {(2, 39): NAN, (34, 0): INFINITY},
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operand", BACKWARD)
def test_nan_and_infinity_in_backward_are_where_torch_has_them(
    operand: str, dtype: torch.dtype, splits: int, device: torch.device
) -> None:
    shapes = {"grad_output": (70, 35), "input": (70, 40), "weight": (35, 40)}
    given = {name: normal(*size, dtype=dtype, device=device) for name, size in shapes.items()}
    with_values(given[operand], BACKWARD[operand])
    grad_output, input, weight = (one.double() for one in given.values())
    expected = {
        "grad_input": grad_output @ weight,
        "grad_weight": grad_output.T @ input,
        "grad_bias": grad_output.sum(0),
    }
    together = linear_backward(*given.values(), True, splits=splits)
    apart = linear_backward_weight(given["grad_output"], given["input"], True, splits=splits)
    for results in (together, (None, *apart)):
        for name, result in zip(expected, results, strict=True):
            if result is not None and not expected[name].isfinite().all():
                assert_like(result, expected[name])
            elif result is not None:
                assert result.isfinite().all(), f"{operand} has no part in {name}"


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_activations_take_nan_and_infinity_as_torch_does(
    activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Values and gradients of float64, since torch's GELU of infinity is NaN in float32."""

    def derivatives(function: Any, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        input = torch.tensor([[INFINITY], [-INFINITY], [NAN], [-2.0], [0.0], [2.0]])
        input = input.to(device, wide).requires_grad_()
        output = function(input, torch.ones(1, 1, dtype=wide, device=device))
        return output.detach(), torch.autograd.grad(output.sum(), input)[0]

    ours = derivatives(lambda *given: fastlinear.linear(*given, None, activation), dtype)
    theirs = derivatives(lambda *given: ACTIVATIONS[activation](F.linear(*given)), torch.float64)
    for result, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=1e-2, equal_nan=True)


GATED = {
    "input": {(3, 5): NAN, (36, 39): INFINITY},
    "gate_weight": {(0, 7): NAN, (34, 39): INFINITY},
    "up_weight": {(31, 39): NAN, (2, 0): -INFINITY},
    "gate_bias": {(2,): NAN, (33,): -INFINITY},
    "up_bias": {(34,): NAN, (0,): INFINITY},
    "grad_output": {(0, 34): NAN, (36, 0): INFINITY},
}


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("operand", GATED)
def test_nan_and_infinity_in_a_gated_pair_are_where_torch_has_them(
    operand: str, device: torch.device
) -> None:
    m, n, k = 37, 35, 40
    shapes = ((m, k), (n, k), (n, k), (n,), (n,), (m, n))
    given = {
        name: normal(*shape, dtype=torch.float32, device=device)
        for name, shape in zip(GATED, shapes, strict=True)
    }
    with_values(given[operand], GATED[operand])

    def derivatives(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        *operands, grad_output = (one.to(dtype).requires_grad_() for one in given.values())
        output = function(*operands)
        return output.detach(), *torch.autograd.grad(output, operands, grad_output.detach())

    def reference(
        input: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor, up_bias: Tensor
    ) -> Tensor:
        return F.silu(F.linear(input, gate, gate_bias)) * F.linear(input, up, up_bias)

    ours = derivatives(fastlinear.gated_linear, torch.float32)
    theirs = derivatives(reference, torch.float64)
    for result, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-2, equal_nan=True)


# Too large, too small, and zero.


def test_float16_overflows_as_torch_s_does(linear: Linear, device: torch.device) -> None:
    largest = 65504.0
    rows = (
        [1, 1, 0, 0, 0, 0, 0, 0],
        [-1, -1, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0],
        [200, 0, 200, -200, 0, 0, 0, 0],
        [-largest, -largest, 0, 0, 0, 0, 0, 0],
    )
    input = torch.tensor(rows, dtype=torch.float16, device=device)
    weight = torch.tensor([[largest, 15, 16, largest, 0, 0, 0, 0]]).to(input)
    output = linear(input, weight)
    # 15 more than the largest round to it and 16 to infinity; sums on the way may be any size.
    assert output.flatten().tolist() == [largest, -largest, INFINITY, 200 * 16.0, -INFINITY]
    assert torch.equal(output, F.linear(input.double(), weight.double()).half())
    bias = torch.tensor([-largest]).to(input)
    assert linear(input, weight, bias)[2].item() == 16.0, "the bias comes before the rounding"


@pytest.mark.parametrize("splits", [1, 2])
def test_float16_gradients_overflow_as_torch_s_do(splits: int, device: torch.device) -> None:
    ones = torch.ones(70, 1, dtype=torch.float16, device=device)
    grad_output = torch.cat([1000 * ones, -1000 * ones, 900 * ones], 1)
    weight = torch.tensor([[65504.0], [-65504.0], [1.0]], dtype=torch.float16, device=device)
    found = linear_backward(grad_output, ones, weight, True, splits=splits)
    sums = [INFINITY, -INFINITY, 63000.0]
    for result, expected in zip(found, ([INFINITY] * 70, sums, sums), strict=True):
        assert result is not None
        native = torch.tensor(expected).half().tolist()
        assert result.flatten().tolist() == native


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_denormal_numbers_are_kept(
    dtype: torch.dtype, linear: Linear, device: torch.device
) -> None:
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    input = torch.zeros(3, 16, dtype=dtype, device=device)
    input[:, 3] = torch.tensor([smallest, -3 * smallest, limits.smallest_normal / 2], dtype=dtype)
    weight = torch.ones(2, 16, dtype=dtype, device=device)
    expected = input[:, 3:4].expand(3, 2)
    assert torch.equal(linear(input, weight), expected), "in input"
    assert torch.equal(linear(weight, input), expected.T), "in weight"
    large = linear(input, 2 * weight)
    assert torch.equal(large, 2 * expected), "of a product"
    assert large[0, 0].item() == 2 * smallest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_denormal_gradients_are_kept(dtype: torch.dtype, device: torch.device) -> None:
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    grad_output = torch.full((1, 1), 3 * smallest, dtype=dtype, device=device)
    one = torch.ones(1, 1, dtype=dtype, device=device)
    for gradient in linear_backward(grad_output, one, one, True):
        assert gradient is not None
        assert gradient.item() == 3 * smallest


def test_a_sum_of_zeros_is_zero_and_underflow_keeps_its_sign(
    linear: Linear, dtype: torch.dtype, device: torch.device
) -> None:
    """As torch has it, but for a bias of -0.0: its sign is then in torch the dtype's to say."""
    zero = torch.full((1, 8), -0.0, dtype=dtype, device=device)
    one = torch.ones(1, 8, dtype=dtype, device=device)
    for input, weight in ((zero, one), (one, zero), (zero, zero)):
        output = linear(input, weight)
        assert math.copysign(1.0, output.item()) == 1.0
        assert math.copysign(1.0, F.linear(input, weight).item()) == 1.0
    assert math.copysign(1.0, linear(one, zero, zero[0, :1]).item()) == 1.0
    if dtype == torch.float16:  # float32's sums themselves underflow
        tiny = torch.finfo(dtype).smallest_normal * one
        output, native = linear(tiny, -tiny), F.linear(tiny, -tiny)
        assert output.item() == native.item() == 0.0
        assert math.copysign(1.0, output.item()) == math.copysign(1.0, native.item()) == -1.0


# Memory: no kernel reads beside its operands, nor what an earlier call has left.


@pytest.fixture
def watched() -> Iterator[None]:
    with guards.watched_addresses():
        yield


def at_the_ends(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """`tensor` at the start of a storage of NaN, and at the end of another, off 16 bytes."""
    farthest = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    found = []
    for before, after in ((0, 77), (77, 0)):
        size = before + farthest + 1 + after
        storage = torch.full((size,), NAN, dtype=tensor.dtype, device=tensor.device)
        found.append(storage.as_strided(tensor.shape, tensor.stride(), before).copy_(tensor))
    return found[0], found[1]


@triton.jit
def copy_kernel(input_ptr, output_ptr, size: tl.constexpr):
    offs = tl.arange(0, size)
    tl.store(output_ptr + offs, tl.load(input_ptr + offs))


@pytest.mark.skipif(not launch.INTERPRETING, reason="a GPU's addresses cannot be watched")
@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    ("inside", "wrong"), [((8, 8), None), ((7, 8), "reads"), ((8, 7), "writes")]
)
def test_addresses_outside_of_tensors_are_found(
    inside: tuple[int, int], wrong: str | None, device: torch.device
) -> None:
    tensors = tuple(torch.zeros(8, device=device)[:size] for size in inside)
    plan = launch.Launch((1,), (), {"size": 8})
    if wrong is None:
        launch.run(copy_kernel, plan, tensors)
    else:
        with pytest.raises(Exception, match=f"a kernel {wrong} outside of every tensor"):
            launch.run(copy_kernel, plan, tensors)


@triton.jit
def multiply_kernel(output_ptr, left, right):
    tl.store(output_ptr, left * right)


@pytest.mark.skipif(not launch.INTERPRETING, reason="a GPU does not look")
@pytest.mark.parametrize(
    ("left", "right"), [(2**15, -(2**16)), (2**15, 2**16), (-(2**15), 2**16 + 1)]
)
def test_integers_that_leave_their_type_are_found(
    left: int, right: int, device: torch.device
) -> None:
    output = torch.zeros(1, dtype=torch.int32, device=device)
    plan = launch.Launch((1,), (left, right), {})
    if -(2**31) <= left * right < 2**31:
        launch.run(multiply_kernel, plan, (output,))
        assert output.item() == left * right
    else:
        with pytest.raises(Exception, match="mul overflows int32"):
            launch.run(multiply_kernel, plan, (output,))


@pytest.mark.usefixtures("watched")
def test_forward_reads_nothing_beside_its_operands(
    linear: Linear, dtype: torch.dtype, device: torch.device
) -> None:
    wide = normal(37, 80, dtype=dtype, device=device)
    given = wide[:, :40], normal(35, 40, dtype=dtype, device=device), wide[:35, 0]
    expected = F.linear(*(one.double() for one in given))
    for operands in zip(*(at_the_ends(one) for one in given), strict=True):
        if dtype == torch.float16:  # descriptors want 16 bytes
            operands = (*(one if one.data_ptr() % 16 == 0 else one.clone() for one in operands),)
        output = linear(*operands)
        torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-1)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("splits", [1, 3])
def test_backward_reads_nothing_beside_its_operands(splits: int, device: torch.device) -> None:
    shapes = (5, 7, 38), (7, 5, 33), (35, 66)
    grad_output, input, weight = (
        normal(*shape, dtype=torch.float32, device=device) for shape in shapes
    )
    given = grad_output[..., :35], input.transpose(0, 1), weight[:, ::2]
    rows = grad_output[..., :35].reshape(35, 35)
    expected = (given[0] @ given[2], rows.T @ given[1].reshape(35, 33), rows.sum(0))
    for operands in zip(*(at_the_ends(one) for one in given), strict=True):
        found = linear_backward(*operands, True, splits=splits)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("watched")
def test_a_gated_pair_reads_nothing_beside_its_operands(device: torch.device) -> None:
    shapes = (37, 33), (35, 33), (35, 33), (35,), (35,), (37, 35)
    given = [normal(*shape, dtype=torch.float32, device=device) for shape in shapes]
    for *operands, grad_output in zip(*(at_the_ends(one) for one in given), strict=True):
        output, gate, up = gated_linear_forward(*operands, "silu", True)
        assert output.isfinite().all()
        found = gated_linear_backward(grad_output, gate, up, *operands[:3], True, "silu")
        assert all(one is not None and one.isfinite().all() for one in found)


SPLIT = Config(16, 32, 16, num_warps=4, num_stages=3, kind="split_k", splits=5)
# Calls that take workspaces, of input (M, K) and weight (N, K), whose output is grad_output too.
SHARED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor | None, ...]]] = {
    "split_k": lambda input, weight: (linear_forward(input, weight, config=SPLIT),),
    "grad_weight": lambda input, weight: linear_backward_weight(
        input @ weight.T, input, True, splits=3
    ),
    "all gradients": lambda input, weight: linear_backward(
        input @ weight.T, input, weight, True, splits=3
    ),
}


@pytest.mark.parametrize("call", SHARED.values(), ids=SHARED)
def test_workspaces_and_counters_hand_nothing_on(
    call: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """Memory that was used, by calls of this size and others, is as good as new."""
    used: dict[Any, Tensor] = {}

    def recycle(like: Tensor, output: launch.Operand) -> Tensor:
        used.setdefault(output, allocate(like, output))
        return used[output]

    def copies(m: int, n: int) -> list[Tensor]:
        results = call(inputs[:m], weights[:n])
        assert not any(counters.any() for counters in shared_sums._counters.values())
        return [one.clone() for one in results]

    allocate = launch.allocate
    inputs, weights = (normal(70, 40, dtype=torch.float32, device=device) for _ in range(2))
    expected, smaller = copies(70, 35), copies(33, 10)
    monkeypatch.setattr(launch, "allocate", recycle)
    kept = inputs.clone()
    inputs.fill_(NAN)
    assert all(one.isnan().any() for one in copies(70, 35))
    inputs.copy_(kept)
    assert all(map(torch.equal, copies(33, 10), smaller))
    assert all(map(torch.equal, copies(70, 35), expected))
