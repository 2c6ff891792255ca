"""The gradients of a layer, of its activation, and of a gated pair.

`linear.py` launches grad_input, grad_weight and grad_bias, together by the kernel of `grouped.py`
or apart; grad_input alone is a forward of other operands, grad_weight alone (with grad_bias) the
kernel and launcher of `grad_weight.py`. Either kernel computes it in tiles of
`grad_weight_tile.py`, whose rows `grad_weight_problem.py` shares out. `elementwise.py` is the pass
through an activation or a gate, `gated.py` a gated pair's backward. Start with
`linear.linear_backward`.
"""
