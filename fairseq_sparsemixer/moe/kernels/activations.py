"""The activations that kernels know, and their derivatives. Functions for the kernels, not a kernel."""

import triton
import triton.language as tl

NAMES = ("identity", "relu", "gelu", "silu", "geglu", "swiglu")
GATED = ("geglu", "swiglu")
RELU, GELU = tl.constexpr(1), tl.constexpr(2)
IDENTITY = tl.constexpr(0)

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution, 1 / sqrt(2 pi)


def kind_of(activation: str) -> int:
    """The number of the activation's curve: a gated activation has that of its gate."""
    return {"geglu": NAMES.index("gelu"), "swiglu": NAMES.index("silu")}.get(activation, NAMES.index(activation))


@triton.jit
def curve(x, KIND: tl.constexpr):
    """The activation of x. A NaN stays one."""
    if KIND == IDENTITY:
        y = x
    elif KIND == RELU:
        y = tl.where(x <= 0, 0.0, x)
    elif KIND == GELU:
        y = 0.5 * x * (1 + tl.math.erf(x * ROOT_HALF))
    else:
        y = x / (1 + tl.exp(-x))
    return y


@triton.jit
def slope(x, KIND: tl.constexpr):
    """Its derivative at x; that of relu at any value of the same sign, such as its own result."""
    if KIND == RELU:
        y = tl.where(x <= 0, 0.0, 1.0)
    elif KIND == GELU:
        y = 0.5 * (1 + tl.math.erf(x * ROOT_HALF)) + x * DENSITY_AT_0 * tl.exp(-0.5 * x * x)
    else:
        sigmoid = 1 / (1 + tl.exp(-x))
        y = sigmoid * (1 + x * (1 - sigmoid))
    return y
