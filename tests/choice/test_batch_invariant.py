"""Batch invariance: a row's output and grad_input do not depend on the rows beside it."""

import pytest
import torch
from oracle import normal
from torch import Tensor

import fastlinear
from fastlinear.choice import backend
from fastlinear.kernels.configs import choose as chooser
from fastlinear.kernels.configs.config import TARGETS, Traits

ROWS = 70
FEATURES = [(32, 64), (24, 77)]  # out_features, in_features: K a power of two, and not


def results(call, input: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Output and grad_input."""
    input = input.detach().requires_grad_()
    output = call(input)
    output.backward(grad_output)
    return output.detach(), input.grad


def assert_rows_are_their_own(call, input: Tensor, grad_output: Tensor) -> None:  # type: ignore[no-untyped-def]
    """Any number of rows, from another place each time, come out as within all of them."""
    output, grad_input = results(call, input, grad_output)
    for rows in range(1, len(input) + 1):
        first = 11 * rows % (len(input) - rows + 1)
        some = slice(first, first + rows)
        found = results(call, input[some], grad_output[some])
        assert torch.equal(found[0], output[some]), f"output of {rows} rows"
        assert torch.equal(found[1], grad_input[some]), f"grad_input of {rows} rows"


@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(*FEATURES[0], torch.bfloat16), (*FEATURES[1], torch.float32)]
)
def test_rows_of_a_layer_do_not_depend_on_the_batch(
    n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    weight, bias = normal((n, k), dtype, device), normal((n,), dtype, device)
    input, grad_output = normal((ROWS, k), dtype, device), normal((ROWS, n), dtype, device)
    with fastlinear.batch_invariant():
        assert_rows_are_their_own(
            lambda input: fastlinear.linear(input, weight, bias), input, grad_output
        )


@pytest.mark.parametrize("name", ["activation", "gated"])
def test_rows_with_an_activation_do_not_depend_on_the_batch(
    name: str, device: torch.device
) -> None:
    n, k = FEATURES[1]
    weight, second = (normal((n, k), torch.float32, device) for _ in range(2))
    calls = {
        "activation": lambda input: fastlinear.linear(input, weight, activation="gelu"),
        "gated": lambda input: fastlinear.gated_linear(input, weight, second),
    }
    input = normal((20, k), torch.float32, device)
    grad_output = normal((20, n), torch.float32, device)
    with fastlinear.batch_invariant():
        assert_rows_are_their_own(calls[name], input, grad_output)


def test_rows_do_not_depend_on_how_the_batch_lies(device: torch.device) -> None:
    weight = normal((48, 64), torch.float32, device)
    input = normal((6, 8, 64), torch.float32, device)
    with fastlinear.batch_invariant():
        output = fastlinear.linear(input, weight)
        by_columns = input.flatten(0, 1).mT.contiguous().mT
        sequence_first = input.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(fastlinear.linear(by_columns, weight), output.flatten(0, 1))
        assert torch.equal(fastlinear.linear(sequence_first, weight), output)
        assert torch.equal(fastlinear.linear(input[3, 5], weight), output[3, 5])
        layers = fastlinear.batched_linear(input, weight.expand(6, -1, -1))
        assert torch.equal(layers, output)


def test_default_mode_chooses_by_the_batch_and_this_one_does_not() -> None:
    def chosen(rows: int, invariant: bool) -> object:
        traits = Traits(torch.float32, "ieee", rows % 2 == 0, TARGETS["sm_90"], wide=rows > 500)
        return chooser.choose("forward", 1, rows, 4096, 4096, traits, batch_invariant=invariant)

    assert len({chosen(rows, True) for rows in (1, 2, 7, 64, 999, 4096)}) == 1
    assert len({chosen(rows, False) for rows in (1, 2, 7, 64, 999, 4096)}) > 1


def test_batch_invariant_nests_and_restores() -> None:
    again = fastlinear.batch_invariant()
    with again, again:
        assert (backend.current, backend.invariant) == ("triton", True)
        with fastlinear.use_backend("triton"):
            assert backend.invariant
    assert (backend.current, backend.invariant) == ("auto", False)
    with pytest.raises(ZeroDivisionError), fastlinear.batch_invariant():
        raise ZeroDivisionError
    assert (backend.current, backend.invariant) == ("auto", False)


def test_batch_invariant_refuses_what_would_break_it(device: torch.device) -> None:
    with (
        fastlinear.use_backend("torch"),
        pytest.raises(RuntimeError, match=r"needs the kernels, .* but backend is 'torch'"),
    ):
        fastlinear.batch_invariant().__enter__()
    assert (backend.current, backend.invariant) == ("auto", False)
    with fastlinear.batch_invariant():
        for other in ("auto", "torch"):
            with pytest.raises(
                RuntimeError, match=f"takes 'triton' there, but backend is '{other}'"
            ):
                fastlinear.use_backend(other).__enter__()
        assert (backend.current, backend.invariant) == ("triton", True)
        with pytest.raises(TypeError, match="float16, bfloat16, float32 and float64, but input is"):
            fastlinear.linear(*(torch.ones(2, 2, dtype=torch.int64, device=device),) * 2)


def test_batch_invariant_is_not_entered_within_a_compiled_function(device: torch.device) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def call(input: Tensor) -> Tensor:
        with fastlinear.batch_invariant():
            return fastlinear.linear(input, input)

    with pytest.raises(Exception, match="enter it around the call"):
        call(normal((4, 4), torch.float32, device))


def test_a_call_like_one_outside_is_batch_invariant_within(device: torch.device) -> None:
    """Plans and shortcuts of the default mode are not taken over."""
    weight = normal((192, 64), torch.float32, device).mT  # one row of it is "gemv"'s by default
    input = normal((40, 192), torch.float32, device)
    with fastlinear.use_backend("triton"), torch.no_grad():
        for _ in range(3):
            fastlinear.linear(input[:1], weight)
        with fastlinear.batch_invariant():
            output = fastlinear.linear(input, weight)
            assert torch.equal(fastlinear.linear(input[:1], weight), output[:1])
            assert torch.equal(fastlinear.linear(input[:1], weight), output[:1])


def test_explain_says_that_rows_are_their_own(device: torch.device) -> None:
    layer = fastlinear.Linear(64, 48, device=device)
    with fastlinear.batch_invariant():
        found = [fastlinear.explain(layer, torch.ones(rows, 64, device=device)) for rows in (1, 70)]
    assert "batch_invariant" in found[0].reason
    assert found[0].products[0].config == found[1].products[0].config
