"""The backward of a gated pair: one pass through gate and activation, then that of one layer.

That layer has the outputs of both, side by side.
"""

from torch import Tensor

from ..configs.config import BackwardConfig
from ..launching.operands import Activation
from .elementwise import gate_backward
from .linear import linear_backward


def gated_linear_backward(
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    input: Tensor | None,
    gate_weight: Tensor | None,
    up_weight: Tensor | None,
    bias: bool,
    activation: Activation,
    *,
    precision: str = "ieee",
    batch_invariant: bool = False,
    config: BackwardConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """The gradients of `activation(gate) * up`, in two launches.

    The first pass reads grad_output, gate and up and writes the gradients of gate and up as one
    matrix of 2 N columns: of M x N elements, five reads and writes. The second computes the
    gradients of both weights and biases as those of one layer with that many outputs, and
    grad_input as the sum of two products in one accumulator: neither of its parts is written.

    Args:
        grad_output: (*, N); any strides.
        gate, up: (*, N), as `gated_linear_forward` gives them.
        input: (*, K); None where no gradient of a weight is wanted.
        gate_weight, up_weight: (N, K); None where no grad_input is wanted.
        bias: whether the gradients of biases are wanted; they come with those of weights only.
        activation: one of `operands.ACTIVATIONS`.
        precision: as in `gated_linear_forward`.
        batch_invariant: as in `linear_backward`.
        config: block sizes of the second launch; None chooses by shape, dtype and device.

    Returns:
        grad_input (*, K), grad_weight (2 N, K), the gate's before up's, grad_bias (2 N,) likewise,
        None for what is not wanted, and the gradients of gate and up (*, 2 N).
    """
    grad_products = gate_backward(grad_output, gate.contiguous(), up.contiguous(), activation)
    if gate_weight is not None and up_weight is not None:
        if gate_weight.stride() != up_weight.stride():  # rare: copied, so that they lie alike
            gate_weight, up_weight = gate_weight.contiguous(), up_weight.contiguous()
    gradients = linear_backward(
        grad_products,
        input,
        gate_weight,
        bias,
        second_weight=up_weight,
        precision=precision,
        batch_invariant=batch_invariant,
        config=config,
    )
    return *gradients, grad_products
