"""Bugs planted in fastlinear/conversion/, each with the tests that have to notice it."""

from mutant import Mutant

GATED_MLP = (
    "tests/conversion/test_gated_mlp.py",
    "tests/conversion/test_gated_mlp_changed.py",
)
FOLD_KEPT = ("tests/conversion/test_fold.py::test_what_is_not_folded_is_reported_with_the_reason",)
FOLD_AROUND = (
    "tests/conversion/test_fold.py::test_what_code_around_may_call_by_itself_is_not_folded",
)

MUTANTS = [
    Mutant(
        "a gated MLP calls the act_fn that it had",
        "fastlinear/conversion/gated_mlp.py",
        "            or self._fastlinear_gate[0] is not self.act_fn\n",
        "",
        GATED_MLP,
    ),
    Mutant(
        "an MLP with a decorated forward is gated",
        "fastlinear/conversion/gated_mlp.py",
        ' or hasattr(forward, "__wrapped__")',
        "",
        GATED_MLP,
    ),
    Mutant(
        "activation folded though it also follows something else",
        "fastlinear/conversion/fold.py",
        "if all(acts.get(before) is acts[layer] for before in",
        "if any(acts.get(before) is acts[layer] for before in",
        FOLD_KEPT,
    ),
    Mutant(
        "activation folded though its layer is also called without it",
        "fastlinear/conversion/fold.py",
        "after != {act}",
        "act not in after",
        FOLD_KEPT,
    ),
    Mutant(
        "activation folded though another variable keeps the output",
        "fastlinear/conversion/source.py",
        "[ast.unparse(target) for target in targets] == [name]",
        "targets",
        FOLD_KEPT,
    ),
    Mutant(
        "activation folded though a variable is read after the return",
        "fastlinear/conversion/source.py",
        "isinstance(node, _LATER) or",
        "",
        FOLD_KEPT,
    ),
    Mutant(
        "activations folded though code around calls their layers",
        "fastlinear/conversion/fold.py",
        "use.how != how",
        'use.how == ""',
        FOLD_AROUND,
    ),
    Mutant(
        "activations folded though a loop's variable is more than called",
        "fastlinear/conversion/source.py",
        "not in {*other, None}",
        "is not None",
        FOLD_AROUND,
    ),
    Mutant(
        "activations folded though code around hands on the module",
        "fastlinear/conversion/source.py",
        'return f"hands on {me}, and so all of its parts"',
        "continue",
        FOLD_AROUND,
    ),
    Mutant(
        "activations folded though code around asks for all parts",
        "fastlinear/conversion/source.py",
        'return f"asks for {name}"',
        "continue",
        FOLD_AROUND,
    ),
    Mutant(
        "activations folded past a decorator",
        "fastlinear/conversion/source.py",
        ' or hasattr(function, "__wrapped__")',
        "",
        ("tests/conversion/test_fold.py::test_code_that_cannot_be_read_folds_nothing",),
    ),
    Mutant(
        "a gated MLP past the forward that its class got later",
        "fastlinear/conversion/gated_mlp.py",
        "            or self._fastlinear_kind.forward is not self._fastlinear_forward[0]\n",
        "",
        GATED_MLP,
    ),
    Mutant(
        "layers converted past a forward set on nn.Linear",
        "fastlinear/conversion/convert.py",
        "if internals.linear_is_patched():",
        "if False:",
        ("tests/conversion/test_convert_others.py::test_a_forward_set_on_the_class_runs",),
    ),
    Mutant(
        "activation put back though a layer still applies it",
        "fastlinear/conversion/fold.py",
        "ready[act] == vars(act)[FOLD][1]",
        "ready[act] > 0",
        ("tests/conversion/test_fold.py::test_a_part_is_not_reverted_without_the_rest",),
    ),
]
