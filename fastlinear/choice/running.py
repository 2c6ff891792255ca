"""What the ops that run now go by: the settings of the process or, in a backward, its forward's."""

import threading

import torch

from fastlinear.choice import backend, known


class _Forward(threading.local):
    """Within a backward, whether its forward ran in "auto"; None where no forward says so."""

    auto: bool | None = None


_forward = _Forward()


def by_tables() -> bool:
    """Whether tables have a say in the ops that run now."""
    return known.seen and not backend.invariant and (known.available or _forward.auto is not None)


def takes_pytorch() -> bool:
    """Whether the ops that run now may take PyTorch's products: but for those of "triton" they may.

    A backward goes by the backend of its forward.
    """
    return backend.current != "triton" if _forward.auto is None else _forward.auto


def only_pytorch() -> bool:
    """Whether they have to: a compiled function's, in "torch"."""
    return backend.current == "torch" and _forward.auto is None


class as_its_forward:
    """Context manager within which a backward goes as its forward did, in "auto" or not.

    One that compiled autograd traces follows the backend in force when it runs.
    """

    def __init__(self, auto: bool) -> None:
        self.auto = None if torch.compiler.is_dynamo_compiling() else auto

    def __enter__(self) -> None:
        if self.auto is not None:
            self.before, _forward.auto = _forward.auto, self.auto

    def __exit__(self, *error: object) -> None:
        if self.auto is not None:
            _forward.auto = self.before
