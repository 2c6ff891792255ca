"""The torch ops: schema, shapes, derivatives, vmap, autocast, operation counts, sharding.

`op.py` registers every op; `linear.py` (a layer, with and without an activation) and `gated.py` say
what is each one's own, `sharding.py` what DTensors they take, `batching.py` how vmapped operands
become one call's. `implementations.py` is what they run: the kernels or PyTorch, by `choice`;
`elementwise.py` has the activations in terms of PyTorch, `torchscript.py` what TorchScript compiles
instead; `arguments.py` says in words what the kernels do not take. Start with `op.register`.

An activation more is one in `kernels/launching/operands.py` (`Activation`, `FROM_OUTPUT`), in
`kernels/language/epilogue.py` (`activate`, `activation_gradient`), in `elementwise.py`
(`ACTIVATIONS`, `GRADIENTS`) and `torchscript.py`; where they know it, in `choice/onednn.py`,
`choice/cublaslt.py`, `conversion/fold.py` and `conversion/gated_mlp.py`; in the docstring of
`functional.linear` and the README's table; and in tests' `api/test_contract_hooks.py`,
`api/test_exceptions.py` and, if it is steep or not smooth, `helpers/bounds.py`. Then `make
resources ARGS=--json`, and the same with `ARGS="--launches --json"`.
"""
