"""Kernels compiled beforehand for `make gpu`, in one archive that can be carried to a GPU.

`python -m benchmarks.gpu_cache make` compiles what both calls launch (gpu_run/launches.py), for
Hopper and without a GPU, and writes benchmarks/gpu-cache.tar.xz. Triton and Python have to be those
of the GPU's machine: Triton knows a kernel by the files of its own package. `unpack` unpacks the
archive to where Triton looks, TRITON_CACHE_DIR, and `hits` says how many kernels have been compiled
there besides. Without the archive everything works, slower.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import ARCHIVE, CACHE

TARGET = "sm_90"
GROUP = "__grp__"  # what Triton's list of a kernel's files starts with


class Share(NamedTuple):
    """What one process has come upon: kernels, those that Triton had already, and its errors."""

    kernels: int
    found: int
    errors: list[str]


def compile_share(arguments: tuple[int, int, str]) -> Share:
    """Compiles every `of`-th kernel from `first` on of launches whose name contains `only`."""
    import triton

    from benchmarks.gpu_run.launches import CALLS, launches
    from benchmarks.without_gpu.case import aim, launched

    aim(TARGET)
    first, of, only = arguments
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda cache_hit, **rest: hits.append(cache_hit)
    seen: set[Any] = set()
    errors = []
    for call in CALLS:
        for name, closure in launches(call, "meta", "cuda"):
            if only not in name:
                continue
            for made in launched(TARGET, closure):
                key = made.specialization(TARGET)
                if key in seen:
                    continue
                seen.add(key)
                if len(seen) % of != first:
                    continue
                try:
                    made.compile()
                except Exception as error:  # of the compiler: the others can be had all the same
                    errors.append(f"{name}: {type(error).__name__}: {error}"[:300])
    return Share(len(hits), sum(hits), errors)


def make(archive: Path, folder: Path, only: str) -> int:
    jobs = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        shares = pool.map(compile_share, [(first, jobs, only) for first in range(jobs)], 1)
    errors = [error for share in shares for error in share.errors]
    print(*errors, sep="\n", end="\n" if errors else "")
    pack(folder, archive)
    kernels, found = (sum(share[field] for share in shares) for field in (0, 1))
    size = archive.stat().st_size / 2**20
    print(f"{kernels} kernels, {found} of them there already; {archive} has {size:.1f} MiB")
    return int(bool(errors) or not kernels)


def pack(folder: Path, archive: Path) -> None:
    """Into a file that takes the other's place when it is whole."""
    unfinished = archive.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w:xz") as file:
        for path in sorted(folder.glob("*/*")):
            if path.suffix != ".so":  # launchers in C, which are the machine's own
                file.add(path, path.relative_to(folder).as_posix())
    unfinished.replace(archive)


def unpack(archive: Path, folder: Path) -> int:
    """Triton's lists of files have absolute paths: those are made the folder's."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
        lists = [name for name in file.getnames() if Path(name).name.startswith(GROUP)]
    for name in lists:
        path = folder / name
        files = json.loads(path.read_text())["child_paths"]
        here = {one: str(path.parent / one) for one in files}
        path.write_text(json.dumps({"child_paths": here}))
    print(f"{len(lists)} kernels unpacked to {folder}")
    return 0


def hits(archive: Path, folder: Path) -> int:
    with tarfile.open(archive) as file:
        carried = {name for name in file.getnames() if Path(name).name.startswith(GROUP)}
    there = {path.relative_to(folder).as_posix() for path in folder.glob(f"*/{GROUP}*")}
    print(f"{len(carried)} kernels were carried, {len(there - carried)} compiled besides")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deed", choices=["make", "unpack", "hits"])
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    parser.add_argument("--only", default="", help="make: launches whose name contains this")
    arguments = parser.parse_args()
    folder = Path(os.environ.setdefault("TRITON_CACHE_DIR", CACHE))
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    if arguments.deed == "make":
        if os.environ.get("TRITON_INTERPRET"):
            sys.exit("TRITON_INTERPRET is set: nothing would be compiled; unset it")
        return make(arguments.archive, folder, arguments.only)
    if not arguments.archive.exists():
        sys.exit(f"there is no archive {arguments.archive}; `python -m benchmarks.gpu_cache make`")
    return {"unpack": unpack, "hits": hits}[arguments.deed](arguments.archive, folder)


if __name__ == "__main__":
    sys.exit(main())
