"""Index arithmetic that every kernel shares.

Which tile a program computes, its halves, and where its rows and columns lie in memory.
"""

import triton
import triton.language as tl


@triton.jit
def locate_tile(pid, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile (row, column) of program `pid`, walking down GROUP rows of tiles before the next column.

    Programs that run at the same time then share operand tiles in L2.
    """
    tiles_in_group = GROUP * column_tiles
    first_row = (pid // tiles_in_group) * GROUP
    rows_in_group = min(row_tiles - first_row, GROUP)
    pid_in_group = pid % tiles_in_group
    return first_row + pid_in_group % rows_in_group, pid_in_group // rows_in_group


@triton.jit
def as_offset(value, OPTIONS: tl.constexpr):
    """A scalar of the offsets' type: a product with it cannot overflow where they are 64 bits."""
    return tl.full((), value, tl.int64 if OPTIONS.wide else tl.int32)


@triton.jit
def offsets(first, SIZE: tl.constexpr, OPTIONS: tl.constexpr):
    """The SIZE rows or columns from `first` on."""
    return (first + tl.arange(0, SIZE)).to(tl.int64 if OPTIONS.wide else tl.int32)


@triton.jit
def row_offsets(matrix, rows):
    """Elements from a matrix's first to each of these rows."""
    if matrix.inner_size is None:
        return rows * matrix.stride_row
    else:
        outer = (rows // matrix.inner_size) * matrix.stride_outer
        return outer + (rows % matrix.inner_size) * matrix.stride_row


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tl.split(tile.reshape((tile.shape[0], 2, tile.shape[1] // 2)).permute(0, 2, 1))
