"""Index arithmetic that every kernel shares.

Which tile a program computes, its halves, and where a row lies in memory.
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
def locate_rows(rows, inner_size, stride_outer, stride_inner, NESTED: tl.constexpr):
    """Element offset of each row.

    NESTED rows lie on two strides, as the leading dimensions of a permuted tensor do.
    """
    if NESTED:
        return (rows // inner_size) * stride_outer + (rows % inner_size) * stride_inner
    else:
        return rows * stride_inner


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tl.split(tile.reshape((tile.shape[0], 2, tile.shape[1] // 2)).permute(0, 2, 1))
