"""Measurements of fastlinear, and the demo; nothing imports them.

Each file here is a command, `python -m benchmarks.NAME`, and says what it does and takes by
`--help`; what commands are made of lies in the rooms. `speed/` times layers (`linear`) and kernels
(`kernels`) beside PyTorch; `gpu_run/` is what `make gpu` runs on a GPU (`gpu`, `gpu_cache`,
`rehearsal`, `numerics`); `without_gpu/` is what compiling says (`resources`); `demo/` trains a
network (`train`); `shared/` is what all go by. `host_time`, `accuracy`, `predict` and `report` are
whole in themselves. `results/` holds what was measured. Start with `linear`.
"""
