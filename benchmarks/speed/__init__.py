"""What is timed beside PyTorch: layers by `benchmarks.linear`, kernels by `benchmarks.kernels`.

For the sweep of layers `points.py` lists what is measured, and `arms.py` has the ways to compute it
(`naive.py` is one of them); `problem.py` has a point's operands and what is right, `contest.py`
lets the arms take turns, and `tables.py` writes what came of it. `kernel_times.py` times kernels,
and `test_linear.py` is the sweep in small, for `make bench-pytest`. Start with `contest.measure`.
"""
