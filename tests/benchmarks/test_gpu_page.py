"""The page that `make gpu` writes."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from gpu_runs import part, point, write


def test_page_has_what_is_wrong_then_new_then_ratios_worst_points_and_commands(
    gpu: ModuleType, tmp_path: Path
) -> None:
    points = [
        point(shape="a", ratio=0.5),
        point(shape="b", ratio=2.0),
        *(point(shape=f"c{index}", batch_size=1, ratio=3.0 + index) for index in range(20)),
        point(arm="torch.compile", ratio=0.1),
        point(arm="nn.Linear"),
        point(dtype="float32", precision="high", mode="backward", activation="gelu"),
    ]
    fault = {"product": "linear_forward", "config": "chosen", "fault": "off by 1"}
    dropped = [{"arm": "fastlinear triton", "dtype": "float16", "reason": "wrong"}] * 2
    dropped += [{"arm": "quack", "dtype": "float32", "reason": "no such layer"}]
    tried = [
        {"family": family, "new": new, "verdict": verdict, "said": "so", "launches": ["k"]}
        for family, new, verdict in (
            ("gemv", True, "hangs"), ("pair", True, "right"), ("tiles", False, "right"),
        )
    ]  # fmt: skip
    time = {"product": "backward", "dtype": "tf32", "m": 64, "n": 3, "k": 4, "chosen": "None"}
    time |= {"native_us": [6.0, 8.0, 7.0], "kernel_us": {"None": [2.0]}, "failed": {"c": "no"}}
    write(
        tmp_path,
        linear={"points": points, "dropped": dropped},
        numerics={"rows": [fault], "complete": True},
        kernels={"rows": [time]},
        families={"environment": {"device": "NVIDIA H200"}, "rows": tried},
    )
    (tmp_path / "nvidia-h200.json").write_text('{"fastlinear": "0.1.0"}')
    page = gpu.summary(tmp_path)
    words = "FAILURES: 5", "NEW", "RATIOS", "WORST TEN POINTS", "TO COMMIT IT", "PARTS"
    places = [page.index(word) for word in words]
    assert places == sorted(places)
    assert "gemv: hangs: so" in page[: places[1]]
    assert "left out since: k" in page[: places[1]]
    assert "times: backward, tf32, M = 64, c: no" in page[: places[1]]
    assert "hangs: gemv\nright: pair\n" in page[places[1] : places[2]]
    row = next(line for line in page.splitlines() if line.startswith("fastlinear kernel, tf32"))
    assert row.split()[-3:] == ["backward", "-", "3.50"]
    assert "cp " + str(tmp_path / "nvidia-h200.json") + " kernels/tuned/nvidia-h200.json" in page
    added = page[page.index("git add ") :].splitlines()[0].split()[2:]
    folder = "benchmarks/results/nvidia-h200"
    assert added == [
        *(f"{folder}/{name}.json" for name in ("families", "numerics", "kernels", "linear")),
        "kernels/tuned/nvidia-h200.json",
    ]
    assert "numerics: linear_forward, chosen: off by 1" in page
    assert "sweep: fastlinear triton dropped 2 times in float16: wrong" in page[: places[1]]
    assert "sweep: quack dropped 1 times in float32: no such layer" in page[places[-1] :]
    row = next(line for line in page.splitlines() if line.startswith("fastlinear auto, bfloat16"))
    assert row.split()[-1] == "1.00", "the geometric mean of 0.5 and 2"
    assert "fastlinear auto, float32 high, backward" in page
    listed = page[places[3] : places[4]].strip().splitlines()[1:]
    assert len(listed) == 10
    assert listed[0].startswith("0.50 (0.90 to 1.10)  fastlinear auto, a, batch 64")
    assert "torch.compile" not in page[places[3] :], "only what is ours is to be made faster"


def test_page_without_results_says_so(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "linear.json").write_text('{"points": [')  # as a kill may leave it
    page = gpu.summary(tmp_path)
    assert "FAILURES: none" in page
    assert "nothing has been measured" in page
    assert "nothing is to be committed" in page


def test_page_that_cannot_be_made_ends_no_run(
    gpu: ModuleType, run: Callable[..., int], tmp_path: Path
) -> None:
    parts = [
        part(gpu, "writes", f"open({str(tmp_path / 'out' / 'linear.json')!r}, 'w').write('[1]')"),
        part(gpu, "breaks", "print('on')"),
    ]
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", linear={"points": [{"ratio": 1.0}]})
    assert run(parts[1:]) == 1
    assert "no summary could be made: KeyError" in (tmp_path / "out" / "summary.txt").read_text()
    assert run(parts) == 0, "a file that is no such thing counts as none"


def test_page_says_that_not_all_was_checked(gpu: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, numerics={"rows": [{"product": "linear_forward"}] * 7, "complete": False})
    assert "numerics: not all was checked, but 7 cases were" in gpu.summary(tmp_path)


def test_page_keeps_under_its_limit(gpu: ModuleType, tmp_path: Path) -> None:
    fault = {"product": "linear_forward", "fault": "x" * 1000}
    many = [
        point(arm=f"fastlinear {arm} {'y' * 90}", batch_size=2**size, shape="z" * 300)
        for arm in range(60)
        for size in range(16)
    ]
    ended = {"status": "failed", "exit": 1, "last": "w" * 200, "findings": ["v" * 300] * 50}
    runs = {f"part {index}": ended for index in range(12)}
    wrong = {"family": "u" * 90, "new": True, "verdict": "wrong", "said": "", "launches": []}
    files = {"families": {"rows": [wrong] * 90}, "numerics": {"rows": [fault] * 500}}
    write(tmp_path, **files, linear={"points": many}, run=runs)
    page = gpu.summary(tmp_path)
    assert len(page) < 12_000
    assert "more" in page
    assert "WORST TEN POINTS" in page
