"""Configurations of the kernels: what there are, which are legal, and which is chosen.

`config.py` says what a configuration is, `tiles.py` reads those that are shipped (`tiles.json`),
`legality.py` says which a device can launch, by what was compiled (`../resources.json`); `model.py`
and `pair_model.py` say what time each should take, and `choose.py` and `choose_pair.py` take the
least. A new GPU needs a Target in `config.py` and tiles in `tiles.json`.
"""
