"""`fastlinear.tune`: what a model calls, measured on the device at hand, into a table.

`tune.py` runs the model once and says what came of it; `record.py` notes the calls of our layers;
`measure.py` makes a table's rows of them, by the clocks of `stopwatch.py`; `store.py` keeps the
file. Start with `tune.tune`.
"""
