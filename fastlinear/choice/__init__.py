"""Which way a call goes: what was measured on this device, and the decision that follows from it.

`linear` asks `known.available`, then `way.is_pytorchs`, then `way.tables_say_so`, which decides for
backend "auto"; `way.Asked` decides for each product of an op, and `way.find` remembers. `known.py`
says what tables hold for a device, the same on all ranks, and `table.py` what a table is;
`backend.py` has the settings of the process, `running.py` which of them an op goes by in a
backward, `launchers.py` the kernels' modules; `onednn.py` and `cublaslt.py` are what PyTorch has
besides F.linear. Nothing here computes a gradient or knows a layer. Start with `way.tables_say_so`.
"""
