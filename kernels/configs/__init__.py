"""Configurations of the kernels: what there are, which are legal, and which is chosen.

`config.py` has the types, `tiles.json` the numbers, which `tiles.py` reads: grad_weight takes the
forward's, whose rows, columns and depth are its N, K and M. `legality.py` says which a device can
launch; `model.py` and `pair_model.py` say what time each should take, by what was compiled
(`../resources.json`), and `choose.py` and `choose_pair.py` take the least. `products.py` has what
of that can be told of a layer by its sizes alone, as tables need it. Start with `choose.choose`.

A new family of GPUs is a Target in `config.py` (TARGETS, `resolved_precision`), what
`launching/launch.py` (`target_of`) makes of a device, lists in `tiles.json`, rates in `model.py`,
limits in `legality.py`; in benchmarks/without_gpu `case.py`, `occupancy.py`, `compiled.py` and
`machine_code.py`, with which `make resources ARGS=--json`, and the same with `ARGS="--launches
--json"`, writes what was compiled; and in tests/kernels `test_float32.py` and
`forward/test_persistent.py`. Where "gfx942" is asked for, AMD's GPUs are meant.
"""
