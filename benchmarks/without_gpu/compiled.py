"""What came of compiling a case: resources, matrix instructions, and what is wrong with them."""

import re
from typing import Any

import torch
import triton

from benchmarks.without_gpu import machine_code, occupancy
from benchmarks.without_gpu.case import Case, compile_case
from fastlinear.kernels.configs.config import TARGETS, Config, arithmetic
from fastlinear.kernels.configs.legality import persistent_shared_memory
from fastlinear.kernels.launching import launch

Row = dict[str, Any]

MATRIX_INSTRUCTION = re.compile(
    r"(?:wgmma\.mma_async|tcgen05\.mma\b|mma\.sync)[\w.:]*|\bv_mfma_\w+"
)
# Loads of 16 bytes: in PTX those of what is read once, which AMD's assembly does not tell apart.
STREAMED = re.compile(
    r"ld\.global\.L1::evict_first[\w.:]*\.(?:v4\.b32|v2\.b64)|\b(?:global|buffer)_load_dwordx4"
)
# The same of what is read in any way, in PTX past registers as well.
WIDE_LOAD = re.compile(
    r"cp\.async\.cg\.\S* .*, 0x10\b|ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)"
    r"|\b(?:global|buffer)_load_dwordx4"
)
# The atomic of a sum that programs share: what they stored comes before it, what they load after.
ORDERED_ATOMIC = re.compile(
    r"atom\.global\.gpu\.acq_rel\.add|buffer_wbl2 sc1\s+s_waitcnt vmcnt\(0\).*\s+"
    r"global_atomic_add .*\s+s_waitcnt vmcnt\(0\).*\s+buffer_inv sc1"
)
# Of Triton's GPU dialect, where it takes a tile through shared memory: one of several rows, since
# that of one row is a mask of columns, which every thread has.
MOVED_TILE = re.compile(r"ttg\.(?:convert_layout|local_\w+) .*tensor<(?!1x)\d+x\d+x")
# Of PTX and of AMD's assembly. The labels that Triton's inline assembly brings along, to wait at,
# are none of these.
LABEL = re.compile(r"^(\$L__BB\d+_\d+|\.LBB\d+_\d+):")
BRANCH = re.compile(r"\b(bra|bra\.uni|s_branch|s_cbranch_\w+)\s+(\$L__BB\d+_\d+|\.LBB\d+_\d+)")
END = re.compile(r"^\s*(?:ret;|exit;|trap;|s_endpgm)")


def instructions_in_loops(assembly: str, kind: re.Pattern[str] = MATRIX_INSTRUCTION) -> list[int]:
    """How many instructions of a kind each loop of `assembly`, PTX or AMD's, has, where it has any.

    Those are in a loop that can be reached from themselves. Both sides of a branch within it count;
    what a pipeline does before and after its loop does not. In PTX, ptxas may still unroll.
    """
    # Straight runs of instructions, with how many of that kind each has and where it may go on.
    runs: list[tuple[int, list[int | str]]] = [(0, [])]
    labels: dict[str, int] = {}

    def start_run(after: bool) -> None:
        if after:
            runs[-1][1].append(len(runs))
        runs.append((0, []))

    for line in assembly.splitlines():
        if label := LABEL.match(line):
            start_run(after=True)
            labels[label[1]] = len(runs) - 1
        elif branch := BRANCH.search(line):
            runs[-1][1].append(branch[2])
            start_run(after="@" in line or "cbranch" in line)
        elif END.match(line):
            start_run(after=False)
        elif kind.search(line):
            runs[-1] = (runs[-1][0] + 1, runs[-1][1])

    def reached_from(start: int) -> set[int]:
        """What may be run after `start`, itself if it leads back there."""
        seen: set[int] = set()
        ahead = [start]
        while ahead:
            for place in runs[ahead.pop()][1]:
                place = labels[place] if isinstance(place, str) else place
                if place not in seen and place < len(runs):
                    seen.add(place)
                    ahead.append(place)
        return seen

    ahead_of = {place: reached_from(place) for place, (count, _) in enumerate(runs) if count}
    loops: dict[int, int] = {}  # by the first of its runs that has any
    for place, ahead in ahead_of.items():
        if place in ahead:
            first = min(one for one in ahead & ahead_of.keys() if place in ahead_of[one])
            loops[first] = loops.get(first, 0) + runs[place][0]
    return list(loops.values())


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern + r"(\d+)", text)
    assert found is not None, f"no {pattern} in {text}"
    return int(found[1])


def read(case: Case, steps: bool = False) -> Row:
    """Compiles `case`, and reads from the result what it takes.

    Args:
        steps: whether to read its machine code too, NVIDIA's.

    Returns:
        registers: of one thread.
        spilled: bytes of one thread.
        shared: bytes of shared memory of one program.
        matrix: how many matrix instructions one pass of its loops has.
        loops: how many loops have any.
        resident: programs that one multiprocessor is predicted to hold.
        occupancy: their warps, in percent of the most that it could hold.
        waves: how many times over the GPU is filled by occupancy.SIDE rows, outputs and inputs.
        instructions: the kinds of matrix instructions.
        sums_apart: of each product whether its steps are summed apart.
        buffers: of each operand, on NVIDIA's, how many there are, and their rows and columns.
        streamed: loads of 16 bytes in one pass of its loops.
        wide_loads: loads of 16 bytes in all.
        ordered_atomics: atomics that both acquire and release.
        moved: whether a loop brings a tile of two dimensions to other threads.
        descriptor_loads: how many loads by descriptors there are.
        selects: how many numbers are chosen out of two, on NVIDIA's.
        serialized: the assembler's note that products wait for one another, or None.
        error: the compiler's error; there is nothing else then. None where it compiles.
        code: machine_code.analysis, if asked for.
    """
    try:
        compiled = compile_case(case)
    except Exception as error:  # whatever the compiler raises is a result here
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    code = {}
    if steps and "cubin" in compiled.asm:
        code = machine_code.analysis(machine_code.disassemble(compiled.asm["cubin"]))
    return {**_taken(case, compiled), **_instructions(compiled), "error": None, "code": code}


def _taken(case: Case, compiled: Any) -> Row:
    """What it takes of a multiprocessor."""
    metadata = compiled.metadata
    if case.target == "gfx942":
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+", text)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s+", text)
    else:
        usage = machine_code.usage(compiled.asm["cubin"])
        registers = _number("REG:", usage)
        spilled = _number("STACK:", usage) + _number("LOCAL:", usage)
    resident = occupancy.resident_programs(
        case.target,
        registers,
        metadata.shared,
        metadata.num_warps,
        getattr(metadata, "tmem_size", None) or 0,
    )
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": metadata.shared,
        "resident": resident,
        "occupancy": occupancy.occupancy(case.target, resident, metadata.num_warps),
        "waves": occupancy.waves(case, resident),
    }


def _instructions(compiled: Any) -> Row:
    """What the compiler has made of it, by the texts of its stages."""
    text = compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]
    gpu_ir = compiled.asm["ttgir"]
    gpu_loop = gpu_ir.partition("scf.for")[2].rpartition("scf.yield")[0]
    buffers = []
    if "ptx" in compiled.asm:
        buffers = re.findall(
            r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x(\d+)x(\d+)x\w+,[^>]*mutable>", gpu_ir
        )
    loops = instructions_in_loops(text)
    return {
        "matrix": sum(loops),
        "loops": len(loops),
        "instructions": sorted(set(MATRIX_INSTRUCTION.findall(text))),
        "sums_apart": sums_apart(compiled.asm["ttir"]),
        "buffers": [tuple(map(int, sizes)) for sizes in buffers],
        "streamed": sum(instructions_in_loops(text, STREAMED)),
        "wide_loads": len(WIDE_LOAD.findall(text)),
        "ordered_atomics": len(ORDERED_ATOMIC.findall(text)),
        "moved": bool(MOVED_TILE.search(gpu_loop)),
        "descriptor_loads": len(re.findall(r"cp\.async\.bulk\.tensor\S*global\b", text)),
        "selects": len(re.findall(r"\bselp\.f32\b", text)),
        "serialized": machine_code.serialized(compiled.asm.get("ptx", "")),
    }


def sums_apart(ttir: str) -> list[bool]:
    """Of each product whether what it adds to is something else than the total."""
    found = []
    for dot in re.finditer(r"(%\w+) = tt\.dot ", ttir):
        # Beside a branch, or after it, the name may be another value's, or a loop's several.
        scope = re.split(rf"{dot[1]}(?::\d+)? = ", ttir[dot.end() :], maxsplit=1)[0]
        found.append(bool(re.search(rf"arith\.(?:addf|subf) .*{dot[1]}\b", scope)))
    return found


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def expected_instruction(case: Case, rows: int) -> str | None:
    """The matrix instruction that a product with tiles of `rows` rows has to contain, as a prefix.

    None where plain cores do the work.
    """
    kind = arithmetic(getattr(torch, case.dtype), case.precision)
    if case.target == "gfx942":
        return "v_mfma"
    if kind == "float32":
        return None
    if kind == "float64":
        # Triton before 3.8 has no float64 matrix instruction for sm_100.
        return None if case.target == "sm_100" and triton_version() < (3, 8) else "mma.sync"
    if case.target == "sm_90" and rows >= 64:
        return "wgmma.mma_async"
    if case.target == "sm_100" and rows >= 64:
        return "tcgen05.mma"
    return "mma.sync"


def streaming_faults(case: Case, config: Config, found: Row) -> list[str]:
    """What keeps the weights of a case of a few rows from streaming from memory into products."""
    wrong = []
    if found["moved"]:
        wrong.append("takes the weights through shared memory")
    loaded = config.block_n
    if case.target == "gfx942" and not config.reads_outputs:
        # Of the input, as wide; a kernel for one row is compiled without the others.
        loaded += 1 if case.extents()[0] == 1 else config.block_m
    threads = config.num_warps * TARGETS[case.target].warp_size
    loads = loaded * config.block_k * getattr(torch, case.dtype).itemsize // (16 * threads)
    if case.aligned and found["streamed"] < loads:
        wrong.append(f"has {found['streamed']} loads of 16 bytes a step, fewer than {loads}")
    return wrong


def few_buffers(tiles: list[tuple[int, int, int]], case: Case, found: Row) -> list[str]:
    """Which operands of asynchronous products have fewer buffers than stages, in words.

    Such a product still reads the last step's operands while the next ones are loaded.

    Args:
        tiles: rows, columns and depth of each product, again for each loop that forms it.
    """
    weights = 2 if case.product == "gated_output" else 1  # of one tile of input
    shapes: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # asynchronous or not
    for rows, columns, depth in tiles:
        asynchronous = expected_instruction(case, rows) == "wgmma.mma_async"
        shapes[asynchronous] += [(rows, depth), *[(depth, columns)] * weights]
    stages = case.products()[0][0].num_stages
    wrong = []
    for shape in sorted(set(shapes[True])):
        counts = [count for count, *sizes in found["buffers"] if tuple(sizes) == shape]
        enough, wanted = sum(count >= stages for count in counts), shapes[True].count(shape)
        if enough < wanted or len(counts) - enough > shapes[False].count(shape):
            wrong.append(
                f"has {counts} buffers for {wanted} operands of {shape[0]} x {shape[1]}, "
                f"{stages} stages deep"
            )
    return wrong


def faults(case: Case, found: Row) -> list[str]:
    """What is wrong with a compiled case, in words; empty where nothing is."""
    if found["error"]:
        return [found["error"]]
    wrong = []
    if found["spilled"]:
        wrong.append(f"spills {found['spilled']} bytes a thread")
    if found["serialized"]:
        wrong.append(f"waits for each product before the next ({found['serialized']})")
    if found["shared"] > TARGETS[case.target].shared_memory:
        wrong.append(
            f"needs {found['shared']} bytes of shared memory "
            f"of {TARGETS[case.target].shared_memory}"
        )
    if not found["resident"]:
        wrong.append(f"fits no multiprocessor with {found['registers']} registers a thread")
    if not case.products():
        return wrong
    config = case.products()[0][0]
    if config.kind == "gemv":
        return wrong + streaming_faults(case, config, found) + product_faults(case, found, [])
    options = launch.options_of(getattr(torch, case.dtype), case.precision, wide=False)
    # The products of pieces of a step make one sum, and it is the last one's that joins the total.
    products = 6 if case.precision == "bf16x6" else 1
    apart = found["sums_apart"][products - 1 :: products]
    if not apart or any(one != options.sum_steps_apart for one in apart):
        wrong.append(f"sums steps apart: {found['sums_apart']}")
    tiles = [config.tile(kernel) for config, kernel in case.products()]
    if case.product == "backward_of_two":
        tiles.append(tiles[0])
    if config.kind == "split_k":
        if case.aligned and not found["wide_loads"]:
            wrong.append("has no loads of 16 bytes")
        if found["ordered_atomics"] != (config.splits > 1):
            wrong.append(f"has {found['ordered_atomics']} atomics that acquire and release")
        # Outputs are the rows of its instructions.
        tiles = [(columns, rows, depth) for rows, columns, depth in tiles]
    if config.kind == "persistent":
        wrong += persistent_faults(case, config, found)
    elif case.precision == "ieee" and case.aligned:
        wrong += few_buffers(tiles, case, found)
    return wrong + product_faults(case, found, tiles)


def product_faults(case: Case, found: Row, tiles: list[tuple[int, int, int]]) -> list[str]:
    """What is wrong with the matrix instructions of `tiles`, one for each loop that forms one."""
    wrong = []
    expected = {expected_instruction(case, rows) for rows, _, _ in tiles} - {None}
    for one in sorted(filter(None, expected)):
        if not any(instruction.startswith(one) for instruction in found["instructions"]):
            wrong.append(f"has no {one} but {found['instructions']}")
    persistent = case.products()[0][0].kind == "persistent"  # Triton may make several of its loop
    if expected and (not found["loops"] if persistent else found["loops"] != len(tiles)):
        wrong.append(f"has {found['loops']} loops with matrix instructions, not {len(tiles)}")
    if expected and case.precision == "bf16x6" and found["matrix"] % 6:
        wrong.append(f"has {found['matrix']} matrix instructions for products of {case.precision}")
    if not expected and found["instructions"]:
        wrong.append(f"has {found['instructions']} where plain multiply-adds were asked for")
    return wrong


def persistent_faults(case: Case, config: Config, found: Row) -> list[str]:
    """What is wrong with how a compiled case of that kind loads its operands."""
    wrong = []
    most = persistent_shared_memory(config, getattr(torch, case.dtype).itemsize)
    if found["shared"] > most:
        wrong.append(
            f"needs {found['shared']} bytes of shared memory where {most} are reckoned with"
        )
    if not found["descriptor_loads"]:
        wrong.append("loads nothing by descriptors")
    short = [count for count, *_ in found["buffers"] if count < config.num_stages]
    if short or not found["buffers"]:
        # As in `few_buffers`.
        wrong.append(f"has buffers of {found['buffers']} for {config.num_stages} stages")
    if found["selects"] and not case.activation:
        # Triton starts a tile's sums as zeros or the sums so far, of which the latter are still
        # being computed; where that is no branch, every step waits for its product.
        wrong.append(f"selects {found['selects']} numbers, its sums perhaps")
    return wrong
