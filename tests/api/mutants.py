"""Bugs planted in fastlinear/*.py, each with the tests that have to notice it."""

from mutant import Mutant

GATED_MLP = (
    "tests/conversion/test_gated_mlp.py",
    "tests/conversion/test_gated_mlp_changed.py",
)
TUNE_MODEL = ("tests/tuning/test_tune_model.py", "tests/tuning/test_tune_processes.py")
MAIN_GRAD = ("tests/api/test_main_grad.py",)
SHARDED = ("tests/distributed/test_distributed.py::test_op_over_shards_is_the_op_over_the_whole",)

MUTANTS = [
    Mutant(
        "main_grad: PyTorch's product is rounded before it is added",
        "fastlinear/main_grad.py",
        "main_grad.addmm_(grad_columns.to(main_grad.dtype), rows.to(main_grad.dtype))",
        "main_grad.add_(grad_columns @ rows)",
        ("tests/api/test_main_grad.py::test_weights_of_16_bits",),
    ),
    Mutant(
        "main_grad: a gradient for autograd too",
        "fastlinear/main_grad.py",
        "        grad_weight = None\n",
        "        grad_weight = main_grad.to(ctx.weight.dtype)\n",
        MAIN_GRAD,
    ),
    Mutant(
        "shortcut past the profiler",
        "fastlinear/_torch_internals.py",
        "        or _profiled()\n",
        "",
        ("tests/api/test_shortcut.py::test_modes_and_the_profiler_see_the_op",),
    ),
    Mutant(
        "shortcut past modes of functions",
        "fastlinear/_torch_internals.py",
        "        or _torch_functions_watched()\n",
        "",
        ("tests/api/test_shortcut.py::test_modes_and_the_profiler_see_the_op",),
    ),
    Mutant(
        "shortcut past fake tensors' mode",
        "fastlinear/_torch_internals.py",
        "        or _dispatch_modes() > 0\n",
        "",
        ("tests/api/test_shortcut.py::test_within_fake_tensors_mode_results_are_fake",),
    ),
    Mutant(
        "shortcut past tangents",
        "fastlinear/_torch_internals.py",
        "        forward_ad._current_level >= 0  # a",
        "        False  # a",
        ("tests/api/test_shortcut.py::test_every_derivative_goes_through_a_shortcut",),
    ),
    Mutant(
        "a computed weight taken for the parameter",
        "fastlinear/modules.py",
        "                type(self) is Linear\n",
        "                True\n",
        ("tests/api/test_shortcut.py::test_a_layer_whose_weight_is_computed_computes_it",),
    ),
    Mutant(
        "compiled forward mode loses tangents",
        "fastlinear/_torch_internals.py",
        "interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Jvp",
        "False",
        ("tests/ops/test_torch_compile.py::test_compiled_transform",),
    ),
    Mutant(
        "every layer drawn into the first",
        "fastlinear/modules.py",
        "kaiming_uniform_(self.weight[layer]",
        "kaiming_uniform_(self.weight[0]",
        (
            "tests/ops/test_batched_module.py::test_initial_values_are_those_of_layers_made_one_after_another",
        ),
    ),
    Mutant(
        "one bias for all layers added along the rows",
        "fastlinear/functional.py",
        "bias is None or bias.dim() == 2:",
        "bias is None or bias.dim() > 0:",
        ("tests/ops/test_batched_refused.py::test_bad_shapes_are_named",),
    ),
    Mutant(
        "Dynamo compiles what is below the op",
        "fastlinear/_torch_internals.py",
        "_eval_frame.set_code_exec_strategy(function.__code__, skip)",
        "del skip",
        ("tests/ops/test_torch_compile.py::test_transform_of_a_compiled_function",),
    ),
    Mutant(
        "a gate of one feature fused with many",
        "fastlinear/modules.py",
        "one.shape == other.shape",
        "one.dim() == other.dim()",
        GATED_MLP,
    ),
    Mutant(
        "tune steps an optimizer within backward",
        "fastlinear/_torch_internals.py",
        "    for hooks, _ in kept:\n        hooks.clear()\n",
        "",
        TUNE_MODEL,
    ),
    Mutant(
        "shards: calls that ask for other gradients get one sharding",
        "fastlinear/_torch_internals.py",
        "op_to_schema_info[op].static_argnum = 0",
        "op_to_schema_info[op].static_argnum = 100",
        SHARDED,
    ),
    Mutant(
        "gradients are computed that nobody asked for",
        "fastlinear/_torch_internals.py",
        "    return [need and _will_run(next(nodes)) for need in needed]",
        "    return needed",
        ("tests/api/test_in_use.py::test_backward_computes_what_is_asked_for",),
    ),
    Mutant(
        "what stands in a parameter's place is passed by",
        "fastlinear/modules.py",
        '                and not ("weight" in own or "bias" in own)\n',
        "",
        ("tests/api/test_in_use_replaced.py::test_attribute_counts",),
    ),
    Mutant(
        "a property in a parameter's place is passed by",
        "fastlinear/modules.py",
        '                and not (hasattr(Linear, "weight") or hasattr(Linear, "bias"))\n',
        "",
        ("tests/api/test_in_use_replaced.py::test_attribute_counts",),
    ),
    Mutant(
        "a patched nn.Linear.forward is passed by",
        "fastlinear/modules.py",
        "        if internals.linear_is_patched():\n",
        "        if False:\n",
        ("tests/api/test_in_use_replaced.py::test_patched_forward_runs",),
    ),
    Mutant(
        "a gated pair passes a patched nn.Linear.forward by",
        "fastlinear/modules.py",
        "        and not internals.linear_is_patched()\n",
        "",
        ("tests/api/test_in_use_replaced.py::test_patched_forward_runs",),
    ),
    Mutant(
        "a subclass's activation is ours",
        "fastlinear/modules.py",
        "    def _is_exact(self) -> bool:\n        return parametrize",
        "    def _is_exact(self) -> bool:\n        return True or parametrize",
        ("tests/api/test_in_use_replaced.py::test_subclass_keeps_its_own_activation",),
    ),
    Mutant(
        "what only stands for a tensor has no say",
        "fastlinear/functional.py",
        "        return handle_torch_function(function, operands, *operands, activation)",
        "        return NotImplemented",
        ("tests/api/test_in_use_traced.py::test_function_is_traced_by_fx",),
    ),
]
