"""The forward of a layer, and of a gated pair.

`linear.py` plans and launches a layer's, by the kind of kernel that `configs` chooses: `tiled.py`,
`gemv.py`, `split_k.py` and `persistent.py` each have a kernel and its `plan`, for the product that
`problem.py` describes. `gated.py` computes and launches a pair. Start with `linear.plan_forward`.
"""
