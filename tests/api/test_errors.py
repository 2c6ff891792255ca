"""Bad input raises what `F.linear` raises, with any backend.

What the kernels cannot take, the error says in words.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlinear
from fastlinear.ops.linear import linear_backward_op, linear_op


def W(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD = {
    "wrong in_features": lambda: (W(2, 5), W(4, 3), W(4)),
    "wrong in_features, no bias": lambda: (W(2, 5), W(4, 3), None),
    "wrong in_features, leading dimensions": lambda: (W(2, 3, 5), W(4, 3), W(4)),
    "wrong in_features, 1-D": lambda: (W(5), W(4, 3), W(4)),
    "0-D input": lambda: (W(), W(4, 3), W(4)),
    "dtype of input": lambda: (W(2, 3, dtype=torch.float64), W(4, 3), W(4)),
    "dtype of input, no bias": lambda: (W(2, 3, dtype=torch.float64), W(4, 3), None),
    "dtype of bias": lambda: (W(2, 3), W(4, 3), W(4, dtype=torch.float64)),
    "length of bias": lambda: (W(2, 3), W(4, 3), W(5)),
    "1-D weight with bias": lambda: (W(2, 3), W(3), W(1)),
    "3-D weight": lambda: (W(2, 3), W(2, 4, 3), None),
    "input None": lambda: (None, W(4, 3), W(4)),
    "input list": lambda: ([1.0], W(4, 3), W(4)),
    "weight None": lambda: (W(2, 3), None, None),
    "bias a number": lambda: (W(2, 3), W(4, 3), 1.0),
}


def raised(function, *arguments) -> tuple[type[Exception], str]:  # type: ignore[no-untyped-def]
    try:
        function(*arguments)
    except Exception as error:
        return type(error), str(error)
    pytest.fail("raised nothing")


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_input_raises_what_f_linear_raises(arguments, backend: str) -> None:  # type: ignore[no-untyped-def]
    try:
        F.linear(*arguments())
    except Exception:
        expected = raised(F.linear, *arguments())
    else:
        pytest.skip("PyTorch takes this on this version")
    with fastlinear.use_backend(backend):
        assert raised(fastlinear.linear, *arguments()) == expected


UNSUPPORTED = {
    "int64": (
        lambda: (W(2, 3, dtype=torch.int64), W(4, 3, dtype=torch.int64), None),
        "input is torch.int64",
    ),
    "complex": (
        lambda: (W(2, 3, dtype=torch.complex64), W(4, 3, dtype=torch.complex64), None),
        "complex64",
    ),
    "sparse": (lambda: (W(2, 3), W(4, 3).to_sparse(), None), "weight has layout torch.sparse_coo"),
    "2-D bias": (lambda: (W(2, 3), W(4, 3), W(2, 4)), r"bias is \(2, 4\) and out_features 4"),
    "1-D weight": (lambda: (W(2, 3), W(3), None), r"weight \(3,\)"),
}


@pytest.mark.parametrize(("arguments", "said"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_only_pytorch_takes(arguments, said: str) -> None:  # type: ignore[no-untyped-def]
    expected = F.linear(*arguments())
    torch.testing.assert_close(fastlinear.linear(*arguments()), expected)
    with (
        fastlinear.use_backend("triton"),
        pytest.raises(TypeError, match=f"backend 'triton' takes .*{said}"),
    ):
        fastlinear.linear(*arguments())


def test_subclasses_of_tensor_keep_their_meaning() -> None:
    class Loud(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            return "my own linear"

    loud = W(2, 3).as_subclass(Loud)
    assert fastlinear.linear(loud, W(4, 3)) == "my own linear"
    with (
        fastlinear.use_backend("triton"),
        pytest.raises(TypeError, match="takes plain tensors, but input is a Loud"),
    ):
        fastlinear.linear(loud, W(4, 3))


@pytest.mark.parametrize("bias", [W(1), W()], ids=["(1,)", "()"])
def test_bias_of_one_element_broadcasts(bias: Tensor, device: torch.device) -> None:
    input, weight = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    with fastlinear.use_backend("triton"):
        torch.testing.assert_close(
            fastlinear.linear(input, weight, bias.to(device)),
            F.linear(input, weight, bias.to(device)),
        )


def test_the_op_called_directly_does_not_read_beside_its_operands(device: torch.device) -> None:
    input, weight = torch.randn(2, 3, device=device), torch.randn(4, 5, device=device)
    with pytest.raises(RuntimeError, match=r"input is \(2, 3\), weight \(4, 5\), bias None"):
        linear_op(input, weight, None)
    with pytest.raises(RuntimeError, match=r"bias \(5,\)"):
        linear_op(input, torch.randn(4, 3, device=device), torch.randn(5, device=device))
    with pytest.raises(RuntimeError, match=r"grad_output is \(32, 5\), input \(4, 3\)"):
        linear_backward_op(
            torch.randn(32, 5, device=device), torch.randn(4, 3, device=device), None, True, False
        )


def test_vmap_raises_what_f_linear_raises(device: torch.device) -> None:
    inputs, weight = torch.randn(3, device=device), torch.randn(4, 3, device=device)

    def mapped(linear):  # type: ignore[no-untyped-def]
        return torch.vmap(lambda input: linear(input, weight))(inputs)

    with fastlinear.use_backend("triton"):
        assert raised(mapped, fastlinear.linear)[0] is raised(mapped, F.linear)[0]


def test_errors_of_others_come_through_once(device: torch.device) -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        raise RuntimeError("the disk is full")

    weight = torch.randn(4, 3, device=device, requires_grad=True)
    with (
        fastlinear.use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        pytest.raises(RuntimeError, match="the disk is full"),
    ):
        fastlinear.linear(torch.randn(2, 3, device=device), weight)
    assert len(packed) == 1


# torch.nested says that it is a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_by_name(device: torch.device) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(5, 3)], device=device)
    weight = torch.randn(4, 3, device=device)
    assert fastlinear.linear(nested, weight).is_nested
    with (
        fastlinear.use_backend("triton"),
        pytest.raises(TypeError, match="takes plain tensors, but input is nested"),
    ):
        fastlinear.linear(nested, weight)
