"""What `fastlinear.batched_linear` does not take, and what it says then."""

from typing import Any

import pytest
import torch
from batched import Function, reference
from torch import Tensor

import fastlinear

pytestmark = pytest.mark.usefixtures("backend")


# What cannot be taken.


def W(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD_SHAPES = {
    "layers": (W(2, 4, 5), W(3, 6, 5), W(3, 6)),
    "one layer for two inputs": (W(2, 4, 5), W(1, 6, 5), None),
    "in_features": (W(2, 4, 5), W(2, 6, 4), None),
    "2-D input": (W(4, 5), W(2, 6, 5), W(2, 6)),
    "4-D input": (W(1, 2, 4, 5), W(2, 6, 5), None),
    "0-D input": (W(), W(2, 6, 5), None),
    "2-D weight": (W(2, 4, 5), W(6, 5), W(6)),
    "1-D weight": (W(2, 4, 5), W(5), None),
    "layers of bias": (W(2, 4, 5), W(2, 6, 5), W(3, 6)),
    "length of bias": (W(2, 4, 5), W(2, 6, 5), W(2, 5)),
    # Which baddbmm would add along the rows.
    "1-D bias as long as there are rows": (W(2, 6, 5), W(2, 6, 5), W(6)),
    "0-D bias": (W(2, 4, 5), W(2, 6, 5), W()),
    "3-D bias": (W(2, 4, 5), W(2, 6, 5), W(2, 1, 6)),
}


@pytest.mark.parametrize("arguments", BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_bad_shapes_are_named(arguments: tuple[Tensor, Tensor, Tensor | None]) -> None:
    with pytest.raises(RuntimeError, match=r"^batched_linear takes .*\(B, ") as raised:
        fastlinear.batched_linear(*arguments)
    input, weight, bias = arguments
    wrong = bias if bias is not None and "takes bias" in str(raised.value) else input
    assert f"is {tuple(wrong.shape)} and weight {tuple(weight.shape)}" in str(raised.value)
    assert raised.value.__cause__ is None


BAD_KINDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "input None": ((None, W(2, 3, 5)), "input is NoneType"),
    "weight None": ((W(2, 4, 5), None), "weight is NoneType"),
    "bias a number": ((W(2, 4, 5), W(2, 3, 5), 1.0), "bias is float"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD_KINDS.values(), ids=BAD_KINDS)
def test_what_is_no_tensor_is_named(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(TypeError, match=f"^batched_linear takes tensors, but {said}$"):
        fastlinear.batched_linear(*arguments)


DTYPES_THAT_DIFFER = {
    "input": (torch.float64, torch.float32, torch.float32),
    "weight": (torch.float32, torch.float16, torch.float32),
    "bias": (torch.float32, torch.float32, torch.float64),
    "input, no bias": (torch.float64, torch.float32),
}


@pytest.mark.parametrize("dtypes", DTYPES_THAT_DIFFER.values(), ids=DTYPES_THAT_DIFFER)
def test_dtypes_that_differ_raise_what_pytorch_raises(dtypes: tuple[torch.dtype, ...]) -> None:
    shapes = ((2, 4, 5), (2, 3, 5), (2, 3))
    inputs = [W(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    with pytest.raises(RuntimeError) as theirs:
        reference(*inputs)
    with pytest.raises(RuntimeError) as ours:
        fastlinear.batched_linear(*inputs)
    assert str(ours.value) == str(theirs.value)


UNSUPPORTED = {
    "int64": (lambda tensor: tensor.long(), "input is torch.int64"),
    "complex": (lambda tensor: tensor.cfloat(), "input is torch.complex64"),
    "sparse": (lambda tensor: tensor.to_sparse(), "input has layout torch.sparse_coo"),
}


@pytest.mark.parametrize(("change", "said"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_only_pytorch_takes(change: Function, said: str, backend: str) -> None:
    inputs = [W(2, 4, 5), W(2, 3, 5)]
    if "layout" in said:
        inputs[0] = change(inputs[0])
    else:
        inputs = [change(one) for one in (*inputs, W(2, 3))]
    if backend == "triton":
        with pytest.raises(TypeError, match=f"backend 'triton' takes .*{said}"):
            fastlinear.batched_linear(*inputs)
    else:
        torch.testing.assert_close(fastlinear.batched_linear(*inputs), reference(*inputs))


def test_subclasses_of_tensor_keep_their_meaning(backend: str) -> None:
    class Loud(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            return "my own product"

    loud = W(2, 4, 5).as_subclass(Loud)
    if backend == "triton":
        with pytest.raises(TypeError, match="takes plain tensors, but input is a Loud"):
            fastlinear.batched_linear(loud, W(2, 3, 5))
    else:
        assert fastlinear.batched_linear(loud, W(2, 3, 5)) == "my own product"
