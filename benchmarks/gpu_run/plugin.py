"""A plugin of pytest, by which tests of kernels that are left out skip.

It is `-p benchmarks.gpu_run.plugin`.
"""

from collections.abc import Generator

import pytest

from benchmarks.shared.watch import LeftOut, watch


def pytest_configure() -> None:
    watch()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    try:
        return (yield)
    except LeftOut as error:
        pytest.skip(str(error))
