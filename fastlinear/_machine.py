"""What this process runs on, and with: devices, their names and memory, and versions."""

import contextlib
import functools
import hashlib
import math
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import fastlinear.kernels as kernels

INTERPRETER = "Triton interpreter"


def device_name(device: torch.device) -> str | None:
    """The name by which tables know a device; None for one that they know nothing of.

    A CPU's times depend on the threads that share a product.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return None
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'' if threads == 1 else 's'}"


def name_of(device: torch.device) -> str:
    """`device_name` or, where tables have none, PyTorch's."""
    return device_name(device) or str(device)


def in_words(device: torch.device) -> str:
    """PyTorch's name and, of a GPU, its maker's."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


@functools.cache
def _processor() -> str:
    """A CPU's name, as its maker has it where the system says so."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def driver(device: torch.device) -> str:
    """A GPU's, or what torch was built for where nvidia-smi does not say; else "none"."""
    if device.type != "cuda":
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return said.stdout.split()[0]
    return f"cuda {torch.version.cuda}, hip {torch.version.hip}"


def free_memory(device: torch.device) -> float:
    """Bytes, where the device or the system says how many."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was freed counts as free
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    with contextlib.suppress(OSError):
        said = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = math.inf if said is None else 1024 * int(said[1])
    with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


def versions() -> dict[str, str | None]:
    """Of fastlinear, torch, triton and Python; None for what is not installed."""
    from importlib import metadata  # it takes its time

    import fastlinear  # whose version stands below its imports

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "fastlinear": fastlinear.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


@functools.cache
def software() -> dict[str, str]:
    """What a table's times depend on: versions, and a hash of the kernels' sources."""
    found = versions()
    named = {name: found[name] or "none" for name in ("torch", "triton", "fastlinear")}
    sources = hashlib.sha256()
    folder = Path(kernels.__path__[0])
    for file in (*sorted(folder.rglob("*.py")), folder / "configs" / "tiles.json"):
        sources.update(file.read_bytes())
    return named | {"kernels": sources.hexdigest()[:16]}
