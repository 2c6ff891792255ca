"""The property of every call, for some cases that are drawn anew in each run."""

import pytest
from cases import FUNCTIONS, Case, cases
from hypothesis import HealthCheck, Phase, example, given, note, settings
from properties import check

# max_examples of each function. All is said here, since torch's test helpers load a profile of
# hypothesis of their own, and CI has another.
fresh = settings(
    max_examples=20,
    derandomize=False,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),  # to explain a failure takes minutes
)


# Where float16 overflows all the same, of which the bounds know, numpy says so.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_calls_are_near_float64_and_keep_their_promises(function: str) -> None:
    @fresh
    @given(cases(function))
    def property(case: Case) -> None:
        note(f"repeat with: python tests/fuzz.py --case '{case}'")
        check(case)

    property()


@given(cases("linear") | cases("batched_linear") | cases("gated_linear"))
@example(Case())
@fresh
def test_a_case_is_made_again_from_its_line(case: Case) -> None:
    assert Case.parse(str(case)) == case
