"""Which way a call goes: what was measured on this device, and the decision that follows from it.

`backend.py` has the settings of the process; `way.py` decides, once for calls that are alike;
`known.py` says what tables hold for a device, `table.py` what a table is, and `ranks.py` has all
ranks go by one; `onednn.py` and `epilogue.py` are what PyTorch has besides F.linear.
Nothing here knows of autograd or modules. Start with `way.find`.
"""
