"""Bugs planted in fastlinear/ops/, each with the tests that have to notice it."""

from mutant import Mutant

DISPATCH = ("tests/ops/test_dispatch.py",)
TABLES = (
    "tests/choice/test_tables.py",
    "tests/choice/test_auto.py",
)
ONEDNN = ("tests/ops/test_onednn.py",)
SHARDED = ("tests/distributed/test_distributed.py::test_op_over_shards_is_the_op_over_the_whole",)
GATED_SHARDED = (
    "tests/distributed/test_distributed.py::test_gated_pair_in_parallel_is_two_of_nn_linear",
)

MUTANTS = [
    Mutant(
        "weight's gradient takes the saved weight",
        "fastlinear/ops/linear.py",
        "input if needed[2] else None, weight if needed[1] else None, saved)",
        "input if needed[1] else None, weight if needed[2] else None, saved)",
        ("tests/ops/test_gradients.py::test_every_mask_of_requires_grad",),
    ),
    Mutant(
        "double backward loses the graph",
        "fastlinear/ops/linear.py",
        "    if not (torch.is_grad_enabled() or internals.forward_ad_active()):\n",
        "    if True:\n",
        ("tests/ops/test_gradients.py::test_gradgradcheck",),
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
        "samples of a vmap taken for layers",
        "fastlinear/ops/batching.py",
        "input.transpose(0, 1).flatten(1, 2)",
        "input.reshape(layers, samples * rows, -1)",
        ("tests/ops/test_batched_transforms.py::test_vmap_over_any_operand",),
    ),
    Mutant(
        "a second backward goes by the backend in force",
        "fastlinear/ops/linear.py",
        "            ctx.auto = running.takes_pytorch()\n        ctx.set_materialize",
        '            ctx.auto = running.backend.current == "auto"\n        ctx.set_materialize',
        TABLES,
    ),
    Mutant(
        "a gradient by oneDNN goes by the other's row",
        "fastlinear/ops/implementations.py",
        "*_grad_weight(of_weight, grad_output",
        "*_grad_weight(of_input, grad_output",
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
        "a blocked gradient counts as one of zeros",
        "fastlinear/ops/linear.py",
        "        ctx.set_materialize_grads(False)  # no gradient",
        "        ctx.set_materialize_grads(True)  # no gradient",
        ("tests/api/test_in_use.py::test_blocked_gradient_leaves_none",),
    ),
    Mutant(
        "both weights' gradients of a gated pair for one",
        "fastlinear/ops/gated.py",
        "            or wanted[1] != wanted[2]  # the op",
        "            or False  # the op",
        ("tests/api/test_in_use.py::test_backward_computes_what_is_asked_for",),
    ),
    Mutant(
        "half of a gated pair's grad_input",
        "fastlinear/ops/gated.py",
        "        grad_input = added(of_gate[0], of_up[0])\n",
        "        grad_input = of_gate[0]\n",
        ("tests/api/test_in_use.py::test_backward_computes_what_is_asked_for",),
    ),
    Mutant(
        "a copy of the weight for every call under autocast",
        "fastlinear/ops/op.py",
        "    return internals.autocast_copy(tensor, dtype)",
        "    return tensor.to(dtype)",
        ("tests/api/test_in_use.py::test_autocast_makes_one_copy_of_a_weight",),
    ),
]
