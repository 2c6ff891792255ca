"""A machine whose tables take oneDNN's linear for every output."""

from pathlib import Path

import pytest
import torch

from fastlinear.choice import known, onednn, way
from fastlinear.choice.known import Found
from fastlinear.choice.table import BY_ROWS, PYTORCH, Key, Row


def take_everywhere(patch: pytest.MonkeyPatch) -> None:
    """Has "auto" take our ops for every call, and those oneDNN for every output that it can."""

    def find(device: torch.device, key: Key) -> Found | None:
        if key.product == "training":
            return Found(Row(*key, BY_ROWS, 1.0, 2.0, 1.0, 2.0), Path(), "")
        if key.product == "gradients":
            return None
        dtype = getattr(torch, key.dtype)
        taken = onednn.takes(key.product, device, dtype, key.activation, key.bias)
        candidate = "onednn" if taken else PYTORCH
        # That of float64 is PyTorch's, by way of our op.
        return Found(Row(*key, candidate, 1.0, 2.0, 1.0, 2.0), Path(), "")

    patch.setattr(way, "_ways", {})
    patch.setattr(way, "is_pytorchs", lambda *given: False)
    patch.setattr(known, "row", find)
    patch.setattr(known, "available", True)
    patch.setattr(known, "seen", True)
    patch.setattr(known, "follow_group", lambda: None)
    patch.setattr(way, "any_gradients", lambda device: True)
    patch.setattr(way, "_for_any_rows", lambda *given: True)
