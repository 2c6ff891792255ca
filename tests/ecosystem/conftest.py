"""Fixtures of the tests with other libraries; those of tests/conftest.py hold here too."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anyone imports huggingface_hub

from collections.abc import Iterator

import pytest
from twins import Backend

import fastlinear
import fastlinear.kernels.backward  # takes the launcher that the fixture replaces: before it does
from fastlinear.kernels import forward


@pytest.fixture(params=["auto", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Runs the test with each backend, and sees to it that the kernels ran with theirs alone."""
    backend = Backend(request.param)
    linear_forward = forward.linear_forward

    def counted(*operands, **options):  # type: ignore[no-untyped-def]
        backend.calls += 1
        return linear_forward(*operands, **options)

    monkeypatch.setattr(forward, "linear_forward", counted)
    with fastlinear.use_backend(backend.name):
        yield backend
    assert (backend.calls > 0) == (backend.name == "triton"), f"{backend.calls} kernels ran"
