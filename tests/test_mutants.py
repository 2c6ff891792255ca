"""Planted bugs can be planted: `make mutation` is too slow to find out at its end."""

from collections import Counter

from mutant import ROOT, planted


def test_planted_bugs_have_a_line_to_change_and_tests_to_notice() -> None:
    for mutant in planted():
        assert mutant.times() == 1, mutant
        assert mutant.new != mutant.old, mutant
        assert mutant.tests, mutant
        for file, _, name in (test.partition("::") for test in mutant.tests):
            assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), mutant


def test_planted_bugs_have_names_of_their_own() -> None:
    counted = Counter(mutant.name for mutant in planted())
    assert not [name for name, times in counted.items() if times > 1]
