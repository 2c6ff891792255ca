"""Triton kernels of the linear layer and their launchers.

They know tensors, nothing of autograd, modules or ops.

Importing this package imports neither torch nor Triton: `forward` and `backward` do, when a kernel
is needed.
"""
