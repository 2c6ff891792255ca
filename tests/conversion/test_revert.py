"""`revert` on layers that something else has changed since they were converted."""

import functools

import torch
from torch import nn

import fastlinear


def test_revert_leaves_a_replaced_forward_working() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    input = torch.randn(5, 3)
    expected = model(input)
    fastlinear.convert(model)
    forward = model[0].forward  # bound to the class of now, as libraries keep it to call it later
    model[0].forward = functools.partial(lambda input: forward(input))

    report = fastlinear.revert(model)
    assert report.converted == ("1",)
    assert report.skipped == (("0", "its forward was replaced since it was converted"),)
    assert type(model[0]) is fastlinear.Linear
    assert torch.equal(model(input), expected)

    del model[0].forward
    assert fastlinear.revert(model).converted == ("0",)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(input), expected)
