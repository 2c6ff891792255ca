"""A plugin of pytest, `-p benchmarks.plugin`, by which tests of kernels that are left out skip."""

from collections.abc import Generator

import pytest

from benchmarks.watch import LeftOut, watch


def pytest_configure() -> None:
    watch()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    try:
        return (yield)
    except LeftOut as error:
        pytest.skip(str(error))
