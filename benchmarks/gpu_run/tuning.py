"""Tunes the layers of benchmarks/shared/shapes.py into a table that can be shipped.

`python -m benchmarks.gpu_run.tuning --folder FOLDER` writes FOLDER/<device>.json as `python -m
fastlinear tune` does, after each product, under the name that it has in kernels/tuned/.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.shared.setting import SETTING
from benchmarks.shared.shapes import LAYERS
from benchmarks.shared.watch import watch
from fastlinear.choice import table
from fastlinear.choice.table import Key
from fastlinear.tuning.tune import measure_all

DTYPES = (torch.bfloat16, torch.float32)


def calls() -> Iterator[Key]:
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
                yield table.call(dtype, one.bias, *sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the table goes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    arguments = parser.parse_args()
    if lacking := SETTING.missing():
        sys.exit(lacking)
    watch()
    torch.manual_seed(0)
    os.environ["FASTLINEAR_CACHE"] = str(arguments.folder)
    device, deadline = torch.device(SETTING.device), time.monotonic() + 60 * arguments.minutes
    wanted = {call: call.m for call in calls()}
    try:
        finished = measure_all(wanted, device, deadline, SETTING.clock(device).stopwatch)
    except OSError as error:
        sys.exit(str(error))
    print("all is measured" if finished else "out of time; the same command goes on from here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
