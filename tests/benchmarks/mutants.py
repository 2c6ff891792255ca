"""Bugs planted in benchmarks/, each with the tests that have to notice it."""

from mutant import Mutant

MUTANTS = [
    Mutant(
        "products that wait for one another are no fault",
        "benchmarks/without_gpu/compiled.py",
        '    if found["serialized"]:\n',
        '    if found["spilled"]:\n',
        ("tests/kernels/test_compile.py::test_serialised_products_are_a_fault",),
    ),
    Mutant(
        "loads before a barrier count as those behind it",
        "benchmarks/without_gpu/machine_code.py",
        "        late += barrier and name",
        "        late += name",
        ("tests/kernels/test_compile.py::test_machine_code_is_counted_by_step_and_tile",),
    ),
    Mutant(
        "kernels are looked for where they were compiled",
        "benchmarks/gpu_cache.py",
        "str(path.parent / one) for one in files",
        "files[one] for one in files",
        (
            "tests/benchmarks/test_gpu_cache.py::test_kernels_compiled_beforehand_are_found_in_another_folder",
        ),
    ),
    Mutant(
        "a wrong kernel is launched again",
        "benchmarks/gpu_run/summary.py",
        '        if row["verdict"] not in TRUSTED:\n            cut',
        '        if row["verdict"] == "hangs":\n            cut',
        ("tests/benchmarks/test_gpu.py::test_gpu_parts_are_told_what_to_leave_out",),
    ),
    Mutant(
        "a kernel that is split passes for one that is not",
        "benchmarks/shared/watch.py",
        "    marks = [mark for pointer, mark in _MARKS.items() if pointer in given]\n",
        "    marks: list[str] = []\n",
        ("tests/benchmarks/test_gpu_checks.py::test_planted_faults_are_found_and_named",),
    ),
    Mutant(
        "a kernel that was held up hangs",
        "benchmarks/gpu_run/families.py",
        " or try_some(rows, [name], 1, deadline, save):",
        " or True:",
        (
            "tests/benchmarks/test_gpu_checks.py::test_family_that_was_held_up_has_a_second_try_alone",
        ),
    ),
    Mutant(
        "a job that hangs is left to",
        "benchmarks/gpu_run/apart.py",
        "                    process.kill()\n                    del running",
        "                    del running",
        (
            "tests/benchmarks/test_gpu_checks.py::test_jobs_apart_end_by_themselves_or_when_their_time_is_over",
        ),
    ),
]
