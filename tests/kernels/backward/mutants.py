"""Bugs planted in kernels/backward/, each with the tests that have to notice it."""

from mutant import Mutant

BACKWARD = ("tests/kernels/backward/test_backward.py",)
BATCHED = ("tests/ops/test_batched.py",)
TOGETHER = (
    "tests/kernels/backward/test_backward.py::test_together_splits",
    "tests/kernels/backward/test_backward.py::test_together_batch_of_layers",
    "tests/kernels/backward/test_backward.py::test_together_two_layers_side_by_side",
)
IN_ANY_ORDER = (
    "tests/kernels/backward/test_backward.py::test_together_gives_the_same_bits_whichever_program_comes_last",
)
ACTIVATED_BACKWARD = (
    "tests/ops/test_activations.py::test_activation_gradients_are_as_exact_as_pytorch_s",
)
GATED = ("tests/ops/test_gated.py::test_gated_values_and_gradients_are_as_exact_as_pytorch_s",)
PIECES = ("tests/kernels/test_float32.py",)
MAIN_GRAD = ("tests/api/test_main_grad.py",)
NO_ROOM = ("tests/api/test_faults.py::test_without_memory_for_parts_no_sum_is_split",)
READS_BACKWARD = ("tests/kernels/test_numbers.py::test_backward_reads_nothing_beside_its_operands",)

MUTANTS = [
    Mutant(
        "store mask dropped, grad_weight",
        "kernels/backward/grad_weight_tile.py",
        "mask_tile = mask_n[:, None] & mask_k[None, :]",
        "mask_tile = mask_n[:, None] & (offs_k >= 0)[None, :]",
        BACKWARD,
    ),
    Mutant(
        "rows past a split's last are counted",
        "kernels/backward/grad_weight_tile.py",
        "mask_m = offs_m < last_row",
        "mask_m = offs_m < M + BLOCK_M",
        BACKWARD,
    ),
    Mutant(
        "grad_bias counted twice",
        "kernels/backward/grad_weight_tile.py",
        "acc_bias += tl.sum(grad_output_tile, axis=1)",
        "acc_bias += 2 * tl.sum(grad_output_tile, axis=1)",
        BACKWARD,
    ),
    Mutant(
        "grad_bias by a product, summed over its columns",
        "kernels/backward/grad_weight_tile.py",
        "tl.max(acc_bias, axis=1)",
        "tl.sum(acc_bias, axis=1)",
        BACKWARD,
    ),
    Mutant(
        "batch stride of the input ignored, grad_weight",
        "kernels/backward/grad_weight_tile.py",
        "input.ptr + batch * input.stride_batch",
        "input.ptr + batch * 0 * input.stride_batch",
        BATCHED,
    ),
    Mutant(
        "split sums: slices taken from the wrong stride",
        "kernels/backward/grad_weight_tile.py",
        "mask, splits, layers * N * K)",
        "mask, splits, as_offset(N, OPTIONS) * K)",
        TOGETHER,
    ),
    Mutant(
        "main_grad: written over",
        "kernels/backward/grad_weight_tile.py",
        "there + parts[half]",
        "parts[half]",
        MAIN_GRAD,
    ),
    Mutant(
        "main_grad: one half of a tile twice",
        "kernels/backward/grad_weight_tile.py",
        "there + parts[half]",
        "there + parts[0]",
        MAIN_GRAD,
    ),
    Mutant(
        "main_grad: split sums written over it",
        "kernels/backward/grad_weight_tile.py",
        "total += tl.load(grad_weight_ptr + offs, mask=mask, other=0.0)",
        "pass",
        ("tests/api/test_main_grad.py::test_the_kernels_add_unrounded_sums",),
    ),
    Mutant(
        "split sums: only the first rows of a tile",
        "kernels/backward/grad_weight_tile.py",
        "for row in range(0, BLOCK_N, SUM_ROWS):",
        "for row in range(0, SUM_ROWS, SUM_ROWS):",
        TOGETHER,
    ),
    Mutant(
        "split sums: one counter for the tiles of all layers",
        "kernels/backward/grad_weight_tile.py",
        "counter_ptr + pid % (tiles * batches)",
        "counter_ptr + pid % tiles",
        TOGETHER,
    ),
    Mutant(
        "split sums: grad_bias by the columns that have none",
        "kernels/backward/grad_weight_tile.py",
        "if tile_k == 0:\n                    offs = batch * N + offs_n",
        "if tile_k > 0:\n                    offs = batch * N + offs_n",
        IN_ANY_ORDER,
    ),
    Mutant(
        "grad_bias stored by every column",
        "kernels/backward/grad_weight_tile.py",
        "        if tile_k == 0:\n            # The 16",
        "        if tile_k >= 0:\n            # The 16",
        TOGETHER,
    ),
    Mutant(
        "grad_input's programs start one late",
        "kernels/backward/grouped.py",
        "            pid - weight_programs,",
        "            pid - weight_programs + 1,",
        TOGETHER,
    ),
    Mutant(
        "second layer's gradient read where the first's is",
        "kernels/backward/grouped.py",
        "grad_output.ptr + as_offset(N, OPTIONS) * grad_output.stride_column",
        "grad_output.ptr",
        TOGETHER,
    ),
    Mutant(
        "splits overlap by a block",
        "kernels/backward/grad_weight_tile.py",
        "last_row = min(first_row + rows_per_split, M)",
        "last_row = min(first_row + rows_per_split + BLOCK_M, M)",
        ("tests/kernels/backward/test_backward.py::test_backward_matches_float64",),
    ),
    Mutant(
        "activation's gradient left out of the pass",
        "kernels/backward/elementwise.py",
        "result = activation_gradient(grad.to(ACC_DTYPE), saved.to(ACC_DTYPE), ACTIVATION)",
        "result = grad.to(ACC_DTYPE)",
        ACTIVATED_BACKWARD,
    ),
    Mutant(
        "gate's gradient without up",
        "kernels/backward/elementwise.py",
        "activation_gradient(grad * up, differentiated, ACTIVATION)",
        "activation_gradient(grad, differentiated, ACTIVATION)",
        GATED,
    ),
    Mutant(
        "slope of tanh taken from the gate itself",
        "kernels/backward/elementwise.py",
        "differentiated = activated if FROM_OUTPUT else gate\n",
        "differentiated = gate\n",
        ("tests/ops/test_gated.py::test_gated_activation",),
    ),
    Mutant(
        "weights that lie differently read alike",
        "kernels/backward/gated.py",
        "if gate_weight.stride() != up_weight.stride():",
        "if False:",
        ("tests/ops/test_gated.py::test_gated_operands_of_every_stride",),
    ),
    Mutant(
        "pieces: grad_weight's go by the inputs",
        "kernels/backward/grad_weight_problem.py",
        "grad_output.shape[-1], rows.size, target)",
        "grad_output.shape[-1], input.shape[-1], target)",
        PIECES,
    ),
    Mutant(
        "pieces: one launch forms grad_weight as grad_input",
        "kernels/backward/linear.py",
        "agreed = alone or resolved == of_weight.precision",
        "agreed = True",
        PIECES,
    ),
    Mutant(
        "pieces: the rows decide about a gated pair's grad_input within batch_invariant()",
        "kernels/backward/linear.py",
        'if batch_invariant and precision == "long bf16x6":',
        "if False:",
        PIECES,
    ),
    Mutant(
        "pieces: grad_weight is what its additions lost",
        "kernels/backward/grad_weight_tile.py",
        "acc = total_of(acc, OPTIONS)",
        'acc = acc[1] if OPTIONS.precision == "bf16x6" else total_of(acc, OPTIONS)',
        PIECES,
    ),
    Mutant(
        "inputs past the last are read, and not stored, grad_weight",
        "kernels/backward/grad_weight_tile.py",
        "mask=mask_m[:, None] & mask_k[None, :], other=0.0",
        "mask=mask_m[:, None] & (offs_k >= 0)[None, :], other=0.0",
        READS_BACKWARD,
    ),
    Mutant(
        "no memory for parts: grad_weight is split all the same",
        "kernels/backward/grad_weight.py",
        "return plan_backward_weight(operands, bias, batched, precision, config, 1).launch",
        "return plan_backward_weight(operands, bias, batched, precision, config, 2).launch",
        NO_ROOM,
    ),
]
