"""The forward of a layer, and of a gated pair: kernels, each with its launcher.

`linear.py` is the launcher of them all: it plans a launch for operands of one description, of the
kind of kernel that `configs` chooses: `tiled.py`, `gemv.py`, `split_k.py` or `persistent.py`, which
`problem.py` tells of the product. `gated.py` computes a pair. Start with `linear.plan_forward`.
"""
