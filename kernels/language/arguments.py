"""What kernels take: matrices, and how to compute with them, each as one argument.

Triton takes a NamedTuple apart and specialises each of its fields as if it stood alone. A kernel's
operands are each a Matrix or Vector (launch.rows_of, matrix_of, vector_of), its OPTIONS an Options
(launch.options_of), its TILE a Tile (Config.blocks). Nothing here imports Triton.
"""

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """A batch of matrices in memory: a pointer, and strides in elements; 0 over no batch.

    Row m of batch b starts `b * stride_batch + m * stride_row` elements after the pointer. Rows
    that are nested, as the leading dimensions of a permuted tensor are, lie on two strides:
    `(m // inner_size) * stride_outer + (m % inner_size) * stride_row`; inner_size is None where
    they are not.
    """

    ptr: Any
    stride_batch: int
    stride_row: int
    stride_column: int
    inner_size: int | None = None
    stride_outer: int | None = None


class Vector(NamedTuple):
    """A batch of vectors in memory, as biases are."""

    ptr: Any
    stride_batch: int
    stride: int


class Tile(NamedTuple):
    """Block sizes over M, N and K, and how many rows of tiles are walked together. A constexpr."""

    M: int
    N: int
    K: int
    group: int


class Options(NamedTuple):
    """How a kernel computes. A constexpr.

    activation: what is applied to the accumulator; None is nothing.
    precision: how products are formed: "ieee", "tf32" or "bf16x6".
    sum_steps_apart: whether each step's products are summed apart (launch.options_of).
    wide: whether offsets are 64 bits wide.
    upcast: whether operands become float32 first, as the interpreter's do that hold bit patterns.
    """

    activation: str | None
    precision: str
    sum_steps_apart: bool
    wide: bool
    upcast: bool
