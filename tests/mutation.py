"""Plants bugs in the kernels, one at a time, and checks that the suite notices.

Run it as `python tests/mutation.py`.

Each mutant is a copy of the package with one line changed, tested in a process of its own by the
tests that should notice. Exits with 1 where a mutant survives, or where a bug can no longer be
planted because the line has changed.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FORWARD, BACKWARD, DISPATCH, BATCHED = (
    ("tests/test_forward.py",),
    ("tests/test_backward.py",),
    ("tests/test_dispatch.py",),
    ("tests/test_batched.py",),
)
TOGETHER = tuple(
    f"tests/test_backward.py::test_together_{name}"
    for name in ("splits", "batch_of_layers", "two_layers_side_by_side")
)
IN_ANY_ORDER = (
    "tests/test_backward.py::test_together_gives_the_same_bits_whichever_program_comes_last",
)
ACTIVATED = ("tests/test_activations.py::test_activation_is_as_exact_as_pytorch_s",)
ACTIVATED_BACKWARD = (
    "tests/test_activations.py::test_activation_gradients_are_as_exact_as_pytorch_s",
)
GATED = ("tests/test_gated.py::test_gated_values_and_gradients_are_as_exact_as_pytorch_s",)
GATED_MLP = ("tests/test_gated_mlp.py",)
FOLD_KEPT = ("tests/test_fold.py::test_what_is_not_folded_is_reported_with_the_reason",)
FOLD_AROUND = ("tests/test_fold.py::test_what_code_around_may_call_by_itself_is_not_folded",)
TABLES = ("tests/test_tables.py",)
TUNER = ("tests/test_tune.py",)
TUNE_MODEL = ("tests/test_tune_model.py",)
ONEDNN = ("tests/test_onednn.py",)
PIECES = ("tests/test_float32.py",)
SPLIT_K = ("tests/test_split_k.py",)
LAUNCHED = ("tests/test_compiled_launch.py",)
GEMV = ("tests/test_gemv.py",)
PERSISTENT = ("tests/test_persistent.py",)
MAIN_GRAD = ("tests/test_main_grad.py",)
RANKS = ("tests/test_ranks.py",)
SHARDED = ("tests/test_distributed.py::test_op_over_shards_is_the_op_over_the_whole",)
GATED_SHARDED = ("tests/test_distributed.py::test_gated_pair_in_parallel_is_two_of_nn_linear",)
NO_ROOM = ("tests/test_faults.py::test_without_memory_for_parts_no_sum_is_split",)
INTERRUPTED = (
    "tests/test_faults.py::test_interrupted_launch_leaves_nothing_for_the_next_to_trip_over",
)
READS, READS_BACKWARD, READS_GATED = (
    (f"tests/test_numbers.py::test_{what}_nothing_beside_its_operands",)
    for what in ("forward_reads", "backward_reads", "a_gated_pair_reads")
)


def in_use(test: str) -> tuple[str, ...]:
    return (f"tests/test_in_use.py::test_{test}",)


FORKS = multiprocessing.get_context("forkserver")
OUTPUT = "output.txt"


@dataclass(frozen=True)
class Mutant:
    """One planted bug: `old`, which stands in `file` exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "products that wait for one another are no fault",
        "benchmarks/compiled.py",
        '    if found["serialized"]:\n',
        '    if found["spilled"]:\n',
        ("tests/test_compile.py::test_serialised_products_are_a_fault",),
    ),
    Mutant(
        "loads before a barrier count as those behind it",
        "benchmarks/machine_code.py",
        "        late += barrier and name",
        "        late += name",
        ("tests/test_compile.py::test_machine_code_is_counted_by_step_and_tile",),
    ),
    Mutant(
        "kernels are looked for where they were compiled",
        "benchmarks/gpu_cache.py",
        "str(path.parent / one) for one in files",
        "files[one] for one in files",
        ("tests/test_gpu_cache.py::test_kernels_compiled_beforehand_are_found_in_another_folder",),
    ),
    Mutant(
        "a wrong kernel is launched again",
        "benchmarks/gpu_summary.py",
        '        if row["verdict"] not in TRUSTED:\n            cut',
        '        if row["verdict"] == "hangs":\n            cut',
        ("tests/test_gpu.py::test_gpu_parts_are_told_what_to_leave_out",),
    ),
    Mutant(
        "a kernel that is split passes for one that is not",
        "benchmarks/watch.py",
        "    marks = [mark for constant, mark in _MARKS.items() if constants.get(constant)]\n",
        "    marks: list[str] = []\n",
        ("tests/test_gpu_checks.py::test_planted_faults_are_found_and_named",),
    ),
    Mutant(
        "a kernel that was held up hangs",
        "benchmarks/families.py",
        " or try_some(rows, [name], 1, deadline, save):",
        " or True:",
        ("tests/test_gpu_checks.py::test_family_that_was_held_up_has_a_second_try_alone",),
    ),
    Mutant(
        "a job that hangs is left to",
        "benchmarks/apart.py",
        "                    process.kill()\n                    del running",
        "                    del running",
        ("tests/test_gpu_checks.py::test_jobs_apart_end_by_themselves_or_when_their_time_is_over",),
    ),
    Mutant(
        "store mask dropped, forward",
        "kernels/forward/tiled.py",
        "    mask = mask_m[:, None] & mask_n[None, :]\n",
        "    mask = mask_m[:, None] & (offs_n >= 0)[None, :]\n",
        FORWARD,
    ),
    Mutant(
        "store mask dropped, grad_weight",
        "kernels/backward/grad_weight_tile.py",
        "mask=mask_n[:, None] & mask_k[None, :],",
        "mask=mask_n[:, None] & (offs_k >= 0)[None, :],",
        BACKWARD,
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
        "rows past a split's last are counted",
        "kernels/backward/grad_weight_tile.py",
        "mask_m = offs_m < last_row",
        "mask_m = offs_m < M + BLOCK_M",
        BACKWARD,
    ),
    Mutant(
        "bias dropped on the last block",
        "kernels/forward/tiled.py",
        "acc += bias.to(ACC_DTYPE)[None, :]",
        "acc += tl.where(tile_n == column_tiles - 1, 0.0, bias.to(ACC_DTYPE))[None, :]",
        FORWARD,
    ),
    Mutant(
        "bias added after rounding",
        "kernels/forward/tiled.py",
        "acc += bias.to(ACC_DTYPE)[None, :]",
        "acc = acc.to(output_ptr.dtype.element_ty).to(ACC_DTYPE) + bias.to(ACC_DTYPE)[None, :]",
        ("tests/test_forward.py::test_forward_adds_bias_before_rounding",),
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
        "transposed weight taken for rows, persistent",
        "kernels/forward/persistent.py",
        '"WEIGHT_TRANSPOSED": weight.transposed',
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
        "bias_ptr + offs_n * stride_bn",
        "bias_ptr + (first_n - first_n % BLOCK_M + tl.arange(0, COLUMNS)) * stride_bn",
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
        "direct launches lend no memory, persistent",
        "kernels/launching/compiled_launch.py",
        "_with_memory(kernel.run, launch),",
        "kernel.run,",
        PERSISTENT,
    ),
    Mutant(
        "row mask dropped, persistent",
        "kernels/forward/persistent.py",
        "    mask = mask_m[:, None] & mask_n[None, :]\n",
        "    mask = (offs_m >= 0)[:, None] & mask_n[None, :]\n",
        PERSISTENT,
    ),
    Mutant(
        "wrong stride: input's columns taken for contiguous",
        "kernels/forward/tiled.py",
        "input_rows[:, None] + offs_k[None, :] * stride_ik",
        "input_rows[:, None] + offs_k[None, :]",
        ("tests/test_forward.py::test_forward_takes_strided_input",),
    ),
    Mutant(
        "wrong stride: nested rows taken for evenly spaced",
        "kernels/language/indexing.py",
        "(rows // inner_size) * stride_outer + (rows % inner_size) * stride_inner",
        "rows * stride_inner",
        ("tests/test_forward.py::test_forward_takes_strided_input",),
    ),
    Mutant(
        "batch stride of the bias ignored",
        "kernels/forward/tiled.py",
        "bias_ptr + batch * stride_bb",
        "bias_ptr",
        ("tests/test_forward.py::test_forward_batch_of_layers",),
    ),
    Mutant(
        "batch stride of the input ignored, grad_weight",
        "kernels/backward/grad_weight_tile.py",
        "input_ptr + batch * stride_ib",
        "input_ptr + batch * 0 * stride_ib",
        BATCHED,
    ),
    Mutant(
        "TF32 forced",
        "kernels/launching/launch.py",
        'return precision if dtype == torch.float32 else "ieee"',
        'return "tf32" if dtype == torch.float32 else "ieee"',
        FORWARD,
    ),
    Mutant(
        "TF32 truncated instead of rounded",
        "kernels/language/precision.py",
        "rounded = round_to_nearest(tile, 13)\n",
        "rounded = (tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)\n",
        ("tests/test_forward.py::test_forward_tf32_rounds_operands_to_nearest",),
    ),
    Mutant(
        "split sums: one split left out",
        "kernels/language/reduction.py",
        "for _ in range(slices):",
        "for _ in range(1, slices):",
        TOGETHER,
    ),
    Mutant(
        "split sums: slices taken from the wrong stride",
        "kernels/backward/grad_weight_tile.py",
        "mask, splits, layers * N * K)",
        "mask, splits, tl.full((), N, OFFSET_DTYPE) * K)",
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
        ("tests/test_main_grad.py::test_the_kernels_add_unrounded_sums",),
    ),
    Mutant(
        "main_grad: PyTorch's product is rounded before it is added",
        "fastlinear/main_grad.py",
        "main_grad.addmm_(grad_columns.to(main_grad.dtype), rows.to(main_grad.dtype))",
        "main_grad.add_(grad_columns @ rows)",
        ("tests/test_main_grad.py::test_weights_of_16_bits",),
    ),
    Mutant(
        "main_grad: a gradient for autograd too",
        "fastlinear/main_grad.py",
        "        grad_weight = None\n",
        "        grad_weight = main_grad.to(ctx.weight.dtype)\n",
        MAIN_GRAD,
    ),
    Mutant(
        "a rank goes by its own tables",
        "fastlinear/choice/known.py",
        "    return theirs\n",
        "    return mine\n",
        RANKS,
    ),
    Mutant(
        "tables from before there was a group stay",
        "fastlinear/choice/known.py",
        "if (now := group()) != _group:",
        "if False:",
        RANKS,
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
        "split sums: grad_bias by the columns that have none",
        "kernels/backward/grad_weight_tile.py",
        "if tile_k == 0:\n                    offs = batch * N + offs_n",
        "if tile_k > 0:\n                    offs = batch * N + offs_n",
        IN_ANY_ORDER,
    ),
    Mutant(
        "grad_bias stored by every column",
        "kernels/backward/grad_weight_tile.py",
        "    if HAS_BIAS:\n        if tile_k == 0:\n            # The 16",
        "    if HAS_BIAS:\n        if tile_k >= 0:\n            # The 16",
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
        "grad_output_ptr + tl.full((), N, OFFSET_DTYPE) * stride_gn",
        "grad_output_ptr",
        TOGETHER,
    ),
    Mutant(
        "splits overlap by a block",
        "kernels/backward/grad_weight_tile.py",
        "last_row = min(first_row + rows_per_split, M)",
        "last_row = min(first_row + rows_per_split + BLOCK_M, M)",
        ("tests/test_backward.py::test_backward_matches_float64",),
    ),
    Mutant(
        "existing output kept",
        "kernels/forward/tiled.py",
        "    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)\n",
        "    acc = tl.load(output_ptr + tl.zeros((BLOCK_M, BLOCK_N), tl.int32)).to(ACC_DTYPE)\n",
        FORWARD,
    ),
    Mutant(
        "each step replaces the last",
        "kernels/language/precision.py",
        "        acc += tl.dot(",
        "        acc = tl.dot(",
        FORWARD,
    ),
    Mutant(
        "float64 accumulated in float32",
        "kernels/launching/launch.py",
        "return tl.float64 if dtype == torch.float64 else tl.float32",
        "return tl.float32",
        FORWARD,
    ),
    Mutant(
        "float64 operands rounded to float32",
        "kernels/language/precision.py",
        "    if UPCAST:\n        tile = tile.to(tl.float32)\n",
        "    if UPCAST:\n        tile = tile.to(tl.float32)\n"
        "    if tile.dtype == tl.float64:\n        tile = tile.to(tl.float32).to(tl.float64)\n",
        FORWARD,
    ),
    Mutant(
        "offsets of a far bias in 32 bits",
        "kernels/forward/linear.py",
        "launch.offset_dtype(rows.operand, weight, bias, output)",
        "launch.offset_dtype(rows.operand, weight, output)",
        ("tests/test_forward.py::test_forward_chooses_offsets_by_every_operand",),
    ),
    Mutant(
        "weight's gradient takes the saved weight",
        "fastlinear/ops/linear.py",
        "input if needed[1] else None, weight if needed[0] else None, None)",
        "input if needed[0] else None, weight if needed[1] else None, None)",
        ("tests/test_gradients.py::test_every_mask_of_requires_grad",),
    ),
    Mutant(
        "double backward loses the graph",
        "fastlinear/ops/linear.py",
        "    if not (torch.is_grad_enabled() or internals.forward_ad_active()):\n",
        "    if True:\n",
        ("tests/test_gradients.py::test_gradgradcheck",),
    ),
    Mutant(
        "to the kernel past whoever else wants the call",
        "fastlinear/ops/op.py",
        "plain = not keys.raw_repr() & internals.BEYOND_PLAIN",
        "plain = True",
        DISPATCH,
    ),
    Mutant(
        "backward to the kernel past whoever else wants the call",
        "fastlinear/ops/op.py",
        "        if plain:\n",
        "        if True:\n",
        DISPATCH,
    ),
    Mutant(
        "one plan for aligned and unaligned operands",
        "kernels/launching/launch.py",
        "            first.data_ptr() % 16 == 0,",
        "            True,",
        DISPATCH,
    ),
    Mutant(
        "one compiled kernel for all alignments",
        "kernels/launching/compiled_launch.py",
        "key = specialization(pointers) if bits % 16 or AMD else ()",
        "key = ()",
        LAUNCHED,
    ),
    Mutant(
        "the last pointer's alignment stands for all",
        "kernels/launching/compiled_launch.py",
        "bits |= address",
        "bits = address",
        LAUNCHED,
    ),
    Mutant(
        "a Triton that is not known counted as known",
        "kernels/launching/compiled_launch.py",
        """return version.startswith(tuple(f"{one}." for one in KNOWN))""",
        "return True",
        LAUNCHED,
    ),
    Mutant(
        "whether products and sums fuse left to Triton",
        "kernels/launching/compiled_launch.py",
        """options = options | {"enable_fp_fusion": True}""",
        "pass",
        LAUNCHED,
    ),
    Mutant(
        "sizes of storages left out on AMD",
        "kernels/launching/compiled_launch.py",
        "    if not AMD:\n",
        "    if True:\n",
        LAUNCHED,
    ),
    Mutant(
        "another kernel taken for the one of the launch",
        "kernels/launching/compiled_launch.py",
        "if compiled is None or compiled[0] is not kernel:",
        "if compiled is None:",
        LAUNCHED,
    ),
    Mutant(
        "launch hooks passed by",
        "kernels/launching/compiled_launch.py",
        "if not (assigned or ENTER.calls or LEAVE.calls or kernel.pre_run_hooks):",
        "if not (assigned or ENTER.calls or kernel.pre_run_hooks):",
        LAUNCHED,
    ),
    Mutant(
        "launched on the current device",
        "kernels/launching/compiled_launch.py",
        "    if not only_device and device != torch.cuda.current_device():\n",
        "    if False:\n",
        LAUNCHED,
    ),
    Mutant(
        "compiled kernels kept without end",
        "kernels/launching/compiled_launch.py",
        "if len(launch.compiled) >= LARGEST_CACHE:",
        "if False:",
        LAUNCHED,
    ),
    Mutant(
        "shortcut past the profiler",
        "fastlinear/_torch_internals.py",
        "        or _profiled()\n",
        "",
        ("tests/test_shortcut.py::test_modes_and_the_profiler_see_the_op",),
    ),
    Mutant(
        "shortcut past modes of functions",
        "fastlinear/_torch_internals.py",
        "        or _torch_functions_watched()\n",
        "",
        ("tests/test_shortcut.py::test_modes_and_the_profiler_see_the_op",),
    ),
    Mutant(
        "shortcut past fake tensors' mode",
        "fastlinear/_torch_internals.py",
        "        or _dispatch_modes() > 0\n",
        "",
        ("tests/test_shortcut.py::test_within_fake_tensors_mode_results_are_fake",),
    ),
    Mutant(
        "shortcut of aligned operands for others",
        "fastlinear/choice/way.py",
        "(input.data_ptr() | weight.data_ptr() | bias.data_ptr()) % 16",
        "(input.data_ptr() | weight.data_ptr()) % 16",
        ("tests/test_shortcut.py::test_a_plan_for_aligned_operands_is_not_followed_for_others",),
    ),
    Mutant(
        "shortcut past the precision that is set",
        "fastlinear/choice/backend.py",
        "    return internals.float32_matmul_precision if default",
        "    return list().__len__ if default",
        ("tests/test_shortcut.py::test_products_follow_the_precision_that_is_set",),
    ),
    Mutant(
        "shortcut past lazy negation",
        "fastlinear/choice/way.py",
        "    if not internals.plain(*operands):\n        return\n",
        "",
        ("tests/test_shortcut.py::test_other_operands_of_the_same_shapes_are_told_apart",),
    ),
    Mutant(
        "shortcut records gradients in inference mode",
        "fastlinear/choice/way.py",
        "internals.above_autograd() and any(",
        "any(",
        ("tests/test_shortcut.py::test_inference_mode_has_shortcuts_of_its_own",),
    ),
    Mutant(
        "shortcut past tangents",
        "fastlinear/_torch_internals.py",
        "        forward_ad._current_level >= 0  # a",
        "        False  # a",
        ("tests/test_shortcut.py::test_every_derivative_goes_through_a_shortcut",),
    ),
    Mutant(
        "a computed weight taken for the parameter",
        "fastlinear/modules.py",
        "                type(self) is Linear\n",
        "                True\n",
        ("tests/test_shortcut.py::test_a_layer_whose_weight_is_computed_computes_it",),
    ),
    Mutant(
        "compiled forward mode loses tangents",
        "fastlinear/_torch_internals.py",
        "interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Jvp",
        "False",
        ("tests/test_transforms.py::test_compiled_transform",),
    ),
    Mutant(
        "samples of a vmap taken for layers",
        "fastlinear/ops/batching.py",
        "input.transpose(0, 1).flatten(1, 2)",
        "input.reshape(layers, samples * rows, -1)",
        ("tests/test_batched.py::test_vmap_over_any_operand",),
    ),
    Mutant(
        "every layer drawn into the first",
        "fastlinear/modules.py",
        "kaiming_uniform_(self.weight[layer]",
        "kaiming_uniform_(self.weight[0]",
        ("tests/test_batched.py::test_initial_values_are_those_of_layers_made_one_after_another",),
    ),
    Mutant(
        "one bias for all layers added along the rows",
        "fastlinear/functional.py",
        "if bias.dim() == 2:",
        "if bias.dim() > 0:",
        ("tests/test_batched.py::test_bad_shapes_are_named",),
    ),
    Mutant(
        "Dynamo compiles what is below the op",
        "fastlinear/_torch_internals.py",
        "_eval_frame.set_code_exec_strategy(function.__code__, skip)",
        "del skip",
        ("tests/test_transforms.py::test_transform_of_a_compiled_function",),
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
        ("tests/test_activations.py::test_activation_of_extreme_values",),
    ),
    Mutant(
        "output saved for the pre-activation",
        "kernels/forward/tiled.py",
        "tl.store(preactivation_ptr + offs, acc.to(",
        "tl.store(preactivation_ptr + offs, activate(acc, ACTIVATION).to(",
        ACTIVATED_BACKWARD,
    ),
    Mutant(
        "activation's gradient left out of the pass",
        "kernels/backward/activation.py",
        "grad = activation_gradient(grad_output.to(ACC_DTYPE), saved.to(ACC_DTYPE), ACTIVATION)",
        "grad = grad_output.to(ACC_DTYPE)",
        ACTIVATED_BACKWARD,
    ),
    Mutant(
        "up's bias added to the gate",
        "kernels/forward/gated.py",
        "        up += bias.to(ACC_DTYPE)[None, :]",
        "        gate += bias.to(ACC_DTYPE)[None, :]",
        GATED,
    ),
    Mutant(
        "gate's gradient without up",
        "kernels/backward/gated.py",
        "activation_gradient(grad_output * up, saved, ACTIVATION)",
        "activation_gradient(grad_output, saved, ACTIVATION)",
        GATED,
    ),
    Mutant(
        "slope of tanh taken from the gate itself",
        "kernels/backward/gated.py",
        "saved = activated if FROM_OUTPUT else gate\n",
        "saved = gate\n",
        ("tests/test_gated.py::test_gated_activation",),
    ),
    Mutant(
        "grad_input of the gate alone",
        "kernels/forward/tiled.py",
        "    if SECOND_PRODUCT:\n",
        "    if SECOND_PRODUCT and K < 0:\n",
        GATED,
    ),
    Mutant(
        "weights that lie differently read alike",
        "kernels/backward/gated.py",
        "if gate_weight.stride() != up_weight.stride():",
        "if False:",
        ("tests/test_gated.py::test_gated_operands_of_every_stride",),
    ),
    Mutant(
        "offsets of a far up_bias in 32 bits",
        "kernels/forward/gated.py",
        "rows.operand, gate_weight, up_weight, gate_bias, up_bias, output",
        "rows.operand, gate_weight, up_weight, gate_bias, output",
        ("tests/test_gated.py::test_gated_offsets_are_64_bits_wide_where_an_operand_is_far",),
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
        "tl.sum(accs[row], axis=1) + bias",
        "tl.sum(accs[row], axis=1)",
        GEMV,
    ),
    Mutant(
        "a few rows: rows past the last stored",
        "kernels/forward/gemv.py",
        "mask = mask_n & (tl.full((BLOCK_N,), m, OFFSET_DTYPE) < M)",
        "mask = mask_n",
        GEMV,
    ),
    Mutant(
        "a few rows: batch stride of the weight ignored",
        "kernels/forward/gemv.py",
        "batch * stride_wb + offs_n[:, None]",
        "batch * 0 * stride_wb + offs_n[:, None]",
        ("tests/test_gemv.py::test_gemv_batch_of_layers",),
    ),
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
        ("tests/test_fold.py::test_code_that_cannot_be_read_folds_nothing",),
    ),
    Mutant(
        "a gate of one feature fused with many",
        "fastlinear/modules.py",
        "one.shape == other.shape",
        "one.dim() == other.dim()",
        GATED_MLP,
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
        ("tests/test_convert.py::test_a_forward_set_on_the_class_runs",),
    ),
    Mutant(
        "activation put back though a layer still applies it",
        "fastlinear/conversion/fold.py",
        "ready[act] == vars(act)[FOLD][1]",
        "ready[act] > 0",
        ("tests/test_fold.py::test_a_part_is_not_reverted_without_the_rest",),
    ),
    Mutant(
        "split_k: a program's own part is added out of its place",
        "kernels/forward/split_k.py",
        "                sum_slices(partial_ptrs, mask, splits, slice_size),\n",
        "                acc + sum_slices(partial_ptrs, mask, splits, slice_size)\n"
        "                - tl.load(partial_ptrs + split * slice_size, mask=mask, other=0.0),\n",
        ("tests/test_split_k.py::test_split_k_sums_in_one_order_however_programs_arrive",),
    ),
    Mutant(
        "split_k: slices lie a row apart",
        "kernels/forward/split_k.py",
        "slice_size = tl.full((), M, OFFSET_DTYPE) * N",
        "slice_size = tl.full((), M - 1, OFFSET_DTYPE) * N",
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
        ("tests/test_split_k.py::test_split_k_keeps_layers_apart_however_programs_arrive",),
    ),
    Mutant(
        "split_k: offsets of a far workspace in 32 bits",
        "kernels/forward/split_k.py",
        "if launch.offset_dtype(partial) == tl.int64:",
        "if False:",
        ("tests/test_split_k.py::test_split_k_chooses_offsets_by_its_workspace",),
    ),
    Mutant(
        "streams share their counters",
        "kernels/launching/shared_sums.py",
        "stream = torch.cuda.current_stream(device).cuda_stream",
        "stream = 0",
        ("tests/test_launch.py",),
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
        "64-bit offsets take no registers",
        "kernels/configs/legality.py",
        "_MOST_OF_FAR_PLAIN if traits.wide and",
        "_MOST_OF_FAR_PLAIN if False and",
        ("tests/test_configs.py",),
    ),
    Mutant(
        "a far result's odd rows are stored without addresses",
        "kernels/forward/linear.py",
        "whole=applies or wide",
        "whole=applies",
        ("tests/test_configs.py",),
    ),
    Mutant(
        "batch invariance: the configuration goes by how far rows lie apart",
        "kernels/configs/choose.py",
        "aligned=False, descriptors=False, wide=False",
        "aligned=False, descriptors=False",
        (
            "tests/test_batch_invariant.py::test_default_mode_chooses_by_the_batch_and_this_one_does_not",
        ),
    ),
    Mutant(
        "batch invariance: the configuration goes by the rows",
        "kernels/configs/choose.py",
        "batch, m = 1, INVARIANT_ROWS",
        "batch = 1",
        (
            "tests/test_batch_invariant.py::test_default_mode_chooses_by_the_batch_and_this_one_does_not",
        ),
    ),
    Mutant(
        "batch invariance: shortcuts of the default mode are taken",
        "fastlinear/choice/backend.py",
        "        invariant = True\n        _choose_settings()\n",
        "        invariant = True\n",
        ("tests/test_batch_invariant.py::test_a_call_like_one_outside_is_batch_invariant_within",),
    ),
    Mutant(
        "a table's row for more rows than were measured",
        "fastlinear/choice/table.py",
        "1 << max(m - 1, 0).bit_length()",
        "1 << max(m - 2, 0).bit_length()",
        TABLES,
    ),
    Mutant(
        "backend triton takes PyTorch's product",
        "fastlinear/choice/way.py",
        "return found if ours or backend.takes_pytorch() else None",
        "return found",
        TABLES,
    ),
    Mutant(
        "a backward goes by the backend in force",
        "fastlinear/choice/backend.py",
        'return current != "triton" if _forward.auto is None else _forward.auto',
        'return current != "triton"',
        TABLES,
    ),
    Mutant(
        "a row of an odd output counts as aligned under an activation",
        "fastlinear/choice/table.py",
        "whole = (n, k) if applies or wide else read",
        "whole = read",
        TABLES,
    ),
    Mutant(
        "a row of more warps than a program can have is legal",
        "kernels/configs/legality.py",
        "    if config.num_warps > most:\n",
        "    if config.num_warps < 1:\n",
        TABLES,
    ),
    Mutant(
        "an exported layer goes by the table",
        "fastlinear/choice/way.py",
        " or internals.exporting()",
        "",
        ("tests/test_tables.py::test_what_is_traced_or_exported_runs_without_the_table",),
    ),
    Mutant(
        "a second backward goes by the backend in force",
        "fastlinear/ops/linear.py",
        "            ctx.auto = backend.takes_pytorch()\n        ctx.set_materialize",
        '            ctx.auto = backend.current == "auto"\n        ctx.set_materialize',
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
        "a row for layers with a bias serves those without",
        "fastlinear/choice/way.py",
        "layer = dtype, bias is not None, ",
        "layer = dtype, True, ",
        TABLES,
    ),
    Mutant(
        "one launch of both gradients that is slower than two wins",
        "fastlinear/tuning/measure.py",
        "[PYTORCH] if one == BY_ROWS else [other for other in walls if other != str(one)]",
        "[PYTORCH]",
        TUNER,
    ),
    Mutant(
        "the shorter programs of one launch start first in the model",
        "kernels/configs/choose_pair.py",
        "    return of_input > of_weight\n",
        "    return of_input < of_weight\n",
        ("tests/test_configs.py",),
    ),
    Mutant(
        "shortcuts outlive a table",
        "fastlinear/choice/backend.py",
        "invariant, current, known.generation\n",
        "invariant, current\n",
        TABLES,
    ),
    Mutant(
        "a kernel that callers wait longer for wins",
        "fastlinear/tuning/measure.py",
        "    slower = any(faster(clock[other], clock[one]) for clock in clocks)\n",
        "    slower = faster(times[other], times[one])\n",
        ("tests/test_tune.py::test_kernel_wins_if_it_is_faster_on_one_clock_and_slower_on_none",),
    ),
    Mutant(
        "an inexact kernel wins",
        "fastlinear/tuning/measure.py",
        "            if as_exact(computed(), theirs, exact, most):\n",
        "            if as_exact(computed(), theirs, exact, most) or call.m:\n",
        ("tests/test_tune.py::test_inexact_kernel_cannot_win",),
    ),
    Mutant(
        "another process's rows are lost",
        "fastlinear/choice/table.py",
        "rows = self._read()[0] | {row.key: row}",
        "rows = {row.key: row}",
        TUNER,
    ),
    Mutant(
        "oneDNN's gelu is taken for that by tanh",
        "fastlinear/choice/onednn.py",
        '("gelu", [], "tanh")',
        '("gelu", [], "none")',
        ONEDNN,
    ),
    Mutant(
        "oneDNN reads a strided bias as if it were contiguous",
        "fastlinear/choice/onednn.py",
        "        bias = bias.contiguous()  # it is read as if it were\n",
        "        pass\n",
        ONEDNN,
    ),
    Mutant(
        "what tables of another moment say is noted",
        "fastlinear/choice/way.py",
        "    noted[read_by] = least\n",
        "    _least[read_by] = least\n",
        TABLES,
    ),
    Mutant(
        "a batch that a table has another way for is told to be too small",
        "fastlinear/choice/way.py",
        "elements = (key.m // 2 + 1) * key.k",
        "elements = key.m * key.k",
        TABLES,
    ),
    Mutant(
        "oneDNN is asked for gradients that it has not",
        "fastlinear/choice/onednn.py",
        'return None if dtype == torch.float32 else f"oneDNN has no gradients in {dtype}"',
        "return None",
        ONEDNN,
    ),
    Mutant(
        "a gradient by oneDNN goes by the other's row",
        "fastlinear/ops/implementations.py",
        "        if of_weight in LIBRARIES:\n",
        "        if of_input in LIBRARIES:\n",
        ONEDNN,
    ),
    Mutant(
        "a rank that was given up publishes its table",
        "fastlinear/tuning/tune.py",
        '"", "published") == b"published"',
        '"", "published")',
        TUNE_MODEL,
    ),
    Mutant(
        "oneDNN is taken where it is switched off",
        "fastlinear/choice/onednn.py",
        "not torch._C._get_mkldnn_enabled() or not",
        "not",
        ONEDNN,
    ),
    Mutant(
        "a Function's output is a view",
        "fastlinear/ops/implementations.py",
        "return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output",
        "return output",
        ONEDNN,
    ),
    Mutant(
        "a CPU's table serves other numbers of threads",
        "fastlinear/choice/way.py",
        "read_by = _threads(), internals",
        "read_by = 0, internals",
        ONEDNN,
    ),
    Mutant(
        "a backward needs the table of its forward",
        "fastlinear/choice/backend.py",
        "known.seen and not invariant and (known.available or _forward.auto is not None)",
        "known.available and not invariant",
        ONEDNN,
    ),
    Mutant(
        "a step that is measured serves others' gradients",
        "fastlinear/choice/way.py",
        '["weight"] * weight.requires_grad\n',
        '["weight"]\n',
        ONEDNN,
    ),
    Mutant(
        "tune leaves gradients",
        "fastlinear/tuning/record.py",
        '            at_the_end.callback(setattr, tensor, "grad", gradient)\n',
        "",
        TUNE_MODEL,
    ),
    Mutant(
        "tune moves buffers",
        "fastlinear/tuning/record.py",
        "            tensor.copy_(value)\n",
        "            pass\n",
        TUNE_MODEL,
    ),
    Mutant(
        "tune steps an optimizer within backward",
        "fastlinear/_torch_internals.py",
        "    for one in hooks:\n        one.clear()\n",
        "",
        TUNE_MODEL,
    ),
    Mutant(
        "tune draws random numbers",
        "fastlinear/tuning/record.py",
        "        at_the_end.enter_context(torch.random.fork_rng(sorted(devices)))\n",
        "",
        TUNE_MODEL,
    ),
    Mutant(
        "another rank than the first measures too",
        "fastlinear/tuning/tune.py",
        '"", rank).decode() == rank\n',
        '"", rank).decode() != ""\n',
        TUNE_MODEL,
    ),
    Mutant(
        "a gain that is too small counts",
        "fastlinear/choice/table.py",
        "self.pytorch_device_us >= margin * self.device_us",
        "self.pytorch_device_us >= self.device_us",
        TABLES,
    ),
    Mutant(
        "a row of other kernels counts",
        "fastlinear/choice/known.py",
        'same = parsed.kernels == software()["kernels"]',
        "same = True",
        TABLES,
    ),
    Mutant(
        "residents of a multiprocessor left out of the model",
        "kernels/configs/model.py",
        "        resident = resident_programs(kernel, config, traits)\n",
        "        resident = 1\n",
        ("tests/test_choose.py",),
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
        ("tests/test_float32.py::test_six_products_of_pieces_are_enough_the_smallest_first",),
    ),
    Mutant(
        "pieces: of infinity, itself and zeros",
        "kernels/language/precision.py",
        "    return tl.where(is_moderate(tile), tile, tl.where(tile > 0, 1.0, -1.0))\n",
        "    return tile\n",
        ("tests/test_float32.py::test_pieces_pass_nan_and_infinity_on",),
    ),
    Mutant(
        "pieces: what an addition lost is not given back",
        "kernels/language/precision.py",
        "    term -= lost\n",
        "",
        ("tests/test_float32.py::test_additions_to_the_total_lose_nothing",),
    ),
    Mutant(
        "pieces: infinity has lost something",
        "kernels/language/precision.py",
        'tl.where(tl.abs(raised) < float("inf"), (raised - total) - term, 0.0)',
        "(raised - total) - term",
        ("tests/test_float32.py::test_pieces_pass_nan_and_infinity_on",),
    ),
    Mutant(
        "pieces: truncated instead of rounded",
        "kernels/language/precision.py",
        "        first = round_to_nearest(leading_piece(tile), 16)\n",
        "        first = as_bfloat16(leading_piece(tile), True)\n",
        ("tests/test_float32.py::test_six_products_of_pieces_are_enough_the_smallest_first",),
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
        "acc = total_of(acc, INPUT_PRECISION)",
        'acc = acc[1] if INPUT_PRECISION == "bf16x6" else total_of(acc, INPUT_PRECISION)',
        PIECES,
    ),
    Mutant(
        "pieces: the rows decide about them within batch_invariant()",
        "kernels/forward/linear.py",
        "None if batch_invariant else rows.size, in_features, target",
        "rows.size, in_features, target",
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
        "gate, up = total_of(gate, INPUT_PRECISION), total_of(up, INPUT_PRECISION)",
        "gate, up = total_of(gate, INPUT_PRECISION), total_of(gate, INPUT_PRECISION)",
        ("tests/test_float32.py::test_pieces_in_a_gated_pair",),
    ),
    Mutant(
        "rows past the last are read, and not stored, gemv",
        "kernels/forward/gemv.py",
        "mask_row = mask_k & (tl.full((BLOCK_K,), first_row + row, OFFSET_DTYPE) < M)",
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
        "inputs past the last are read, and not stored, grad_weight",
        "kernels/backward/grad_weight_tile.py",
        "mask=mask_m[:, None] & mask_k[None, :], other=0.0",
        "mask=mask_m[:, None] & (offs_k >= 0)[None, :], other=0.0",
        READS_BACKWARD,
    ),
    Mutant(
        "pieces: taken by default",
        "fastlinear/choice/backend.py",
        'return "ieee" if float32_products == "ieee" else f"long {float32_products}"',
        'return "long bf16x6"',
        PIECES,
    ),
    Mutant(
        "pieces: shortcuts of other float32 products are taken",
        "fastlinear/choice/backend.py",
        'default = not invariant and float32_products == "ieee"',
        "default = not invariant",
        PIECES,
    ),
    Mutant(
        "shards: the parts of a sum are activated",
        "fastlinear/ops/sharding.py",
        "    return _forward(input, weight)\n",
        "    return linear(input, weight, None)\n",
        SHARDED,
    ),
    Mutant(
        "shards: every rank adds the whole bias to its part of a sum",
        "fastlinear/ops/sharding.py",
        "[Shard(input.ndim - 1), in_features, Partial()]",
        "[Shard(input.ndim - 1), in_features, WHOLE]",
        SHARDED,
    ),
    Mutant(
        "shards: a sum over a rank's rows is taken for the sum over all",
        "fastlinear/ops/sharding.py",
        "[Shard(dim), Partial(), Partial()]",
        "[Shard(dim), WHOLE, Partial()]",
        SHARDED,
    ),
    Mutant(
        "shards: both gradients of a gated pair are cut as one matrix",
        "fastlinear/ops/sharding.py",
        "layers=0, by_columns=False",
        "layers=0, by_columns=True",
        SHARDED,
    ),
    Mutant(
        "shards: gradients of a gated pair are gathered to be computed",
        "fastlinear/ops/gated.py",
        "or type(gate) in internals.DISTRIBUTED",
        "or False",
        GATED_SHARDED,
    ),
    Mutant(
        "shards: calls that ask for other gradients get one sharding",
        "fastlinear/_torch_internals.py",
        "op_to_schema_info[op].static_argnum = 0",
        "op_to_schema_info[op].static_argnum = 100",
        SHARDED,
    ),
    Mutant(
        "no memory for parts: grad_weight is split all the same",
        "kernels/backward/grad_weight.py",
        "plan = plan_backward_weight(operands, bias, batched, precision, plan.config, 1)",
        "plan = plan_backward_weight(operands, bias, batched, precision, plan.config, 2)",
        NO_ROOM,
    ),
    Mutant(
        "no memory for parts: what takes none is planned for other blocks",
        "kernels/forward/split_k.py",
        "unsplit=plan(problem, dataclasses.replace(config, splits=1)),",
        "unsplit=plan(problem._replace(n=n // 2), dataclasses.replace(config, splits=1)),",
        NO_ROOM,
    ),
    Mutant(
        "counters of an interrupted launch are used again",
        "kernels/launching/shared_sums.py",
        "    except BaseException:\n",
        "    except ZeroDivisionError:\n",
        INTERRUPTED,
    ),
    Mutant(
        "shortcut remembered for settings that are no longer in force",
        "fastlinear/choice/way.py",
        "    if settings != backend.settings():\n",
        "    if settings is None:\n",
        ("tests/test_concurrency.py",),
    ),
    Mutant(
        "a blocked gradient counts as one of zeros",
        "fastlinear/ops/linear.py",
        "        ctx.set_materialize_grads(False)  # no gradient",
        "        ctx.set_materialize_grads(True)  # no gradient",
        in_use("blocked_gradient_leaves_none"),
    ),
    Mutant(
        "a blocked gradient counts as one of zeros, activated",
        "fastlinear/ops/linear.py",
        "        ctx.set_materialize_grads(False)\n",
        "",
        in_use("blocked_gradient_leaves_none"),
    ),
    Mutant(
        "gradients are computed that nobody asked for",
        "fastlinear/_torch_internals.py",
        "    return [need and _will_run(next(nodes)) for need in needed]",
        "    return needed",
        in_use("backward_computes_what_is_asked_for"),
    ),
    Mutant(
        "both weights' gradients of a gated pair for one",
        "fastlinear/ops/gated.py",
        "            or wanted[1] != wanted[2]  # the op",
        "            or False  # the op",
        in_use("backward_computes_what_is_asked_for"),
    ),
    Mutant(
        "half of a gated pair's grad_input",
        "fastlinear/ops/gated.py",
        "        grad_input = added(of_gate[0], of_up[0])\n",
        "        grad_input = of_gate[0]\n",
        in_use("backward_computes_what_is_asked_for"),
    ),
    Mutant(
        "a copy of the weight for every call under autocast",
        "fastlinear/ops/op.py",
        "    return internals.autocast_copy(tensor, dtype)",
        "    return tensor.to(dtype)",
        in_use("autocast_makes_one_copy_of_a_weight"),
    ),
    Mutant(
        "compiled autograd traces what its thread goes by",
        "fastlinear/choice/backend.py",
        "None if torch.compiler.is_dynamo_compiling() else auto",
        "auto",
        ("tests/test_transforms.py::test_compiled_autograd_has_one_graph",),
    ),
    Mutant(
        "what stands in a parameter's place is passed by",
        "fastlinear/modules.py",
        '                and not ("weight" in own or "bias" in own)\n',
        "",
        in_use("attribute_counts"),
    ),
    Mutant(
        "a property in a parameter's place is passed by",
        "fastlinear/modules.py",
        '                and not (hasattr(Linear, "weight") or hasattr(Linear, "bias"))\n',
        "",
        in_use("attribute_counts"),
    ),
    Mutant(
        "a patched nn.Linear.forward is passed by",
        "fastlinear/modules.py",
        "        if internals.linear_is_patched():\n",
        "        if False:\n",
        in_use("patched_forward_runs"),
    ),
    Mutant(
        "a gated pair passes a patched nn.Linear.forward by",
        "fastlinear/modules.py",
        "        and not internals.linear_is_patched()\n",
        "",
        in_use("patched_forward_runs"),
    ),
    Mutant(
        "a subclass's activation is ours",
        "fastlinear/modules.py",
        "    def _is_exact(self) -> bool:\n        return parametrize",
        "    def _is_exact(self) -> bool:\n        return True or parametrize",
        in_use("subclass_keeps_its_own_activation"),
    ),
    Mutant(
        "what only stands for a tensor has no say",
        "fastlinear/functional.py",
        "        return handle_torch_function(function, operands, *operands, activation)",
        "        return NotImplemented",
        in_use("function_is_traced_by_fx"),
    ),
]


def notices(mutant: Mutant) -> tuple[Mutant, bool, str]:
    """(the mutant, whether a test failed, how that went in one line)."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "fastlinear")
        shutil.copytree(ROOT / "fastlinear", package)
        shutil.copytree(ROOT / "kernels", package / "kernels")
        for name in ("tests", "benchmarks"):
            shutil.copytree(ROOT / name, Path(folder, name))
        shutil.copy(ROOT / "pyproject.toml", folder)
        changed = Path(folder, mutant.file)
        if mutant.file.startswith("kernels/"):
            changed = package / mutant.file
        text = changed.read_text()
        if text.count(mutant.old) != 1:
            return (
                mutant,
                False,
                f"cannot be planted: its line stands {text.count(mutant.old)} times "
                f"in {mutant.file}",
            )
        changed.write_text(text.replace(mutant.old, mutant.new))
        process = FORKS.Process(target=run_tests, args=(folder, mutant.tests))
        process.start()
        process.join(timeout=300)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            return mutant, True, "noticed: the tests hang"
        output = Path(folder, OUTPUT).read_text()
    seconds = f"{time.monotonic() - started:.0f} s"
    if process.exitcode == 1:
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return (
            mutant,
            True,
            f"noticed in {seconds} "
            f"by {failed[0].split(' - ')[0].split('::')[-1] if failed else '?'}",
        )
    if process.exitcode == 0:
        return mutant, False, f"SURVIVED {' '.join(mutant.tests)} ({seconds})"
    return mutant, False, f"pytest exited with {process.exitcode}: {output[-500:]}"


def run_tests(folder: str, tests: tuple[str, ...]) -> None:
    """Runs `tests` with the package in `folder`, in a process that imports neither from elsewhere.

    Exits with pytest's status.
    """
    import pytest

    os.setsid()  # so that what the tests start can be ended with them
    with Path(folder, OUTPUT).open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.chdir(folder)
    sys.path[:] = [folder, *(entry for entry in sys.path if Path(entry or ".") != ROOT / "tests")]
    os.environ["PYTHONPATH"] = folder
    status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])
    sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="plant the bugs whose name contains this")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    # What the processes inherit: kernels that are interpreted where there is no GPU, as in
    # conftest.py, and libraries that one process imports for all.
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    FORKS.set_forkserver_preload(["numpy", "pytest", "torch", "triton"])
    killed = 0
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for mutant, noticed, how in pool.map(notices, mutants):
            killed += noticed
            print(f"{'killed' if noticed else 'ALIVE '}  {mutant.name}: {how}", flush=True)
    print(f"{killed} killed / {len(mutants)} planted")
    sys.exit(killed != len(mutants))


if __name__ == "__main__":
    main()
