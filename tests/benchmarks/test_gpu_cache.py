"""Kernels that are compiled beforehand are found where they are unpacked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_cache

ROOT = Path(__file__).parents[2]
COMPILE = """
from benchmarks import gpu_cache
from benchmarks.gpu_run import launches

launches.CALLS = {1: (launches.tried,)}
print(gpu_cache.compile_share((0, 1, "by gemv")))
"""


def compiled(folder: Path) -> str:
    """What a process comes upon that compiles a few kernels into `folder`, if they are not there.

    A process of its own: this one has imported Triton as an interpreter.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_compiled_beforehand_are_found_in_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "archive.tar.xz"
    assert compiled(here) == "Share(kernels=3, found=0, errors=[])"
    gpu_cache.pack(here, archive)
    here.rename(tmp_path / "gone")  # whose paths Triton's lists of files have
    gpu_cache.unpack(archive, there)
    assert compiled(there) == "Share(kernels=3, found=3, errors=[])"
    other = there / "OTHER"
    other.mkdir()
    (other / "__grp__kernel.json").write_text(json.dumps({"child_paths": {}}))
    gpu_cache.hits(archive, there)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"3 kernels unpacked to {there}",
        "3 kernels were carried, 1 compiled besides",
    ]


def test_archive_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_cache", "unpack", "--archive"]
    command.append(str(tmp_path / "none.tar.xz"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"there is no archive {tmp_path / 'none.tar.xz'}")
