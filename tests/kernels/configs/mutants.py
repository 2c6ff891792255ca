"""Bugs planted in kernels/configs/, each with the tests that have to notice it."""

from mutant import Mutant

TABLES = (
    "tests/choice/test_tables.py",
    "tests/choice/test_auto.py",
)
PIECES = ("tests/kernels/test_float32.py",)

MUTANTS = [
    Mutant(
        "64-bit offsets take no registers",
        "kernels/configs/legality.py",
        "_MOST_OF_FAR_PLAIN if traits.wide and",
        "_MOST_OF_FAR_PLAIN if False and",
        ("tests/kernels/configs/test_configs.py",),
    ),
    Mutant(
        "batch invariance: the configuration goes by how far rows lie apart",
        "kernels/configs/choose.py",
        "aligned=False, descriptors=False, wide=False",
        "aligned=False, descriptors=False",
        (
            "tests/choice/test_batch_invariant.py::test_default_mode_chooses_by_the_batch_and_this_one_does_not",
        ),
    ),
    Mutant(
        "batch invariance: the configuration goes by the rows",
        "kernels/configs/choose.py",
        "batch, m = 1, INVARIANT_ROWS",
        "batch = 1",
        (
            "tests/choice/test_batch_invariant.py::test_default_mode_chooses_by_the_batch_and_this_one_does_not",
        ),
    ),
    Mutant(
        "a row of more warps than a program can have is legal",
        "kernels/configs/legality.py",
        "    if config.num_warps > most:\n",
        "    if config.num_warps < 1:\n",
        TABLES,
    ),
    Mutant(
        "float32's products are others' too",
        "kernels/configs/config.py",
        "    if dtype != torch.float32:\n",
        "    if dtype == torch.float64:\n",
        PIECES,
    ),
    Mutant(
        "the shorter programs of one launch start first in the model",
        "kernels/configs/choose_pair.py",
        "    return of_input > of_weight\n",
        "    return of_input < of_weight\n",
        ("tests/kernels/configs/test_configs.py",),
    ),
    Mutant(
        "residents of a multiprocessor left out of the model",
        "kernels/configs/model.py",
        "        resident = resident_programs(kernel, config, traits)\n",
        "        resident = 1\n",
        ("tests/kernels/configs/test_choose.py",),
    ),
    Mutant(
        "pieces: for short sums too",
        "kernels/configs/config.py",
        " and many and terms >= LONG_SUM",
        " and many",
        PIECES,
    ),
    Mutant(
        "pieces: parts of a long sum are short",
        "kernels/configs/choose.py",
        'm // (LONG_SUM if precision == "bf16x6" else 4 * config.block_m)',
        "m // (4 * config.block_m)",
        PIECES,
    ),
]
