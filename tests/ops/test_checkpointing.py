"""Activation checkpointing recomputes what the forward has computed."""

from typing import Any

import pytest
import torch
from networks import Ops, twins
from oracle import normal
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

pytestmark = pytest.mark.usefixtures("triton_backend")


# Activation checkpointing


def trained(model: nn.Module, input: Tensor, **how: Any) -> tuple[list[Tensor], list[str]]:
    """(output and gradients, names of ops) of one step, checkpointed as `how` says."""
    model.zero_grad()
    input = input.detach().clone().requires_grad_()
    with Ops() as ops:
        output = checkpoint(model, input, **how) if how else model(input)
        output.double().square().sum().backward()
    gradients = [tensor.grad for tensor in (input, *model.parameters())]
    return [output, *gradients], ops.called  # type: ignore[list-item]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("preserve_rng_state", [True, False], ids=["with dropout", "without"])
def test_checkpoint_recomputes_the_same(
    use_reentrant: bool, preserve_rng_state: bool, seed: int, device: torch.device
) -> None:
    ours, theirs = twins(device)
    input = normal((8, 3), torch.float64, device)
    how = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state}
    results = []
    for model in (ours, theirs):
        if preserve_rng_state:
            model.insert(1, nn.Dropout())
        torch.manual_seed(seed)
        results.append(trained(model, input, **how))
    (ours_trained, ops), (theirs_trained, _) = results
    torch.testing.assert_close(ours_trained, theirs_trained)
    assert ops.count("fastlinear.linear.default") > 2


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint_recomputes_under_autocast(use_reentrant: bool, device: torch.device) -> None:
    model, _ = twins(device, torch.float32)
    input = normal((8, 3), torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        ours, _ = trained(model, input, use_reentrant=use_reentrant)
        plain, _ = trained(model, input)
    assert ours[0].dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_checkpoint_policy_saves_the_op(device: torch.device) -> None:
    def policy(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        if op == torch.ops.fastlinear.linear.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    model, reference = twins(device)
    model.append(nn.GELU())
    reference.append(nn.GELU())
    input = normal((4, 3), torch.float64, device)
    ours, ops = trained(
        model,
        input,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    torch.testing.assert_close(ours, trained(reference, input)[0])
    assert ops.count("fastlinear.linear.default") == 2
    assert ops.count("aten.gelu.default") > 2  # recomputed, from what was saved
