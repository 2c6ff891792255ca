"""`fastlinear.tune`: what a model calls, measured on the device at hand, into a table.

`record.py` runs the model once and notes the calls of our layers; `tune.py` goes through them and
says what came of it; `measure.py` makes a table's rows of one, by the clocks of `stopwatch.py`;
`store.py` keeps the file. Start with `tune.tune`.
"""
