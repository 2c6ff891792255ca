"""What kernels share on the device: functions that are compiled into them, and what they take.

`arguments.py` has the matrices, tiles and options that are kernels' arguments, `indexing.py`
arithmetic of tiles and offsets, `precision.py` how products are formed, `reduction.py` how programs
share a sum, `epilogue.py` activations, their gradients, and how results are stored. Nothing here
knows of launches. Start with `arguments.Matrix`.
"""
