"""Bugs planted in kernels/language/, each with the tests that have to notice it.

Those are the kernels' own: what is in language/ is compiled into them.
"""

from mutant import Mutant

FORWARD = ("tests/kernels/forward/test_forward.py",)
TOGETHER = (
    "tests/kernels/backward/test_backward.py::test_together_splits",
    "tests/kernels/backward/test_backward.py::test_together_batch_of_layers",
    "tests/kernels/backward/test_backward.py::test_together_two_layers_side_by_side",
)
ACTIVATED = ("tests/ops/test_activations.py::test_activation_is_as_exact_as_pytorch_s",)
ACTIVATED_BACKWARD = (
    "tests/ops/test_activations.py::test_activation_gradients_are_as_exact_as_pytorch_s",
)
PIECES = ("tests/kernels/test_float32.py",)
SPLIT_K = ("tests/kernels/forward/test_split_k.py",)

MUTANTS = [
    Mutant(
        "wrong stride: nested rows taken for evenly spaced",
        "kernels/language/indexing.py",
        "        return outer + (rows % matrix.inner_size) * matrix.stride_row",
        "        return rows * matrix.stride_row",
        ("tests/kernels/forward/test_forward.py::test_forward_takes_strided_input",),
    ),
    Mutant(
        "TF32 truncated instead of rounded",
        "kernels/language/precision.py",
        "rounded = round_to_nearest(tile, 13)\n",
        "rounded = (tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)\n",
        ("tests/kernels/forward/test_forward.py::test_forward_tf32_rounds_operands_to_nearest",),
    ),
    Mutant(
        "split sums: one split left out",
        "kernels/language/reduction.py",
        "for _ in range(slices):",
        "for _ in range(1, slices):",
        TOGETHER,
    ),
    Mutant(
        "counter not reset",
        "kernels/language/reduction.py",
        "tl.store(counter_ptr, 0)",
        "tl.store(counter_ptr, programs)",
        TOGETHER,
    ),
    Mutant(
        "the last but one to arrive taken for the last",
        "kernels/language/reduction.py",
        "== programs - 1",
        "== programs - 2",
        TOGETHER,
    ),
    Mutant(
        "each step replaces the last",
        "kernels/language/precision.py",
        "        acc += tl.dot(",
        "        acc = tl.dot(",
        FORWARD,
    ),
    Mutant(
        "float64 operands rounded to float32",
        "kernels/language/precision.py",
        "    if OPTIONS.upcast:\n        tile = tile.to(tl.float32)\n",
        "    if OPTIONS.upcast:\n"
        "        tile = tile.to(tl.float32)\n"
        "    if tile.dtype == tl.float64:\n"
        "        tile = tile.to(tl.float32).to(tl.float64)\n",
        FORWARD,
    ),
    Mutant(
        "one gelu for the other",
        "kernels/language/epilogue.py",
        "y = x * _normal_cdf(x)",
        "y = x * _sigmoids(_gelu_argument(x))[0]",
        ACTIVATED,
    ),
    Mutant(
        "silu's gradient without its slope",
        "kernels/language/epilogue.py",
        "result = grad * s * (1.0 + saved * rest)\n",
        "result = grad * s\n",
        ACTIVATED_BACKWARD,
    ),
    Mutant(
        "tanh without its series",
        "kernels/language/epilogue.py",
        "return tl.where(tl.abs(x) < 0.25, near, far)",
        "return far",
        ("tests/ops/test_activations.py::test_activation_of_extreme_values",),
    ),
    Mutant(
        "a counter is left where the last program found it",
        "kernels/language/reduction.py",
        "tl.store(counter_ptr, 0)",
        "tl.store(counter_ptr, programs)",
        SPLIT_K,
    ),
    Mutant(
        "the last program but one to arrive sums",
        "kernels/language/reduction.py",
        "== programs - 1",
        "== programs - 2",
        SPLIT_K,
    ),
    Mutant(
        "pieces: the product of the middle ones dropped",
        "kernels/language/precision.py",
        "        partial = tl.dot(a[1], b[1], partial)\n",
        "",
        PIECES,
    ),
    Mutant(
        "pieces: the third of one operand dropped",
        "kernels/language/precision.py",
        "        partial = tl.dot(a[0], b[2], partial)\n",
        "",
        PIECES,
    ),
    Mutant(
        "pieces: the largest product first",
        "kernels/language/precision.py",
        "        partial = tl.dot(a[2], b[0], fresh)\n"
        "        partial = tl.dot(a[0], b[2], partial)\n"
        "        partial = tl.dot(a[1], b[1], partial)\n"
        "        partial = tl.dot(a[1], b[0], partial)\n"
        "        partial = tl.dot(a[0], b[1], partial)\n"
        "        partial = tl.dot(a[0], b[0], partial)\n",
        "        partial = tl.dot(a[0], b[0], fresh)\n"
        "        partial = tl.dot(a[0], b[1], partial)\n"
        "        partial = tl.dot(a[1], b[0], partial)\n"
        "        partial = tl.dot(a[1], b[1], partial)\n"
        "        partial = tl.dot(a[0], b[2], partial)\n"
        "        partial = tl.dot(a[2], b[0], partial)\n",
        (
            "tests/kernels/test_float32.py::test_six_products_of_pieces_are_enough_the_smallest_first",
        ),
    ),
    Mutant(
        "pieces: of infinity, itself and zeros",
        "kernels/language/precision.py",
        "    return tl.where(is_moderate(tile), tile, tl.where(tile > 0, 1.0, -1.0))\n",
        "    return tile\n",
        ("tests/kernels/test_float32.py::test_pieces_pass_nan_and_infinity_on",),
    ),
    Mutant(
        "pieces: what an addition lost is not given back",
        "kernels/language/precision.py",
        "    term -= lost\n",
        "",
        ("tests/kernels/test_float32.py::test_additions_to_the_total_lose_nothing",),
    ),
    Mutant(
        "pieces: infinity has lost something",
        "kernels/language/precision.py",
        'tl.where(tl.abs(raised) < float("inf"), (raised - total) - term, 0.0)',
        "(raised - total) - term",
        ("tests/kernels/test_float32.py::test_pieces_pass_nan_and_infinity_on",),
    ),
    Mutant(
        "pieces: truncated instead of rounded",
        "kernels/language/precision.py",
        "        first = round_to_nearest(leading_piece(tile), 16)\n",
        "        first = as_bfloat16(leading_piece(tile), True)\n",
        (
            "tests/kernels/test_float32.py::test_six_products_of_pieces_are_enough_the_smallest_first",
        ),
    ),
]
