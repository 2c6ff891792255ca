"""`fastlinear.tune`: what a model calls, measured on the device at hand, into a table.

`record.py` runs the model once and notes the calls of our layers; `tune.py` goes through them, adds
to the table, and says what came of it; `measure.py` makes a table's rows of one call, by the clocks
of `stopwatch.py`. Start with `tune.tune`.
"""
