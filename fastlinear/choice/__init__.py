"""Which way a call goes: what was measured on this device, and the decision that follows from it.

`linear` asks `known.is_pytorchs` first, then `auto.tables_say_so`; `way.takes_ours` decides for
backend "auto", `way.of_product` for each product of an op, and `way.find` remembers. `known.py`
says what tables hold for a device, `table.py` what a table is, and `ranks.py` has all ranks go by
one; `backend.py` has the settings of the process, `running.py` which of them an op goes by in a
backward, `launchers.py` the kernels' modules; `onednn.py` and `cublaslt.py` are what PyTorch has
besides F.linear. Nothing here computes a gradient or knows a layer. Start with `way.takes_ours`.
"""
