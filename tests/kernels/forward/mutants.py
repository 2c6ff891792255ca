"""Bugs planted in kernels/forward/, each with the tests that have to notice it."""

from mutant import Mutant

FORWARD = ("tests/kernels/forward/test_forward.py",)
ACTIVATED_BACKWARD = (
    "tests/ops/test_activations.py::test_activation_gradients_are_as_exact_as_pytorch_s",
)
GATED = ("tests/ops/test_gated.py::test_gated_values_and_gradients_are_as_exact_as_pytorch_s",)
PIECES = ("tests/kernels/test_float32.py",)
SPLIT_K = ("tests/kernels/forward/test_split_k.py",)
GEMV = ("tests/kernels/forward/test_gemv.py",)
PERSISTENT = ("tests/kernels/forward/test_persistent.py",)
NO_ROOM = ("tests/api/test_faults.py::test_without_memory_for_parts_no_sum_is_split",)
READS = ("tests/kernels/test_numbers.py::test_forward_reads_nothing_beside_its_operands",)
READS_GATED = (
    "tests/kernels/test_numbers.py::test_a_gated_pair_reads_nothing_beside_its_operands",
)

MUTANTS = [
    Mutant(
        "store mask dropped, forward",
        "kernels/forward/tiled.py",
        "    mask = mask_m[:, None] & mask_n[None, :]\n",
        "    mask = mask_m[:, None] & (offs_n >= 0)[None, :]\n",
        FORWARD,
    ),
    Mutant(
        "other= missing on the K tail",
        "kernels/forward/tiled.py",
        "mask=mask_k[:, None] & mask_n[None, :], other=0.0)",
        "mask=mask_k[:, None] & mask_n[None, :])",
        FORWARD,
    ),
    Mutant(
        "load mask dropped on the K tail",
        "kernels/forward/tiled.py",
        "mask=mask_m[:, None] & mask_k[None, :], other=0.0)",
        "mask=mask_m[:, None] & (offs_k >= 0)[None, :], other=0.0)",
        FORWARD,
    ),
    Mutant(
        "bias dropped on the last block",
        "kernels/forward/tiled.py",
        "acc += load_bias(bias, batch, offs_n, mask_n).to(acc.dtype)[None, :]",
        "of_bias = load_bias(bias, batch, offs_n, mask_n).to(acc.dtype)\n"
        "        acc += tl.where(tile_n == column_tiles - 1, 0.0, of_bias)[None, :]",
        FORWARD,
    ),
    Mutant(
        "bias added after rounding",
        "kernels/forward/tiled.py",
        "acc += load_bias(bias, batch, offs_n, mask_n).to(acc.dtype)[None, :]",
        "of_bias = load_bias(bias, batch, offs_n, mask_n).to(acc.dtype)\n"
        "        acc = acc.to(output_ptr.dtype.element_ty).to(acc.dtype) + of_bias[None, :]",
        ("tests/kernels/forward/test_forward.py::test_forward_adds_bias_before_rounding",),
    ),
    Mutant(
        "transposed weight taken for rows, persistent",
        "kernels/forward/persistent.py",
        '"WEIGHT_TRANSPOSED": transposed_in_memory(n, k, problem.weight, itemsize)',
        '"WEIGHT_TRANSPOSED": False',
        PERSISTENT,
    ),
    Mutant(
        "every step of K is the first, persistent",
        "kernels/forward/persistent.py",
        "load_tile(input_descriptor, first_m, k * BLOCK_K, INPUT_TRANSPOSED)",
        "load_tile(input_descriptor, first_m, 0, INPUT_TRANSPOSED)",
        PERSISTENT,
    ),
    Mutant(
        "all parts of a tile get the first one's bias",
        "kernels/forward/persistent.py",
        "load_bias(bias, 0, offs_n, offs_n < N)",
        "load_bias(bias, 0, offs_n - part * COLUMNS, offs_n < N)",
        PERSISTENT,
    ),
    Mutant(
        "last tile skipped, persistent",
        "kernels/forward/persistent.py",
        "        row_tiles * column_tiles,\n        tl.num_programs(0),",
        "        row_tiles * column_tiles - 1,\n        tl.num_programs(0),",
        PERSISTENT,
    ),
    Mutant(
        "row mask dropped, persistent",
        "kernels/forward/persistent.py",
        "mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]",
        "mask = (offs_m >= 0)[:, None] & (offs_n < N)[None, :]",
        PERSISTENT,
    ),
    Mutant(
        "wrong stride: input's columns taken for contiguous",
        "kernels/forward/tiled.py",
        "    input_offs += offs_k[None, :] * input.stride_column\n",
        "    input_offs += offs_k[None, :]\n",
        ("tests/kernels/forward/test_forward.py::test_forward_takes_strided_input",),
    ),
    Mutant(
        "batch stride of the bias ignored",
        "kernels/language/epilogue.py",
        "bias.ptr + batch * bias.stride_batch",
        "bias.ptr",
        ("tests/kernels/forward/test_forward.py::test_forward_batch_of_layers",),
    ),
    Mutant(
        "existing output kept",
        "kernels/forward/tiled.py",
        "    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=accumulator_of(input.ptr).dtype)\n",
        "    acc = tl.load(output_ptr + tl.zeros((BLOCK_M, BLOCK_N), tl.int32))\n"
        "    acc = acc.to(accumulator_of(input.ptr).dtype)\n",
        FORWARD,
    ),
    Mutant(
        "offsets of a far bias in 32 bits",
        "kernels/forward/linear.py",
        "launch.wide(rows.operand, weight, bias, output)",
        "launch.wide(rows.operand, weight, output)",
        ("tests/kernels/forward/test_forward.py::test_forward_chooses_offsets_by_every_operand",),
    ),
    Mutant(
        "output saved for the pre-activation",
        "kernels/language/epilogue.py",
        "store_rounded(preactivation_ptr + offs, acc, mask)",
        "store_rounded(preactivation_ptr + offs, activate(acc, OPTIONS.activation), mask)",
        ACTIVATED_BACKWARD,
    ),
    Mutant(
        "up's bias added to the gate",
        "kernels/forward/gated.py",
        "        up += load_bias(",
        "        gate += load_bias(",
        GATED,
    ),
    Mutant(
        "grad_input of the gate alone",
        "kernels/forward/tiled.py",
        "    if second_weight_ptr is not None:\n",
        "    if second_weight_ptr is not None and K < 0:\n",
        GATED,
    ),
    Mutant(
        "offsets of a far up_bias in 32 bits",
        "kernels/forward/gated.py",
        "rows.operand, gate_weight, up_weight, *biases, output",
        "rows.operand, gate_weight, up_weight, biases[0], output",
        ("tests/ops/test_gated.py::test_gated_offsets_are_64_bits_wide_where_an_operand_is_far",),
    ),
    Mutant(
        "a few rows: K tail not masked",
        "kernels/forward/gemv.py",
        "mask_k = offs_k < K - k * BLOCK_K",
        "mask_k = offs_k < K",
        GEMV,
    ),
    Mutant(
        "a few rows: every row added to the first's sums",
        "kernels/forward/gemv.py",
        "accs[row] + input_row",
        "accs[0] + input_row",
        GEMV,
    ),
    Mutant(
        "a few rows: bias left out",
        "kernels/forward/gemv.py",
        "tl.sum(accs[row], axis=1) + of_bias",
        "tl.sum(accs[row], axis=1)",
        GEMV,
    ),
    Mutant(
        "a few rows: rows past the last stored",
        "kernels/forward/gemv.py",
        "mask = mask_n & (tl.full((BLOCK_N,), m, offs_n.dtype) < M)",
        "mask = mask_n",
        GEMV,
    ),
    Mutant(
        "a few rows: batch stride of the weight ignored",
        "kernels/forward/gemv.py",
        "batch * weight.stride_batch",
        "batch * 0 * weight.stride_batch",
        ("tests/kernels/forward/test_gemv.py::test_gemv_batch_of_layers",),
    ),
    Mutant(
        "split_k: a program's own part is added out of its place",
        "kernels/forward/split_k.py",
        "            acc = sum_slices(partial_ptrs, mask, splits, slice_size)\n",
        "            acc += sum_slices(partial_ptrs, mask, splits, slice_size)\n"
        "            acc -= tl.load(partial_ptrs + split * slice_size, mask=mask, other=0.0)\n",
        (
            "tests/kernels/forward/test_split_k.py::test_split_k_sums_in_one_order_however_programs_arrive",
        ),
    ),
    Mutant(
        "split_k: slices lie a row apart",
        "kernels/forward/split_k.py",
        "slice_size = as_offset(M, OPTIONS) * N",
        "slice_size = as_offset(M - 1, OPTIONS) * N",
        SPLIT_K,
    ),
    Mutant(
        "split_k: the last split reads past K",
        "kernels/forward/split_k.py",
        "mask_k = tl.arange(0, BLOCK_K) < K - k",
        "mask_k = tl.arange(0, BLOCK_K) < K + BLOCK_K",
        SPLIT_K,
    ),
    Mutant(
        "split_k: layers share the counters of their tiles",
        "kernels/forward/split_k.py",
        "counter_ptr + batch * tiles + tile",
        "counter_ptr + tile",
        (
            "tests/kernels/forward/test_split_k.py::test_split_k_keeps_layers_apart_however_programs_arrive",
        ),
    ),
    Mutant(
        "split_k: offsets of a far workspace in 32 bits",
        "kernels/forward/split_k.py",
        "wide = problem.options.wide or launch.wide(partial)",
        "wide = problem.options.wide",
        ("tests/kernels/forward/test_split_k.py::test_split_k_chooses_offsets_by_its_workspace",),
    ),
    Mutant(
        "a far result's odd rows are stored without addresses",
        "kernels/forward/linear.py",
        "whole=applies or wide",
        "whole=applies",
        ("tests/kernels/configs/test_configs.py",),
    ),
    Mutant(
        "pieces: the rows decide about them within batch_invariant()",
        "kernels/forward/linear.py",
        "None if batch_invariant else rows.size, k, target",
        "rows.size, k, target",
        PIECES,
    ),
    Mutant(
        "pieces: the rows decide about a gated pair's within batch_invariant()",
        "kernels/forward/gated.py",
        "None if batch_invariant else rows.size, in_features, target",
        "rows.size, in_features, target",
        PIECES,
    ),
    Mutant(
        "pieces: a gated pair's second sum is its first",
        "kernels/forward/gated.py",
        "gate, up = total_of(gate, OPTIONS), total_of(up, OPTIONS)",
        "gate, up = total_of(gate, OPTIONS), total_of(gate, OPTIONS)",
        ("tests/kernels/test_float32.py::test_pieces_in_a_gated_pair",),
    ),
    Mutant(
        "rows past the last are read, and not stored, gemv",
        "kernels/forward/gemv.py",
        "mask_row = mask_k & (tl.full((BLOCK_K,), first_row + row, offs_k.dtype) < M)",
        "mask_row = mask_k",
        READS,
    ),
    Mutant(
        "outputs past the last are read, and not stored, split_k",
        "kernels/forward/split_k.py",
        "weight_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0",
        "weight_ptrs, mask=(offs_n >= 0)[:, None] & mask_k[None, :], other=0.0",
        READS,
    ),
    Mutant(
        "features past the last are read, and not stored, gated",
        "kernels/forward/gated.py",
        "up_tile = tl.load(up_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)",
        "up_tile = tl.load(up_ptrs, mask=mask_k[:, None] & (offs_n >= 0)[None, :], other=0.0)",
        READS_GATED,
    ),
    Mutant(
        "no memory for parts: what takes none is planned for other blocks",
        "kernels/forward/split_k.py",
        "plan(problem, dataclasses.replace(config, splits=1))",
        "plan(problem._replace(n=n // 2), dataclasses.replace(config, splits=1))",
        NO_ROOM,
    ),
]
