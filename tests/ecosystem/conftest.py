"""Fixtures of the tests with other libraries; those of tests/conftest.py hold here too."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anyone imports huggingface_hub

from collections.abc import Iterator

import pytest
from twins import Backend

import fastlinear
import fastlinear.kernels.backward.linear  # before the fixture replaces a launcher that it takes
from fastlinear.choice import way
from fastlinear.kernels.forward import gated
from fastlinear.kernels.forward import linear as forward


@pytest.fixture(params=["auto", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Runs the test with each backend, and sees to it that the kernels ran with theirs alone."""
    backend = Backend(request.param)

    def counted(launcher, layers: int):  # type: ignore[no-untyped-def]
        def count(*operands, **options):  # type: ignore[no-untyped-def]
            backend.calls += layers
            return launcher(*operands, **options)

        return count

    as_planned = forward.as_planned
    monkeypatch.setattr(way, "_ways", {})  # those of earlier tests count for those
    monkeypatch.setattr(forward, "as_planned", lambda plan: counted(as_planned(plan), 1))
    monkeypatch.setattr(forward, "linear_forward", counted(forward.linear_forward, 1))
    monkeypatch.setattr(gated, "gated_linear_forward", counted(gated.gated_linear_forward, 2))
    with fastlinear.use_backend(backend.name):
        yield backend
    assert (backend.calls > 0) == (backend.name == "triton"), f"{backend.calls} kernels ran"
