"""Triton kernels of the linear layer and their launchers.

They know tensors, nothing of autograd, modules or ops.

`forward` and `backward` are what is called; they stand on `launching`, that on `configs`, and all
on `language`. Importing this package does not import Triton: those do, when a kernel is needed.
Start with `forward/linear.py`.
"""
