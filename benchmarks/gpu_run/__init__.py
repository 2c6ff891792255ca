"""What `make gpu` runs on a GPU, and the page on what came of it: `python -m benchmarks.gpu`.

`families.py` tries each kind of kernel once, `checks.py` compares every configuration with float64,
`tuning.py` tunes the layers of real models, and by `plugin.py` tests skip what is left out.
`products.py` has the launchers beside PyTorch and float64, `cases.py` the operands, and `apart.py`
runs each job in a process of its own. `launches.py` lists all that is launched, `summary.py` writes
the page. A new kind of kernel is a line in `families.py`. Start with `families.FAMILIES`.
"""
