"""The demo, which trains a small network on handwritten digits: `python -m benchmarks.train`.

`digits.py` has the digits, the network and one training of it; `distributed.py` shares a training
out among torchrun's processes, and `checkpoints.py` keeps its state. Start with `digits.Training`.
"""
