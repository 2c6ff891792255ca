"""What kernels share on the device: functions that are compiled into them.

`indexing.py` is arithmetic of tiles and offsets, `precision.py` how products are formed,
`reduction.py` how programs share a sum, `epilogue.py` activations and their gradients. Nothing here
knows of launches. Start with `epilogue.activate`.
"""
