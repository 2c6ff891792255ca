"""What is known of the kernels without a GPU, by compiling them: `python -m benchmarks.resources`.

`case.py` makes launches for GPUs and operands that are not there; `ahead_of_time.py` lists which of
them are compiled. `compiled.py` reads what came of one: registers, memory and matrix instructions,
with `machine_code.py` what the machine's own code says, and with `occupancy.py` how many programs
share a multiprocessor. Start with `case.Case`.
"""
