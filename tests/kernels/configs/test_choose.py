"""The model of times: what it must get right, and how close it comes to what was measured."""

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlinear.kernels.configs import choose as chooser
from fastlinear.kernels.configs import model
from fastlinear.kernels.configs.choose import choose, choose_splits, ranked
from fastlinear.kernels.configs.config import INTERPRETER, TARGETS, Config, Kernel, Kind, Traits
from fastlinear.kernels.configs.model import modelled_time

ROOT = Path(__file__).parents[3]
SM_90 = TARGETS["sm_90"]
ALIGNED = Traits(torch.bfloat16, "ieee", True, SM_90)
MEASURED = ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json"
# What the other kinds ship is theirs to say; these are like it.
GEMV = Config(1, 4, 1024, num_warps=4, num_stages=1, kind="gemv")
SPLIT_K = Config(16, 64, 128, num_warps=4, num_stages=5, kind="split_k")
PERSISTENT = Config(128, 256, 64, num_warps=8, num_stages=4, kind="persistent", epilogue_parts=4)
KINDS = {"gemv": GEMV, "split_k": SPLIT_K, "persistent": PERSISTENT}
INTERPRETED = {
    "gemv": Config(4, 64, 64, num_warps=1, num_stages=1, kind="gemv"),
    "split_k": Config(32, 32, 16, num_warps=1, num_stages=1, kind="split_k", splits=3),
    "persistent": Config(32, 32, 32, num_warps=1, num_stages=1, kind="persistent"),
}


@pytest.fixture
def all_kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One configuration of every kind is legal, beside the tiles."""
    legal = chooser.legal_configs

    def with_others(kernel: Kernel, traits: Traits, kind: Kind) -> tuple[Config, ...]:
        if kind == "tiled":
            return legal(kernel, traits, kind)
        if kernel != "forward" or (kind == "persistent" and not traits.descriptors):
            return ()
        return (INTERPRETED[kind] if traits.target is INTERPRETER else KINDS[kind],)

    monkeypatch.setattr(chooser, "legal_configs", with_others)
    ranked.cache_clear()
    yield
    ranked.cache_clear()


def measured_rows() -> Iterator[tuple[dict[str, Any], tuple[Any, ...], bool]]:
    """Each row of the H100's times, what `choose` is given for it, and if weight is transposed."""
    for row in json.loads(MEASURED.read_text())["rows"]:
        if row["part"] == "time":
            m, n, k = row["m"], row["n"], row["k"]
            if row["product"] == "grad_input":
                n, k = k, n
            kernel: Kernel = "backward_weight" if row["product"] == "grad_weight" else "forward"
            dtype = torch.bfloat16 if row["dtype"] == "bfloat16" else torch.float32
            precision = "tf32" if row["dtype"] == "tf32" else "ieee"
            given = (kernel, 1, m, n, k, Traits(dtype, precision, True, SM_90))
            yield row, given, row["product"] == "grad_input"


def config_of(text: str) -> Config:
    return Config(**{name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)})


def test_choice_is_as_close_to_the_best_as_its_docstring_says() -> None:
    shares: dict[str, list[float]] = defaultdict(list)
    for row, given, transposed in measured_rows():
        times = {
            config_of(name): statistics.median(times) for name, times in row["kernel_us"].items()
        }
        choices = ranked(*given, reads_outputs=transposed)
        # Among those that were measured: other kinds came later.
        chosen = next(choice.config for choice in choices if choice.config in times)
        shares[row["dtype"]].append(min(times.values()) / times[chosen])
    means = {dtype: statistics.geometric_mean(share) for dtype, share in shares.items()}
    worst = {dtype: min(share) for dtype, share in shares.items()}
    assert means["bfloat16"] > 0.99
    assert means["float32"] > 0.975
    assert means["tf32"] > 0.96
    assert worst["bfloat16"] > 0.91
    assert worst["float32"] > 0.76
    assert worst["tf32"] > 0.62


def test_modelled_times_are_as_close_as_the_module_says() -> None:
    errors: dict[str, list[float]] = defaultdict(list)
    for row, given, transposed in measured_rows():
        kernel, *sizes, traits = given
        for name, times in row["kernel_us"].items():
            config = config_of(name)
            splits = choose_splits(config, *sizes, SM_90)
            time = modelled_time(
                kernel,
                config,
                *sizes,
                traits,
                transposed,
                splits if kernel == "backward_weight" else 1,
            )
            errors[row["dtype"]].append(abs(math.log(time / statistics.median(times))))
    medians = {dtype: statistics.median(error) for dtype, error in errors.items()}
    assert medians["bfloat16"] < 0.095
    assert medians["float32"] < 0.075
    assert medians["tf32"] < 0.165


def forward_choice(m: int, n: int, k: int, transposed: bool = False, **how: Any) -> Config:
    dtype = how.get("dtype", torch.bfloat16)
    target = how.get("target", SM_90)
    traits = Traits(dtype, "ieee", True, target, descriptors=how.get("descriptors", True))
    return choose("forward", 1, m, n, k, traits, transposed)


@pytest.mark.usefixtures("all_kinds")
def test_rows_decide_the_kind() -> None:
    assert forward_choice(16, 1024, 8192).kind == "split_k"
    assert forward_choice(4096, 4096, 4096).kind == "persistent"
    assert forward_choice(4096, 4096, 4096, descriptors=False).kind == "tiled"
    assert forward_choice(1, 768, 3072).kind == "gemv"
    assert forward_choice(1, 768, 3072, transposed=True).kind != "gemv", (
        "its four neighbouring outputs would be read 8 bytes at a time"
    )


@pytest.mark.usefixtures("all_kinds")
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_splits_fill_the_gpu_with_four_steps_each(target: Any) -> None:
    chosen = forward_choice(16, 1024, 8192, target=target)
    assert chosen.kind == "split_k"
    programs = 1024 // chosen.block_n * chosen.splits
    assert programs <= 2 * target.multiprocessors
    assert programs > target.multiprocessors / 2 or chosen.splits * 4 == 8192 // chosen.block_k
    assert 8192 // chosen.block_k // chosen.splits >= 4


@pytest.mark.usefixtures("all_kinds")
def test_every_kind_is_reached_in_the_interpreter() -> None:
    reached = {
        forward_choice(m, n, k, dtype=dtype, target=INTERPRETER, descriptors=described).kind
        for m in (1, 4, 33, 64, 100, 200)
        for n, k in ((10, 20), (33, 40), (64, 128), (96, 200))
        for dtype in (torch.float16, torch.float32)
        for described in (dtype == torch.float16,)
    }
    assert reached == {"tiled", *KINDS}
    assert all(
        forward_choice(m, 33, 40, dtype=torch.float32, target=INTERPRETER).kind == "gemv"
        for m in (1, 2, 3, 4)
    )


def test_more_work_takes_more_time() -> None:
    def time(m: int, n: int, k: int) -> float:
        return ranked("forward", 1, m, n, k, ALIGNED)[0].microseconds

    for smaller, larger in (
        ((64, 4096, 4096), (4096, 4096, 4096)),
        ((1, 512, 512), (1, 8192, 8192)),
    ):
        assert time(*smaller) < time(*larger)
    # 2 * 4096**3 operations at the data sheet's 989 TFLOP/s, and 64 MiB at 3350 GB/s.
    assert time(4096, 4096, 4096) > 139
    assert time(1, 8192, 4096) > 20


def test_shipped_residents_are_those_of_the_compiled_kernels() -> None:
    from benchmarks import resources
    from benchmarks.without_gpu.ahead_of_time import cases
    from benchmarks.without_gpu.case import GPU_TARGETS

    compiled = json.loads(resources.COMMITTED.read_text())["cases"]
    shipped = json.loads(resources.SHIPPED.read_text())
    expected = resources.residents(compiled, cases(list(GPU_TARGETS)))
    assert expected == shipped
    assert len(expected["sm_90"]) > 50
    one = model.resident_key("forward", "16-bit", Config(128, 256, 64, 8, 3), True)
    assert expected["sm_90"][one] == 1


def test_residents_of_a_kernel_that_was_not_compiled_are_estimated() -> None:
    def residents(config: Config, **how: Any) -> int:
        return model.resident_programs("forward", config, ALIGNED)

    assert residents(Config(128, 256, 64, num_warps=8, num_stages=4)) == 1
    assert 1 < residents(Config(32, 32, 64, num_warps=4, num_stages=2)) <= 16
    assert residents(GEMV) > 1


def test_predictions_stand_beside_what_was_measured(tmp_path: Path) -> None:
    from benchmarks import predict

    rows = predict.predictions(predict.Measured(MEASURED))
    assert [row["target"] for row in rows] == [0.97, *[0.85] * 5, 2.0, 2.0]
    assert all(row["predicted"] > 0 for row in rows)
    assert rows[0]["predicted"] == pytest.approx(rows[0]["measured"] or 0.85, abs=0.15)
    assert rows[-1]["predicted"] > rows[-2]["predicted"], "products of pieces are worth while"
    assert "not measured" in predict.table(predict.predictions(predict.Measured(tmp_path / "none")))


def test_splits_count_tiles_that_are_not_square() -> None:
    config = Config(64, 128, 64, num_warps=8, num_stages=3)  # 8 x 8 tiles of 1024 x 512
    assert choose_splits(config, 1, 2**14, 1024, 512, TARGETS["sm_90"]) == 132 // 64
