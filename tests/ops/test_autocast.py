"""Autocast: dtypes as PyTorch takes them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Function
from oracle import normal
from torch import Tensor

import fastlinear

pytestmark = pytest.mark.usefixtures("triton_backend")


# Autocast

MIXTURES = {
    "all float32": (torch.float32, torch.float32, torch.float32),
    "no bias": (torch.float32, torch.float32, None),
    "bfloat16 weight": (torch.float32, torch.bfloat16, torch.float32),
    "half input, bfloat16 weight": (torch.float16, torch.bfloat16, torch.float32),
    "bfloat16 input and bias": (torch.bfloat16, torch.float32, torch.bfloat16),
    "all float64": (torch.float64, torch.float64, torch.float64),
    "float64 input": (torch.float64, torch.float32, torch.float32),
    "float64 input, no bias": (torch.float64, torch.float32, None),
    "float64 weight": (torch.float32, torch.float64, torch.float32),
    "float64 bias": (torch.float32, torch.float32, torch.float64),
}

LOW_PRECISION = [torch.float16, torch.bfloat16]


def mixed(dtypes: tuple[torch.dtype | None, ...], device: torch.device) -> list[Tensor]:
    return [
        normal(shape, torch.float64, device).to(dtype).requires_grad_()
        for shape, dtype in zip(((4, 5), (3, 5), (3,)), dtypes, strict=True)
        if dtype is not None
    ]


def assert_close_in(dtype: torch.dtype, ours: Any, theirs: Any) -> None:
    """Close as results are that were rounded to `dtype` on the way; dtypes are equal."""
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtypes", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("autocast", LOW_PRECISION, ids=str)
def test_autocast_takes_dtypes_as_pytorch_does(
    dtypes: tuple[torch.dtype | None, ...], autocast: torch.dtype, device: torch.device
) -> None:
    inputs = mixed(dtypes, device)

    def step(linear: Function) -> Any:
        try:
            with torch.autocast(device.type, autocast):
                output = linear(*inputs)
        except RuntimeError as error:
            return str(error)
        return output, torch.autograd.grad(output.sum(), inputs)

    ours, theirs = step(fastlinear.linear), step(F.linear)
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        assert_close_in(autocast, ours, theirs)


@pytest.mark.parametrize("cache_enabled", [True, False], ids=["cached casts", "no cache"])
def test_autocast_regions_nest(cache_enabled: bool, device: torch.device) -> None:
    inputs = mixed((torch.float32,) * 3, device)
    # Casts of these are not cached: the cache does not tell one dtype of autocast from another.
    detached = [tensor.detach() for tensor in inputs]

    def regions(linear: Function) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=cache_enabled):
            outputs = [linear(*inputs), linear(*inputs)]
            with torch.autocast(device.type, enabled=False):
                outputs.append(linear(*inputs))
                with torch.autocast(device.type, torch.float16, cache_enabled=cache_enabled):
                    outputs.append(linear(*detached))
            outputs.append(linear(*inputs))
        outputs.append(linear(*inputs))
        return outputs

    ours, theirs = regions(fastlinear.linear), regions(F.linear)
    dtypes = ["bfloat16", "bfloat16", "float32", "float16", "bfloat16", "float32"]
    assert [str(output.dtype) for output in ours] == [f"torch.{dtype}" for dtype in dtypes]
    assert_close_in(torch.bfloat16, ours, theirs)
    gradients, native = (
        torch.autograd.grad(sum(output.float().sum() for output in outputs), inputs)
        for outputs in (ours, theirs)
    )
    assert_close_in(torch.bfloat16, gradients, native)


@pytest.mark.parametrize("autocast", LOW_PRECISION, ids=str)
def test_autocast_of_per_sample_gradients(autocast: torch.dtype, device: torch.device) -> None:
    inputs = [tensor.detach() for tensor in mixed((torch.float32,) * 3, device)]

    def per_sample(linear: Function) -> Any:
        gradient = torch.func.grad(lambda *a: linear(*a).square().sum(), argnums=(0, 1, 2))
        with torch.autocast(device.type, autocast):
            return torch.func.vmap(gradient, in_dims=(0, None, None))(*inputs)

    assert_close_in(autocast, per_sample(fastlinear.linear), per_sample(F.linear))


@pytest.mark.parametrize("cast_inputs", [None, torch.float32], ids=["as is", "cast to float32"])
def test_autocast_within_custom_fwd(cast_inputs: torch.dtype | None, device: torch.device) -> None:
    def doubled(linear: Function) -> Any:
        class Doubled(torch.autograd.Function):
            @staticmethod
            @torch.amp.custom_fwd(device_type=device.type, cast_inputs=cast_inputs)
            def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
                ctx.save_for_backward(input, weight)
                return 2 * linear(input, weight)

            @staticmethod
            @torch.amp.custom_bwd(device_type=device.type)
            def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
                input, weight = ctx.saved_tensors
                return linear(2 * grad_output, weight.mT), linear(2 * grad_output.mT, input.mT)

        inputs = [tensor.detach().requires_grad_() for tensor in (input, weight)]
        with torch.autocast(device.type, torch.bfloat16):
            output = Doubled.apply(*inputs)
        return output, torch.autograd.grad(output.sum(), inputs)

    input, weight = mixed((torch.float32, torch.float32, None), device)
    ours = doubled(fastlinear.linear)
    assert ours[0].dtype == (cast_inputs or torch.bfloat16)
    assert_close_in(torch.bfloat16, ours, doubled(F.linear))


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_autocast_is_registered_for(key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlinear::linear", key)
