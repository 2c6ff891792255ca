"""Names of arms, for whoever reads results and measures nothing: it imports no more than that."""

NATIVE = "nn.Linear"


def not_a_peer(arm: str) -> bool:
    """Whether what goes wrong in this arm is ours, or all arms'."""
    return arm.startswith("fastlinear") or arm in (NATIVE, "every arm")
