"""Every kernel, configuration and dtype, compiled ahead of time for every GPU family.

No GPU need be at hand.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from benchmarks import resources
from benchmarks.without_gpu import compiled, machine_code
from benchmarks.without_gpu.case import Case
from benchmarks.without_gpu.compiled import MOVED_TILE, STREAMED, instructions_in_loops
from benchmarks.without_gpu.occupancy import resident_programs
from fastlinear.kernels.configs.config import TARGETS

ROOT = Path(__file__).parents[2]
ROW = {"registers": 100, "spilled": 0, "shared": 4096, "matrix": 8, "resident": 2}
LOOP = """
$L__BB0_1:
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {before};
\t@%p1 bra \t$L__BB0_5;
\tbra.uni \t$L__BB0_3;
$L__BB0_2:
\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {inner, reached from below};
$L__BB0_3:
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {inner};
\twaitLoop:
\t@!complete bra.uni waitLoop;
\t@%p2 bra \t$L__BB0_2;
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {after};
$L__BB0_5:
\tret;
"""


@pytest.mark.parametrize(
    ("options", "sample"),
    [pytest.param((), 12, id="every tile"), pytest.param(("--launches",), 18, id="launches")],
)
def test_compiles_within_the_resources_of_every_target(
    options: tuple[str, ...], sample: int, tmp_path: Path
) -> None:
    """No spill, no more shared memory than there is, and the expected matrix instructions.

    Nor does the assembler serialise them, and nothing of it is worse than in the committed table:
    of all cases, or of one in so many, drawn anew in each run, where that table is of the very
    sources at hand.
    """
    found = tmp_path / "found.json"
    # A process of its own: this one may have imported Triton as an interpreter.
    command = ["-m", "benchmarks.resources", *options, "--sample", str(sample)]
    result = compiling([*command, "--check", "--json", str(found)])
    failures = [
        line for line in result.stdout.splitlines() if line.startswith(("FAULT:", "WORSE:"))
    ]
    assert failures == []
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads(found.read_text())
    assert table["triton"] == triton.__version__
    for target in TARGETS:
        assert sum(name.startswith(f"{target} ") for name in table["cases"]) >= 15
    assert f"{len(table['cases'])} compared, 0 worse" in result.stdout or (
        "not compared" in result.stdout
    )


def compiling(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs Python where Triton compiles, as this process may have imported it to interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1500,
        cwd=ROOT,
    )


OLD_LOOP = """
from benchmarks.without_gpu import compiled
from benchmarks.without_gpu.case import Case
from fastlinear.kernels.configs.config import TARGETS
from fastlinear.kernels.forward import tiled
from fastlinear.kernels.configs.config import Config

add = tiled.add_rows_by_rows
old = add.src.replace("max(tl.cdiv(K, BLOCK_K), 1)", "tl.cdiv(K, BLOCK_K)")
assert old != add.src
add._unsafe_update_src(old)
case = Case("sm_90", "output", "bfloat16", "ieee", Config(128, 256, 64, 8, 3))
print(compiled.faults(case, compiled.read(case)))
"""


def test_loop_that_may_be_skipped_is_found_where_it_serialises() -> None:
    """By Triton 3.6; those after it write the zeros elsewhere."""
    result = compiling(["-c", OLD_LOOP])
    serialised = triton.__version__.startswith("3.6.")
    found = "['waits for each product before the next (C7515)']" if serialised else "[]"
    assert result.stdout.strip() == found, result.stderr


def test_serialised_products_are_a_fault() -> None:
    case = Case("sm_90", "grad_preactivation", "bfloat16", "ieee", None, activation="gelu")
    found: dict[str, Any] = ROW | {"error": None, "serialized": None}
    assert compiled.faults(case, found) == []
    found["serialized"] = "C7515"
    assert compiled.faults(case, found) == ["waits for each product before the next (C7515)"]


PRODUCTS = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry products(.param .u64 out, .param .u64 descriptor)
{
\t.reg .b64 %d, %o;
\t.reg .f32 %a<4>;
\tld.param.u64 %d, [descriptor];
\tld.param.u64 %o, [out];
\twgmma.fence.sync.aligned;
\twgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%a0, %a1, %a2, %a3}, %d, %d, 0, 1, 1, 0, 0;
\tmov.f32 %a1, 0f00000000;
\twgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%a0, %a1, %a2, %a3}, %d, %d, 1, 1, 1, 0, 0;
\twgmma.commit_group.sync.aligned;
\twgmma.wait_group.sync.aligned 0;
\tst.global.v4.f32 [%o], {%a0, %a1, %a2, %a3};
\tret;
}
"""


def test_assembler_s_note_on_serialised_products_is_read() -> None:
    assert "C7511" in (machine_code.serialized(PRODUCTS) or "")  # and others, by some assemblers
    assert machine_code.serialized(PRODUCTS.replace("\tmov.f32 %a1, 0f00000000;\n", "")) is None
    assert machine_code.serialized("") is None


SASS = """
.text.linear_forward_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24 ;
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/                   DEPBAR.LE SB0, 0x2 ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/               @P2 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00b0*/               @P2 STG.E.128 desc[UR4][R2.64], R4 ;
        /*00c0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00d0*/              @!P3 BRA `(.L_x_0) ;
.L_x_1:
        /*00e0*/                   EXIT ;
"""


def test_machine_code_is_counted_by_step_and_tile() -> None:
    """The step is the shortest way round, also where a tile's end leads back to the next tile."""
    assert machine_code.analysis(SASS) == {
        "matrix": 2,
        "other": 4,
        "in_flight": 1,
        "copies": 2,
        "tile": 7,
        "late_loads": 1,
        "stores": {"128": 1, "16": 1},
    }
    without = machine_code.analysis(SASS.replace("@P0 BRA `(.L_x_0)", "NOP"))
    assert (without["matrix"], without["other"], without["tile"]) == (2, 10, 1)
    assert machine_code.analysis(SASS.replace("HGMMA", "MOV"))["matrix"] == 0


def test_resources_no_worse_than_themselves() -> None:
    table = {"sm_80 output": ROW, "sm_90 output": ROW}
    assert resources.worsened(table, table) == []


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("spilled", 4, "4 spilled bytes a thread, was 0"),
        ("shared", 4112, "4112 bytes of shared memory, was 4096"),
        ("matrix", 7, "7 matrix instructions in the loop, was 8"),
        ("registers", 109, "109 registers a thread, was 100"),
        ("resident", 1, "1 programs a multiprocessor, was 2"),
    ],
)
def test_resources_names_the_case_that_got_worse(column: str, value: int, message: str) -> None:
    committed = {"sm_80 output": ROW, "sm_90 output": ROW}
    found = {"sm_80 output": ROW, "sm_90 output": ROW | {column: value}}
    assert resources.worsened(found, committed) == [f"sm_90 output: {message}"]
    assert resources.worsened(committed, found) == []  # which got better


def test_resources_lets_a_few_registers_pass() -> None:
    found = {"sm_80 output": ROW | {"registers": ROW["registers"] + 8}}
    assert resources.worsened(found, {"sm_80 output": ROW}) == []


def test_resources_names_missing_and_new_cases() -> None:
    assert resources.worsened({"sm_80 output": ROW}, {"sm_90 output": ROW}) == [
        "sm_80 output: new, not in the committed table",
        "sm_90 output: missing, but in the committed table",
    ]


def test_resources_says_that_another_triton_is_not_compared() -> None:
    assert resources.why_incomparable("3.7.9", "3.7.1") is None
    assert resources.why_incomparable("3.10.0", "3.1.0") == (
        "not compared: the table is of Triton 3.1, this is Triton 3.10"
    )


def test_resources_of_other_sources_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any kernel's source counts; the tables that are committed are of those that are committed."""
    for table in (resources.COMMITTED, resources.LAUNCHES):
        committed = json.loads(table.read_text())
        assert committed["sources"] == resources.sources(), "run benchmarks.resources --json"
    changed = tmp_path / "kernels"
    shutil.copytree(resources.SHIPPED.parent, changed)
    monkeypatch.setattr(resources, "SHIPPED", changed / "resources.json")
    assert resources.sources() == committed["sources"]
    (changed / "language" / "reduction.py").write_text("# another\n")
    assert resources.sources() != committed["sources"]


def test_resources_reads_back_what_it_writes(tmp_path: Path) -> None:
    row = ROW | {"occupancy": 25, "waves": 1.5, "error": None}
    written = tmp_path / "resources.json"
    resources.write_table({"b": row, "a": row, "failed": {"error": "no such thing"}}, written)
    read = json.loads(written.read_text())
    assert read["triton"] == triton.__version__
    assert list(read["cases"]) == ["a", "b"]
    assert resources.worsened({"a": row, "b": row}, read["cases"]) == []


def test_resources_counts_matrix_instructions_in_loops() -> None:
    """Not those before and after; a loop need not be entered at its top; each loop by itself."""
    amd = LOOP.replace("$L__", ".L").replace("@%p1 bra", "s_cbranch_vccz")
    amd = amd.replace("@%p2 bra", "s_cbranch_scc1").replace("bra.uni \t.", "s_branch .")
    other = LOOP.replace("$L__BB0_", "$L__BB0_1")
    assert instructions_in_loops(LOOP) == [2]
    assert instructions_in_loops(amd) == [2]
    assert instructions_in_loops(LOOP + other) == [2, 2]
    assert instructions_in_loops(LOOP.replace("@%p2 bra \t$L__BB0_2;", "")) == []


STREAM = """
$L__BB0_1:
\t@%p2 ld.global.L1::evict_first.L2::cache_hint.v4.b32 { %r40, %r41, %r42, %r43 }, [ %rd21 ], %rd8;
\t@%p2 ld.global.L1::evict_first.L2::cache_hint.v2.b64 { %rd40, %rd41 }, [ %rd21 ], %rd8;
\t@%p2 ld.global.L1::evict_first.L2::cache_hint.v2.b32 { %r40, %r41 }, [ %rd21 ], %rd8;
\t@%p2 ld.global.v4.b32 { %r40, %r41, %r42, %r43 }, [ %rd21 ];
\t@%p2 bra \t$L__BB0_1;
\t@%p2 ld.global.L1::evict_first.L2::cache_hint.v4.b32 { %r40, %r41, %r42, %r43 }, [ %rd21 ], %rd8;
\tret;
"""


def test_resources_counts_wide_loads_of_what_is_read_once() -> None:
    assert instructions_in_loops(STREAM, STREAMED) == [2]
    amd = (
        ".LBB0_1:\n\tglobal_load_dwordx4 v[6:9], v[30:31], off\n\tglobal_load_dword v6, v[30:31]\n"
    )
    assert instructions_in_loops(amd + "\ts_cbranch_scc1 .LBB0_1\n", STREAMED) == [1]


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%1 = ttg.convert_layout %0 : tensor<4x1024xbf16, #a> -> tensor<4x1024xbf16, #b>", True),
        ("%1 = ttg.local_alloc %0 : (tensor<4x1024xbf16, #a>) -> !ttg.memdesc<4x1024xbf16>", True),
        ("%1 = ttg.convert_layout %0 : tensor<1024xbf16, #a> -> tensor<1024xbf16, #b>", False),
        ("%1 = ttg.convert_layout %0 : tensor<1x1024xi1, #a> -> tensor<1x1024xi1, #b>", False),
        ("%1 = arith.mulf %0, %0 : tensor<4x1024xf32, #a>", False),
    ],
)
def test_resources_tells_tiles_that_pass_through_shared_memory(line: str, moved: bool) -> None:
    assert bool(MOVED_TILE.search(line)) == moved


@pytest.mark.parametrize(
    ("target", "taken", "programs"),
    [
        pytest.param("sm_90", (32, 0, 8), 8, id="threads"),
        pytest.param("sm_90", (32, 0, 1), 32, id="programs"),
        pytest.param("sm_90", (255, 0, 4), 2, id="registers"),
        pytest.param("sm_80", (136, 0, 8), 1, id="registers of each quarter"),  # 3 warps in each
        pytest.param("sm_80", (128, 0, 8), 2, id="registers, all of them"),
        pytest.param("sm_90", (32, 113 * 1024, 4), 2, id="shared memory, all of it"),
        pytest.param("sm_90", (32, 113 * 1024 + 1, 4), 1, id="shared memory"),
        pytest.param("sm_90", (32, 232_448, 4), 1, id="the most shared memory"),
        pytest.param("sm_100", (32, 0, 4, 256), 2, id="tensor memory"),
        pytest.param("gfx942", (128, 0, 4), 4, id="AMD registers"),
        pytest.param("gfx942", (64, 32_768, 4), 2, id="AMD shared memory"),
    ],
)
def test_occupancy_is_bounded_by(target: str, taken: tuple[int, ...], programs: int) -> None:
    assert resident_programs(target, *taken) == programs
