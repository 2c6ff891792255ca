"""Bugs planted in fastlinear/tuning/, each with the tests that have to notice it."""

from mutant import Mutant

TUNER = ("tests/tuning/test_tune.py",)
TUNE_MODEL = ("tests/tuning/test_tune_model.py", "tests/tuning/test_tune_processes.py")

MUTANTS = [
    Mutant(
        "one launch of both gradients that is slower than two wins",
        "fastlinear/tuning/measure.py",
        "[PYTORCH] if one == BY_ROWS else [other for other in walls if other != str(one)]",
        "[PYTORCH]",
        TUNER,
    ),
    Mutant(
        "a kernel that callers wait longer for wins",
        "fastlinear/tuning/measure.py",
        "    slower = any(faster(clock[other], clock[one]) for clock in clocks)\n",
        "    slower = faster(times[other], times[one])\n",
        (
            "tests/tuning/test_tune.py::test_kernel_wins_if_it_is_faster_on_one_clock_and_slower_on_none",
        ),
    ),
    Mutant(
        "an inexact kernel wins",
        "fastlinear/tuning/measure.py",
        "            if as_exact(computed(), theirs, exact, most):\n",
        "            if as_exact(computed(), theirs, exact, most) or call.m:\n",
        ("tests/tuning/test_tune.py::test_inexact_kernel_cannot_win",),
    ),
    Mutant(
        "another process's rows are lost",
        "fastlinear/choice/table.py",
        "rows = self._read()[0] | {row.key: row}",
        "rows = {row.key: row}",
        TUNER,
    ),
    Mutant(
        "tune leaves gradients",
        "fastlinear/_unchanged.py",
        '            at_the_end.callback(setattr, tensor, "grad", gradient)\n',
        "",
        TUNE_MODEL,
    ),
    Mutant(
        "tune moves buffers",
        "fastlinear/_unchanged.py",
        "            tensor.copy_(value)\n",
        "            pass\n",
        TUNE_MODEL,
    ),
    Mutant(
        "tune draws random numbers",
        "fastlinear/_unchanged.py",
        "        at_the_end.enter_context(torch.random.fork_rng(sorted(devices)))\n",
        "",
        TUNE_MODEL,
    ),
]
