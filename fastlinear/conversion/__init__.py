"""`convert` and `revert`: they change a model's layers in place.

`convert.py` changes classes and reports; `fold.py` finds activations that a layer can apply itself,
and `gated_mlp.py` MLPs of gated pairs, by what `source.py` reads of a forward's own text. Start
with `convert.convert`.
"""
