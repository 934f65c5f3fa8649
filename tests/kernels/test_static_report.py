"""The static report: its rules can fail, and every shipped launch config keeps them."""

import json
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

pytest.importorskip("triton", reason="the report compiles Triton kernels")

from benchmarks.static.occupancy import KB, LIMITS, occupancy, resident_blocks
from benchmarks.static.ptx import Access, global_accesses
from benchmarks.static.rules import CONVERTS, EXCUSED, SERIALISED, WAITS, judge
from benchmarks.static.sass import wgmma_loop
from benchmarks.static_report import cases, folders

ROOT = Path(__file__).parents[2]


def _python(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python from the repository's root without the interpreter, in which nothing can be compiled."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=fresh.environment(), capture_output=True, text=True
    )


ARCHS = ["sm_80", "sm_90", pytest.param("sm_120", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def broken(request) -> dict:
    """Rows of configs that break a rule each, by (config, architecture)."""
    archs = ("80", "90", *("120",) * request.config.getoption("--full"))
    run = _python("tests/kernels/broken_configs.py", *archs)
    assert run.returncode == 0, run.stderr
    return {(row["config"], row["arch"]): row for row in json.loads(run.stdout)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("spills", "spills"),
        ("narrow", "2 bytes a thread from q_ptr, k_ptr"),
        ("much shared memory", "shared memory"),
        ("does not compile", "does not compile: arange's range must be a power of 2"),
    ],
)
def test_broken_rule_is_found(broken, config, words, arch):
    problems = broken[config, arch]["problems"]
    assert len(problems) == 1 and words in problems[0]


def test_missing_wgmma_is_found_on_hopper_only(broken):
    assert broken["no wgmma", "sm_90"]["problems"] == ["multiplies matrices without wgmma"]
    assert broken["no wgmma", "sm_90"]["mma"] > 0
    assert broken["no wgmma", "sm_80"]["problems"] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_sound_config_has_no_problem(broken, arch):
    row = broken["sound", arch]
    assert row["problems"] == []
    # the fp32 row statistics are listed, and neither they nor the scalar timestep are the narrowest load
    assert row["global_loads"] == {"q_ptr": 16, "k_ptr": 16, "lse_ptr": 4}
    assert row["narrowest_global_load_bytes"] == 16
    assert row["global_stores"] == {"o_ptr": 16}
    assert (row["wgmma"] > 0) == (arch == "sm_90")


def test_narrow_loads_of_single_precision_are_no_problem(broken):
    row = broken["single precision", "sm_90"]
    assert row["narrowest_global_load_bytes"] == 4
    assert row["problems"] == []


def test_interpreted_kernels_are_refused():
    code = "from benchmarks.static_report import report; report([('attention', 90, None)], 1)"
    run = _python("-c", f"import os; os.environ['TRITON_INTERPRET'] = '1'; {code}")
    assert run.returncode != 0
    assert "TRITON_INTERPRET: got 1, wanted it unset" in run.stderr


PTX = """
    .param .u64 .ptr .global .align 1 f_param_0,
    ld.param.b64    %rd1, [f_param_0];
    ld.param.b64    %rd2, [f_param_1];
    ld.param.b32    %r9, [f_param_2];
    mov.u32         %r1, %ctaid.x;
    mov.u32         %r2, %tid.x;
    mul.wide.s32    %rd3, %r1, 4;
    add.s64         %rd4, %rd1, %rd3;
    ld.global.b16 { %rs1 }, [ %rd4 + 0 ];
    mad.wide.s32    %rd5, %r2, 16, %rd2;
    @%p1 ld.global.L1::evict_last.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd5 + 0 ];
    mov.b64         %rd6, %rd5;
$L__BB0_1:
    @%p2 cp.async.ca.shared.global [ %r7 + 0 ], [ %rd6 + 0 ], 0x8, %r8;
    add.s64         %rd6, %rd6, 64;
    @%p3 bra        $L__BB0_1;
    ld.shared.b64   %rd7, [%r7];
    st.global.v2.b32 [ %rd7 + 0 ], { %r3, %r4 };
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r7], [%rd1, {%r1, %r2}], [%r8];
    ret;
"""


def test_accesses_are_known_by_argument_width_and_sharing():
    assert global_accesses(PTX, ["scale_ptr", "x_ptr", ""]) == [
        Access("scale_ptr", 2, is_store=False, is_scalar=True),
        Access("x_ptr", 16, is_store=False, is_scalar=False),
        Access("x_ptr", 8, is_store=False, is_scalar=False),
        Access("?", 8, is_store=True, is_scalar=False),
        Access("tma", 16, is_store=False, is_scalar=False),
    ]


SASS = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0010*/                   F2F.BF16.F32 R1, R2 ;
.L_x_0:
        /*0020*/                   DEPBAR.LE SB0, 0x4 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_1:
        /*0040*/              @P1 BRA `(.L_x_1) ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0058*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   F2F.BF16.F32 R5, R6 ;
        /*0080*/                   F2FP.BF16.F32.PACK_AB R7, R8, R9 ;
        /*0090*/             @!P0 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def test_the_loop_with_wgmma_is_counted():
    counts = wgmma_loop(SASS)
    assert counts == {
        "loop_instructions": 9,
        "loop_wgmma": 1,
        "loop_wgmma_waits": 1,
        "loop_conversions": 1,
        "loop_barriers": 1,
        "loop_loads": 1,
        "loop_copies_in_flight": 4,
    }
    assert wgmma_loop(SASS.replace("HGMMA", "HMMA")) == {}
    # neither the loop around it, which has one more, nor a wait behind it that branches back into its middle
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;"
    around = SASS.replace("\n", "\n.L_x_9:\n", 1).replace("EXIT ;", f"{product}\n BRA `(.L_x_9) ;")
    behind = SASS.replace("EXIT ;", "NOP ;\n NOP ;\n NOP ;\n BRA `(.L_x_1) ;")
    assert wgmma_loop(around) == wgmma_loop(behind) == counts


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        (90, 168, 48 * KB, 4, 3),  # 12 warps of 168 registers fill the register file
        (90, 32, 112 * KB, 4, 2),  # two blocks and their reserved kilobytes fill the shared memory
        (90, 32, 0, 1, 32),  # the most blocks
        (80, 64, 0, 8, 4),  # 32 warps of 64 registers
        (86, 32, 0, 8, 6),  # 48 warps
        (120, 255, 100 * KB, 4, 0),  # more shared memory than a block may have
    ],
)
def test_occupancy_by_hand(arch, registers, shared, warps, blocks):
    assert resident_blocks(arch, registers=registers, shared_bytes=shared, warps=warps) == blocks
    assert occupancy(arch, registers=registers, shared_bytes=shared, warps=warps) == blocks * warps / LIMITS[arch].warps


def _report(tmp_path: Path, *arguments: str, program: tuple = ("-m", "benchmarks.static_report")) -> list[dict]:
    path = tmp_path / "report.json"
    run = _python(*program, "--json", str(path), *arguments)
    # 1: a config breaks a rule, and the tests say which
    assert run.returncode in (0, 1), run.stderr
    assert f"{len(json.loads(path.read_text()))} configs" in run.stdout
    return json.loads(path.read_text())


HEAD_DIMS = {32, 64, 72, 96, 128}
WIDTHS = {72: {1152, 4608, 256}, 64: set()}
"""Head dims of all DiT. That of XL/2, the largest, with its widths: the blocks, their MLPs, the times' embedding."""
REPORT_OF_WIDTHS = """
import sys
from benchmarks import static_report
cases = static_report.cases
static_report.cases = lambda *args, **options: [row for row in cases(*args, **options) if row[2].width in {}]
sys.exit(static_report.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module", params=[72, pytest.param(64, marks=pytest.mark.slow)], ids="head dim {}".format)
def head_dim(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def shipped(head_dim, tmp_path_factory) -> list[dict]:
    """Rows of a head dim's launch configs on the architecture that most of them are tuned for."""
    program = ("-c", REPORT_OF_WIDTHS.format(WIDTHS[head_dim] | {head_dim}))
    return _report(tmp_path_factory.mktemp("report"), "--arch", "sm_90", program=program)


def _broken(rows: list[dict]) -> list[str]:
    columns = ("op", "arch", "dtype", "head_dim", "width", "config", "problems")
    return [" ".join(str(row[c]) for c in columns if c in row) for row in rows if row["problems"]]


def test_shipped_configs_keep_the_rules(shipped):
    assert _broken(shipped) == []


# what lets the tensor cores wait, and is chosen: rules.py has the reason and the times of each
CHOSEN_NEVERTHELESS = {
    ("attention_jvp", 64, "64x32 w4 s2 packed"),
    ("attention_jvp", 72, "64x64 w4 s2"),
    ("attention", 72, "64x128 w4 s2"),
}


def test_chosen_attention_hides_its_copies_or_is_excused(shipped, head_dim):
    assert EXCUSED.keys() == CHOSEN_NEVERTHELESS
    # none that breaks no rule any more, or is gone
    excused = {row["excused"].partition(":")[0] for row in shipped} - {""}
    assert excused == {f"{a} {b} {c}" for a, b, c in EXCUSED if b == head_dim}
    forward = [row for row in shipped if row["op"] in ("attention", "attention_jvp")]
    # the persistent kernel loads in other warps than multiply
    assert {row["config"].split()[0] for row in forward if not row["loop_loads"]} == {"persistent"}
    assert all(row["loop_copies_in_flight"] for row in forward if row["loop_loads"] and not row["excused"])


FORWARD = {
    **dict(op="attention_jvp", arch="sm_90", dtype="bfloat16", head_dim=72, config="128x64 w8 s3 ragged", wgmma=13),
    **dict(wgmma_serialized=False, loop_wgmma=13, loop_conversions=0, loop_loads=10, loop_copies_in_flight=4),
}


def _judged(**columns) -> tuple[list[str], bool]:
    row = FORWARD | columns | {"problems": []}
    judge(row)
    return row["problems"], bool(row["excused"])


def test_rules_of_chosen_attention_can_fail():
    assert _judged() == ([], False)
    assert _judged(wgmma_serialized=True) == ([SERIALISED], False)
    assert _judged(loop_conversions=16) == ([CONVERTS], False)
    assert _judged(loop_copies_in_flight=0) == ([WAITS], False)
    assert _judged(loop_copies_in_flight=0, loop_loads=0) == ([], False)
    unseen = {key: value for key, value in FORWARD.items() if not key.startswith("loop_")} | {"problems": []}
    judge(unseen)
    assert unseen["problems"] == ["shows no loop with wgmma"]
    # candidates, other architectures and dtypes, the backward and other head dims have no such rule
    for other in ({"arch": "sm_80"}, {"dtype": "float32"}, {"op": "attention_bwd_dq"}, {"head_dim": 96}):
        assert _judged(loop_copies_in_flight=0, **other) == ([], False)
    # an excuse is for one rule of one config, ragged or not
    for config in "64x64 w4 s2", "64x64 w4 s2 ragged":
        assert _judged(config=config, loop_copies_in_flight=0) == ([], True)
        assert _judged(config=config, loop_copies_in_flight=0, loop_conversions=16) == ([CONVERTS], True)
    assert _judged(config="64x64 w4 s2") == ([], False)
    assert _judged(config="64x64 w4 s2", head_dim=64, loop_copies_in_flight=0) == ([WAITS], False)


def test_report_covers_every_kernel():
    kernels = (ROOT / "kernels/meanflow_kernels").glob("*/kernel.py")
    wanted = {path.parent.name for path in kernels if path.with_name("op.py").exists()}
    assert wanted and {folder for folder, _, _ in cases(list(folders()), [90], full=False)} == wanted


@pytest.mark.parametrize("arch", [80, 90])
def test_report_covers_every_head_dim(arch):
    assert {case.width for _, _, case in cases(["attention"], [arch], full=False)} >= HEAD_DIMS


def test_persistent_kernel_overlaps_its_products(shipped, head_dim):
    rows = [x for x in shipped if x["config"].startswith("persistent")]
    found = {(x["op"], x["head_dim"], x["config"].endswith("ragged")) for x in rows}
    assert len(rows) == 2 and found == {("attention_jvp", head_dim, ragged) for ragged in (False, True)}
    for row in rows:
        # no product waits for another but where it needs its result
        assert row["loop_wgmma_waits"] == 3 and row["loop_wgmma"] == {64: 24, 72: 39}[head_dim]
        # twelve warps of the 64 that a multiprocessor has room for
        assert row["occupancy"] == 12 / 64 and row["narrowest_global_load_bytes"] == 16


# at head dim 72 these take 8 bytes a thread of the 16-wide column tile, and were the fastest on an H200 all the same
NARROW = {("attention", 72), ("attention_bwd_dq", 72)}


def _assert_attention_loads_sixteen_bytes(rows: list[dict], head_dims: set[int]) -> None:
    half = [row for row in rows if row["folder"] == "attention" and row["dtype"] in ("bfloat16", "float16")]
    narrow = [row for row in half if row["head_dim"] in head_dims and row["narrowest_global_load_bytes"] < 16]
    assert half and {(row["op"], row["head_dim"]) for row in narrow} == {x for x in NARROW if x[1] in head_dims}
    assert all(row["narrowest_global_load_bytes"] == 8 for row in narrow)


def test_attention_loads_sixteen_bytes(shipped, head_dim):
    _assert_attention_loads_sixteen_bytes(shipped, {head_dim})


def test_rows_have_the_columns(shipped):
    columns = "op arch config registers spill_bytes shared_bytes wgmma mma narrowest_global_load_bytes".split()
    for row in shipped:
        assert not [c for c in columns if c not in row] and ("head_dim" in row or "width" in row)


@pytest.mark.slow
def test_shared_configs_keep_the_rules_on_every_architecture(tmp_path):
    rows = _report(tmp_path, "--full")
    assert {row["arch"] for row in rows} == {f"sm_{arch}" for arch in LIMITS}
    assert _broken(rows) == []
    _assert_attention_loads_sixteen_bytes([row for row in rows if row["arch"] == "sm_90"], {64, 72})
    # architectures without configs of their own share those that fit 99 KB
    assert all(row["shared_bytes"] <= 99 * KB for row in rows if row["arch"] not in ("sm_80", "sm_90"))
