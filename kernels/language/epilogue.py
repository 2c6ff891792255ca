"""What follows a product in its accumulator: bias and activation, and what is stored.

Activations, and their gradients for the way back, take float32 or float64, and are equal to the
torch functions of their names.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh, to a few roundings of the result itself.

    1 - 2 / (exp(2x) + 1) is that away from 0. Near 0 it cancels, and the Taylor series takes over:
    ten terms for float64, five for float32, leave less than a rounding below 1/4.
    """
    square = x * x
    if x.dtype == tl.float64:
        series = square * (-443861162.0 / 1856156927625.0) + 6404582.0 / 10854718875.0
        series = series * square - 929569.0 / 638512875.0
        series = series * square + 21844.0 / 6081075.0
        series = series * square - 1382.0 / 155925.0
        series = series * square + 62.0 / 2835.0
    else:
        series = square * 0.0 + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    near = x + x * square * series
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), which is 1 - sigmoid(x) without the cancellation."""
    small = tl.exp(-tl.abs(x))
    near_one = 1.0 / (1.0 + small)
    near_zero = small * near_one
    return tl.where(x < 0.0, near_zero, near_one), tl.where(x < 0.0, near_one, near_zero)


@triton.jit
def _gelu_argument(x):
    """What gelu_tanh takes the sigmoid of: x * sigmoid(2u) is x * (1 + tanh(u)) / 2."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of `x`, the pre-activation."""
    if ACTIVATION == "relu":
        y = tl.where(x <= 0.0, 0.0, x)  # lets NaN through
    elif ACTIVATION == "leaky_relu":
        y = tl.where(x > 0.0, x, 0.01 * x)
    elif ACTIVATION == "relu_squared":
        y = tl.where(x <= 0.0, 0.0, x * x)
    elif ACTIVATION == "gelu":
        y = x * _normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        s, _ = _sigmoids(_gelu_argument(x))
        y = x * s
    elif ACTIVATION == "silu":
        s, _ = _sigmoids(x)
        y = x * s
    elif ACTIVATION == "sigmoid":
        y, _ = _sigmoids(x)
    else:
        tl.static_assert(ACTIVATION == "tanh", "unknown activation")
        y = tanh(x)
    return y


@triton.jit
def activation_gradient(grad, saved, ACTIVATION: tl.constexpr):
    """The gradient of the pre-activation, from the output's.

    `saved` is the output for the activations of operands.FROM_OUTPUT, else the pre-activation.
    """
    if ACTIVATION == "relu":
        result = tl.where(saved <= 0.0, 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        result = tl.where(saved > 0.0, grad, 0.01 * grad)
    elif ACTIVATION == "relu_squared":
        result = tl.where(saved <= 0.0, 0.0, grad * 2.0 * saved)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * saved * saved)
        result = grad * (_normal_cdf(saved) + saved * density)
    elif ACTIVATION == "gelu_tanh":
        s, rest = _sigmoids(_gelu_argument(saved))
        slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * saved * saved)
        result = grad * s * (1.0 + saved * rest * slope)
    elif ACTIVATION == "silu":
        s, rest = _sigmoids(saved)
        result = grad * s * (1.0 + saved * rest)
    elif ACTIVATION == "sigmoid":
        result = grad * saved * (1.0 - saved)
    else:
        tl.static_assert(ACTIVATION == "tanh", "unknown activation")
        result = grad * (1.0 - saved * saved)
    return result


@triton.jit
def bias_pointers(bias, batch, offs_n):
    """Those to a layer's bias."""
    return bias.ptr + batch * bias.stride_batch + offs_n * bias.stride


@triton.jit
def load_bias(bias, batch, offs_n, mask_n):
    """A layer's bias, in its own dtype."""
    return tl.load(bias_pointers(bias, batch, offs_n), mask=mask_n, other=0.0)


@triton.jit
def store_rounded(ptrs, value, mask):
    """The one rounding, to the dtype that is pointed to."""
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def store_activated(acc, output_ptr, preactivation_ptr, offs, mask, OPTIONS: tl.constexpr):
    """Stores the activation of sums, and, where there is a place for them, the sums."""
    if preactivation_ptr is not None:
        store_rounded(preactivation_ptr + offs, acc, mask)
    ACTIVATION: tl.constexpr = OPTIONS.activation
    if ACTIVATION is not None:
        acc = activate(acc, ACTIVATION)
    store_rounded(output_ptr + offs, acc, mask)
