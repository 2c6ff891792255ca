"""The study that says where float32 products of pieces err no more than plain float32's."""

import numpy as np
import pytest

from benchmarks import accuracy
from fastlinear.kernels.configs.config import LONG_SUM


@pytest.mark.parametrize("data", accuracy.SETS)
def test_long_sums_of_pieces_err_no_more_than_plain_float32_s(data: str) -> None:
    # Where the one large product comes is most of what plain float32 errs by.
    size = 20 if data == accuracy.DOMINATED else 6
    seeds = np.random.default_rng().integers(2**32, size=size).tolist()
    modes = ("ieee", "bf16x6", "bf16x6, Ampere")
    plain, *of_pieces = accuracy.errors(data, LONG_SUM, seeds, modes).values()
    for error in of_pieces:
        assert error.largest <= plain.largest, seeds
        assert error.typical <= plain.typical, seeds


def test_where_pieces_err_more_than_plain_float32() -> None:
    """Why they have to be opted in to: nobody knows what comes last in a sum."""
    seeds = np.random.default_rng().integers(2**32, size=6).tolist()
    data = "spread over 1e-8..1e8"
    one = accuracy.errors(data, 1, seeds, ("ieee", "bf16x6"))
    assert one["bf16x6"].largest > 1.5 * one["ieee"].largest
    last = accuracy.errors(accuracy.LAST, LONG_SUM, seeds[:2], ("ieee", "bf16x6"))
    assert last["bf16x6"].largest > 1.3 * last["ieee"].largest


@pytest.mark.parametrize("size", [16, 100, LONG_SUM])
def test_emulated_errors_are_within_their_bounds(size: int) -> None:
    seeds = np.random.default_rng().integers(2**32, size=2).tolist()
    for data in accuracy.SETS:
        for mode, error in accuracy.errors(data, size, seeds, ("ieee", "bf16x6")).items():
            assert error.largest <= accuracy.bound(mode, size), (mode, data, seeds)
    assert accuracy.bound("bf16x6", size) <= accuracy.bound("ieee", size)


def test_emulated_instruction_cuts_off() -> None:
    cores = accuracy.Cores(depth=2, extra_bits=2)
    a = np.array([[1.0, 2.0**-25]], np.float32)
    one, lost = np.ones((1, 2), np.float32), np.array([[1.0, 0.5]], np.float32)
    zero = np.zeros((1, 1))
    # 2**-25 is kept beside 1, and 2**-26 is not; of the sums 24 bits are.
    assert accuracy.instruction(zero - 1, a, one, cores) == 2.0**-25
    assert accuracy.instruction(zero - 1, a, lost, cores) == 0
    assert accuracy.instruction(zero + 2 * 2.0**-25, a, one, cores) == 1
    assert accuracy.instruction(zero + 6 * 2.0**-25, a, one, cores) == 1 + 2.0**-23
