"""Which way a call goes: what was measured on this device, and the decision that follows from it.

`linear` asks `way.is_pytorchs` first; `way.takes_ours` decides for backend "auto", `way.Asked` for
each product of an op, and `way.find` remembers. `known.py` says what tables hold for a device, the
same on all ranks, and `table.py` what a table is; `backend.py` has the settings of the process;
`onednn.py` and `cublaslt.py` are what PyTorch has besides F.linear. Nothing here computes a
gradient or knows a layer. Start with `way.takes_ours`.
"""
