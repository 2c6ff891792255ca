"""Both calls of `make gpu`, from the same code, where there is no GPU.

`python -m benchmarks.rehearsal --out FOLDER` has Triton's interpreter compute small shapes and a
script say what they took (benchmarks/shared/setting.py), in a copy of the tree without its history,
as it may come to a GPU. --plant names kernels that are to hang, to be wrong or not to launch, as
`benchmarks.shared.watch` has it: the page has to say so. Nothing but FOLDER and the copy, which is
removed, is written to.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import ROOT
from benchmarks.shared.setting import REHEARSAL
from benchmarks.shared.watch import PLANT, planted

TREE = ("benchmarks", "fastlinear", "kernels", "tests", "pyproject.toml", "README.md")


def copy(folder: Path) -> None:
    """The tree, laid out so that it can be imported from there as it is installed."""
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.tar.xz")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    (folder / "fastlinear" / "kernels").symlink_to("../kernels")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--plant", default="", help="KERNEL=FAULT, several parted by ';'")
    parser.add_argument("--minutes", default="2.2", help="for each call")
    parser.add_argument("--calls", type=int, nargs="+", choices=[1, 2], default=[1, 2])
    parser.add_argument("--only", help="some parts, as of benchmarks.gpu")
    arguments = parser.parse_args()
    planted(arguments.plant)
    statuses = []
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        environment = os.environ | {
            REHEARSAL: "1",
            PLANT: arguments.plant,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": folder,
            "OMP_NUM_THREADS": "1",
        }
        for call in arguments.calls:
            command = [sys.executable, "-m", "benchmarks.gpu", "--call", str(call)]
            command += ["--out", str(arguments.out.resolve()), "--minutes", arguments.minutes]
            command += ["--only", arguments.only] if arguments.only else []
            print(f"call {call}", flush=True)
            statuses.append(subprocess.run(command, cwd=folder, env=environment).returncode)
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
