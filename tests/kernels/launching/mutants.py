"""Bugs planted in kernels/launching/, each with the tests that have to notice it."""

from mutant import Mutant

FORWARD = ("tests/kernels/forward/test_forward.py",)
DISPATCH = ("tests/ops/test_dispatch.py",)
LAUNCHED = ("tests/kernels/launching/test_compiled_launch.py",)
PERSISTENT = ("tests/kernels/forward/test_persistent.py",)
INTERRUPTED = (
    "tests/api/test_faults.py::test_interrupted_launch_leaves_nothing_for_the_next_to_trip_over",
)

MUTANTS = [
    Mutant(
        "direct launches lend no memory, persistent",
        "kernels/launching/compiled_launch.py",
        "_with_memory(kernel.run, launch),",
        "kernel.run,",
        PERSISTENT,
    ),
    Mutant(
        "TF32 forced",
        "kernels/launching/launch.py",
        '    precision = precision if dtype == torch.float32 else "ieee"\n',
        '    precision = "tf32" if dtype == torch.float32 else "ieee"\n',
        FORWARD,
    ),
    Mutant(
        "float64 accumulated in float32",
        "kernels/language/precision.py",
        "    if ptr.dtype.element_ty == tl.float64:\n",
        "    if ptr.dtype.element_ty == tl.int64:\n",
        FORWARD,
    ),
    Mutant(
        "one plan for aligned and unaligned operands",
        "kernels/launching/launch.py",
        "one.device, not one.data_ptr() % 16)",
        "one.device, True)",
        DISPATCH,
    ),
    Mutant(
        "one compiled kernel for all alignments",
        "kernels/launching/compiled_launch.py",
        "key = specialization(pointers) if bits % 16 or AMD else ()",
        "key = ()",
        LAUNCHED,
    ),
    Mutant(
        "the last pointer's alignment stands for all",
        "kernels/launching/compiled_launch.py",
        "bits |= address",
        "bits = address",
        LAUNCHED,
    ),
    Mutant(
        "a Triton that is not known counted as known",
        "kernels/launching/compiled_launch.py",
        """return version.startswith(tuple(f"{one}." for one in KNOWN))""",
        "return True",
        LAUNCHED,
    ),
    Mutant(
        "whether products and sums fuse left to Triton",
        "kernels/launching/compiled_launch.py",
        """options = options | {"enable_fp_fusion": True}""",
        "pass",
        LAUNCHED,
    ),
    Mutant(
        "sizes of storages left out on AMD",
        "kernels/launching/compiled_launch.py",
        "    if not AMD:\n",
        "    if True:\n",
        LAUNCHED,
    ),
    Mutant(
        "another kernel taken for the one of the launch",
        "kernels/launching/compiled_launch.py",
        "if compiled is None or compiled[0] is not kernel:",
        "if compiled is None:",
        LAUNCHED,
    ),
    Mutant(
        "launch hooks passed by",
        "kernels/launching/compiled_launch.py",
        "if not (assigned or ENTER.calls or LEAVE.calls or kernel.pre_run_hooks):",
        "if not (assigned or ENTER.calls or kernel.pre_run_hooks):",
        LAUNCHED,
    ),
    Mutant(
        "launched on the current device",
        "kernels/launching/compiled_launch.py",
        "    if not only_device and device != torch.cuda.current_device():\n",
        "    if False:\n",
        LAUNCHED,
    ),
    Mutant(
        "compiled kernels kept without end",
        "kernels/launching/compiled_launch.py",
        "if len(launch.compiled) >= LARGEST_CACHE:",
        "if False:",
        LAUNCHED,
    ),
    Mutant(
        "streams share their counters",
        "kernels/launching/shared_sums.py",
        "stream = torch.cuda.current_stream(device).cuda_stream",
        "stream = 0",
        ("tests/kernels/launching/test_launch.py",),
    ),
    Mutant(
        "counters of an interrupted launch are used again",
        "kernels/launching/shared_sums.py",
        "    except BaseException:\n",
        "    except ZeroDivisionError:\n",
        INTERRUPTED,
    ),
]
