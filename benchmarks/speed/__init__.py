"""What is timed beside PyTorch: layers by `benchmarks.linear`, kernels by `benchmarks.kernels`.

For the sweep of layers `arms.py` has the ways to compute one (`naive.py` is one of them), and
`problem.py` a point's operands, what is right, and what is timed. `kernel_times.py` times kernels,
and `test_linear.py` is the sweep in small, for `make bench-pytest`. Start with `arms.arms`.
"""
