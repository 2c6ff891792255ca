"""Sums that several programs share, and that come out the same in every run.

Each program stores its part to a slice of its own. The last one to arrive adds the slices, in their
order and not in that of arrival, so that one launch is enough.
"""

import triton
import triton.language as tl


@triton.jit
def arrives_last(counter_ptr, programs):
    """Whether this program is the last of `programs` to get here: each has stored its part then.

    The counter (int32) starts as 0 and is left as 0 by the last one, for the next launch. What
    others stored is to be loaded past L1 (cache_modifier ".cg"), which may hold it as it was.
    """
    # Every thread's part is stored before one thread counts for all, and that one's release and
    # acquire order the parts of all programs before what is loaded next. The barriers hand that
    # order on from and to the other threads.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_slices(partial_ptrs, mask, slices, slice_size):
    """sum_s partial[s * slice_size], in the order of s.

    For the last to arrive. Its own part is read back like the others: kept, it would come first or
    last. All are read from L2, where those are that others have stored in this launch.
    """
    acc = tl.zeros(partial_ptrs.shape, dtype=partial_ptrs.dtype.element_ty)
    for _ in range(slices):
        acc += tl.load(partial_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        partial_ptrs += slice_size
    return acc
