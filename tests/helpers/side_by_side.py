"""Does one thing with `fastlinear.Linear` and with `nn.Linear`, and compares what comes of it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlinear


@dataclass(frozen=True)
class Raised:
    """An error, as the outcome of a deed."""

    kind: type[BaseException]
    message: str


@dataclass(frozen=True)
class Outcome:
    """What a deed returned or raised, the warnings it gave, and the random numbers it left."""

    result: Any
    warnings: list[tuple[type[Warning], str]]
    random: Tensor


def outcome(deed: Callable[[type[nn.Linear]], Any], kind: type[nn.Linear]) -> Outcome:
    torch.manual_seed(torch.initial_seed())
    result: Any
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)  # any other is an error, as in every test
        try:
            result = deed(kind)
        except Exception as error:
            result = Raised(type(error), str(error))
    given = [(warning.category, str(warning.message)) for warning in caught]
    return Outcome(result, given, torch.get_rng_state())


def assert_same(deed: Callable[[type[nn.Linear]], Any], raises: bool = False) -> None:
    """Fails unless `deed` comes to the same with both classes, from the same random numbers.

    Where it raises, that is an error of one type and message. Whether it does is for `raises` to
    say, so that a deed which fails for a reason of its own is not taken for agreement.
    """
    theirs = outcome(deed, nn.Linear)
    assert isinstance(theirs.result, Raised) == raises, f"nn.Linear: {theirs.result}"
    ours = outcome(deed, fastlinear.Linear)
    assert_alike(ours.result, theirs.result)
    assert ours.warnings == theirs.warnings
    assert torch.equal(ours.random, theirs.random), "other random numbers were drawn"


def assert_alike(ours: Any, theirs: Any, where: str = "result") -> None:
    """Fails unless both are the same, but for roundings and for the class of the layer."""
    if isinstance(theirs, nn.Linear):
        assert isinstance(ours, fastlinear.Linear), f"{where} is {ours!r}"
        assert repr(ours) == repr(theirs), where
        assert list(vars(ours)) == list(vars(theirs)), f"attributes of {where}"
        assert ours.training == theirs.training, where
        assert_alike(dict(ours.named_parameters()), dict(theirs.named_parameters()), where)
        return
    assert type(ours) is type(theirs), f"{where} is {ours!r}, nn.Linear's {theirs!r}"
    if isinstance(theirs, Tensor):
        for name in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf"):
            mine, native = getattr(ours, name), getattr(theirs, name)
            assert mine == native, f"{name} of {where} is {mine}, nn.Linear's {native}"
        for name in ("stride", "is_inference", "is_shared", "is_contiguous"):
            mine, native = getattr(ours, name)(), getattr(theirs, name)()
            assert mine == native, f"{name} of {where} is {mine}, nn.Linear's {native}"
        half = theirs.dtype in (torch.float16, torch.bfloat16)
        step = 4 * torch.finfo(theirs.dtype).eps if half else None
        torch.testing.assert_close(ours, theirs, rtol=step, atol=step, equal_nan=True)
        if theirs.is_leaf:
            assert_alike(ours.grad, theirs.grad, f"{where}.grad")
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), f"keys of {where}"
        for key in theirs:
            assert_alike(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), f"length of {where}"
        for index, (mine, native) in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(mine, native, f"{where}[{index}]")
    else:
        assert ours == theirs, where
