"""Packaging: `kernels/` at the top of the repository is installed as `fastlinear.kernels`."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "fastlinear" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
).group(1)

ROOMS = ("backward", "configs", "forward", "language", "launching")  # of kernels/

setup(
    name="fastlinear",
    version=VERSION,
    description="A drop-in nn.Linear for PyTorch with fused Triton kernels, forward and backward",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The fastlinear developers",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # A top-level package named `kernels` would collide with the one of that name on PyPI.
    packages=[
        "fastlinear",
        "fastlinear.choice",
        "fastlinear.conversion",
        "fastlinear.ops",
        "fastlinear.tuning",
        "fastlinear.kernels",
        *(f"fastlinear.kernels.{room}" for room in ROOMS),
    ],
    package_dir={"fastlinear": "fastlinear", "fastlinear.kernels": "kernels"},
    package_data={
        "fastlinear": ["py.typed"],
        "fastlinear.kernels": ["resources.json", "tuned/*.json"],
        "fastlinear.kernels.configs": ["tiles.json"],
    },
    # The tests pass, interpreted and compiled for GPUs that are not there, on torch 2.11.0 with
    # Triton 3.6.0, 2.13.0 with 3.7.1, 2.14.1 with 3.8.0 and 2.15.0 with 3.9.0.
    install_requires=["torch>=2.11"],
    extras_require={"triton": ["triton>=3.6"], "tune": ["triton>=3.6", "tqdm"]},
)
