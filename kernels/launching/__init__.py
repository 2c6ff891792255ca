"""What launchers share on the host: how operands lie, what they must be, and the launch itself.

`operands.py` checks, without Triton; `launch.py` describes operands and devices;
`compiled_launch.py` launches, past Triton where that is known to be right; `shared_sums.py` has the
workspaces of sums that programs share. Start with `compiled_launch.run`.
"""
