"""What every measurement goes by: the machine, the clock, the layers, the files of results.

`measure.py` has the clock, `shapes.py` the layers of real models and their batch sizes,
`environment.py` what a measurement was taken on, `files.py` how results are written, and `names.py`
how arms are called in them. `setting.py` has what a GPU's run and its rehearsal differ in, and
`watch.py` keeps kernels from being launched that are known to be at fault. Nothing here knows of
the other rooms, and importing the room imports no torch. Start with `measure.Clock`.
"""
