"""What NVIDIA's assembler has made of a kernel: its machine code, and what it says of it."""

import collections
import heapq
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas  # of the several in Triton's wheel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET_LABEL = re.compile(r"`\((\.L_x_\d+)\)")
MATRIX = re.compile(r"^(?:HGMMA|QGMMA|IGMMA|HMMA|DMMA|UTCHMMA|UTCQMMA)\b")
MULTIPLY = re.compile(r"^(?:FFMA|DFMA|HFMA2)\b")  # of kernels without matrix instructions
# How many products, and how many copies of operands, may be under way after a wait.
PRODUCTS_WAIT = re.compile(r"gsb0, (0x[0-9a-f]+)")
COPIES_WAIT = re.compile(r"SB0, (0x[0-9a-f]+)")
# The assembler has each product wait for the one before, or adds waits.
SERIALIZED = re.compile(r"\((C75\d\d)\)")


@dataclass
class Block:
    """Instructions in a row, each with its operands, and the numbers of the blocks after it."""

    instructions: list[tuple[str, str]] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def count(self, kind: re.Pattern[str]) -> int:
        return sum(bool(kind.match(name)) for name, _ in self.instructions)


def blocks_of(sass: str) -> list[Block]:
    """The blocks of a kernel, in the order of its code, as nvdisasm prints it."""
    blocks, labels, jumps = [Block()], {}, []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            blocks[-1].after.append(len(blocks))
            labels[label[1]] = len(blocks)
            blocks.append(Block())
        elif found := INSTRUCTION.match(line):
            name, rest = found[1], found[2]
            blocks[-1].instructions.append((name, rest))
            if name.startswith(("BRA", "EXIT", "RET")):
                if jump := TARGET_LABEL.search(rest):
                    jumps.append((len(blocks) - 1, jump[1]))
                if "@" in line or "UP" in rest.split("`")[0]:
                    blocks[-1].after.append(len(blocks))
                blocks.append(Block())
    for place, label in jumps:
        blocks[place].after.append(labels[label])
    for block in blocks:
        block.after = [place for place in block.after if place < len(blocks)]
    return blocks


def shortest_cycle(blocks: list[Block], start: int) -> list[int]:
    """The blocks of the fewest instructions that lead from one back to itself; none if no loop."""
    queue: list[tuple[int, int, list[int]]] = [(0, start, [start])]
    seen: set[int] = set()
    while queue:
        length, place, way = heapq.heappop(queue)
        for after in blocks[place].after:
            if after == start:
                return way
            if after not in seen:
                seen.add(after)
                longer = length + len(blocks[after].instructions)
                heapq.heappush(queue, (longer, after, [*way, after]))
    return []


def reachable(blocks: list[Block], starts: list[int]) -> set[int]:
    seen, ahead = set(starts), list(starts)
    while ahead:
        for place in blocks[ahead.pop()].after:
            if place not in seen:
                seen.add(place)
                ahead.append(place)
    return seen


def main_step(blocks: list[Block]) -> list[int]:
    """The blocks of one step of the loop that multiplies most; none without a loop that does."""
    for kind in (MATRIX, MULTIPLY):
        counts = [(block.count(kind), place) for place, block in enumerate(blocks)]
        for _, place in sorted((one for one in counts if one[0]), reverse=True):
            if step := shortest_cycle(blocks, place):
                return step
    return []


def analysis(sass: str) -> dict[str, Any]:
    """What a warp runs of a kernel.

    Returns:
        matrix: tensor-core instructions of a step of the main loop.
        other: its other instructions.
        in_flight: the fewest products that a wait in that step leaves running, and
        copies: the fewest copies of operands; None where nothing waits so.
        tile: instructions that are there after the main loop: of the end of a tile, of other sums.
        late_loads: loads from memory among those that come after a barrier.
        stores: how many stores there are of each width in bits, and by descriptors ("TMA").
    """
    blocks = blocks_of(sass)
    step = main_step(blocks)
    ahead = sorted(reachable(blocks, step) - set(step)) if step else range(len(blocks))
    of_step = [one for place in step for one in blocks[place].instructions]
    of_tile = [one for place in ahead for one in blocks[place].instructions]
    matrix = sum(bool(MATRIX.match(name)) for name, _ in of_step)
    barrier, late = False, 0
    stores: collections.Counter[str] = collections.Counter()
    for name, _ in of_tile:
        barrier |= name.startswith("BAR.")
        late += barrier and name.startswith("LDG")
        if name.startswith("UTMASTG"):
            stores["TMA"] += 1
        elif name.startswith("STG"):
            width = re.search(r"\.(128|64|U16|U8)\b", name)
            stores[width[1].lstrip("U") if width else "32"] += 1

    def fewest(name: str, pattern: re.Pattern[str]) -> int | None:
        waits = [pattern.search(rest) for one, rest in of_step if one.startswith(name)]
        return min((int(one[1], 16) for one in waits if one), default=None)

    return {
        "matrix": matrix,
        "other": len(of_step) - matrix,
        "in_flight": fewest("WARPGROUP.DEPBAR", PRODUCTS_WAIT),
        "copies": fewest("DEPBAR", COPIES_WAIT),
        "tile": len(of_tile),
        "late_loads": late,
        "stores": dict(sorted(stores.items())),
    }


def run(tool: str, content: bytes, suffix: str, *options: str) -> str:
    """What one of the tools in Triton's wheel prints of a file."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def disassemble(cubin: bytes) -> str:
    return run("nvdisasm", cubin, ".cubin", "-c")


def usage(cubin: bytes) -> str:
    """Registers, stack and memory that a kernel takes."""
    return run("cuobjdump", cubin, ".cubin", "-res-usage")


def serialized(ptx: str) -> str | None:
    """The assembler's notes on asynchronous products that wait for one another, or None."""
    if "wgmma" not in ptx:
        return None  # Hopper's, of which alone it says so
    options = ("-v", "--gpu-name=sm_90a", "-o", "/dev/null")
    notes = SERIALIZED.findall(run(get_ptxas(90).path, ptx.encode(), ".ptx", *options))
    return ", ".join(sorted(set(notes))) or None
