"""Tunes the layers of benchmarks/shapes.py into a table that can be shipped.

`python -m benchmarks.tuning --folder FOLDER` writes FOLDER/<device>.json as `python -m fastlinear
tune` does, after each product, under the name that it has in kernels/tuned/.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.setting import SETTING
from benchmarks.shapes import LAYERS
from benchmarks.watch import watch
from fastlinear.choice import known, table
from fastlinear.tuning import command
from fastlinear.tuning.products import Layer

DTYPES = (torch.bfloat16, torch.float32)


def layers() -> Iterator[Layer]:
    """What is tuned, the most valuable first: by dtype, batch size and then size of the layer.

    Models mostly run in bfloat16, and a float32 product takes ten times as long to measure. The
    batch sizes of training and decoding come before those between. Of one batch the larger layer is
    worth more: the time that a model spends in a layer goes by the elements of its weight.
    """
    chosen = [LAYERS[name] for name in SETTING.layers or LAYERS]
    chosen.sort(key=lambda layer: -layer.in_features * layer.out_features)
    for dtype in DTYPES:
        for m in SETTING.tuned_rows:
            for one in chosen:
                sizes = one.out_features, one.in_features, m
                yield Layer(dtype, False, None, one.bias, *sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the table goes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    arguments = parser.parse_args()
    if lacking := SETTING.missing():
        sys.exit(lacking)
    watch()
    torch.manual_seed(0)
    device = torch.device(SETTING.device)
    path = arguments.folder / table.file_name(known.device_name(device) or str(device))
    wanted = list(dict.fromkeys(layers()))
    return command.tune(wanted, path, arguments.minutes, SETTING.clock(device).stopwatch)


if __name__ == "__main__":
    sys.exit(main())
