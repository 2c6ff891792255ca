"""The demo, which trains a small network on handwritten digits: `python -m benchmarks.train`.

`digits.py` has the digits, the network and one training of it. `side_by_side.py` trains it with
both layers, `steps.py` times single steps of the two, `ensemble.py` trains many networks at once,
and `picture.py` draws. `distributed.py` shares a training out among torchrun's processes, and
`checkpoints.py` keeps its state. Start with `digits.Training`.
"""
