"""The gradients of a layer, of its activation, and of a gated pair: kernels with their launchers.

`linear.py` launches grad_input, grad_weight and grad_bias together or apart; `grad_weight.py` is
the launch of the second and third alone, by `grad_weight_tile.py`, which `grouped.py` has beside
tiles of the first. `activation.py` and `gated.py` are the passes through an activation and a gate.
grad_input is a forward of other operands. Start with `linear.linear_backward`.
"""
