"""Which way a call goes: what was measured on this device, and the decision that follows from it.

`way.py` decides, once for calls that are alike; `known.py` says what tables hold for a device, and
`table.py` what a table is; `onednn.py` and `epilogue.py` are what PyTorch has besides F.linear.
Nothing here knows of autograd or modules. Start with `way.find`.
"""
