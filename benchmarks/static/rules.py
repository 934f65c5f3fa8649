"""The rules of the static report: what no launch config may do, what no chosen one may, and who is excused of which."""

from .occupancy import KB

THOROUGH = (80, 90)
"""Architectures whose own limit of shared memory counts: 90 has attention tables of its own, 80 stands for all that
share the common ones.
"""
FALLBACK_SHARED = 99 * KB

SERIALISED = "its wgmma are serialised"
CONVERTS = "converts single values in its loop with wgmma"
WAITS = "waits for all copies in its loop with wgmma"

EXCUSED = {
    ("attention_jvp", 64, "64x32 w4 s2 packed"): (
        WAITS,
        "of two steps at 64 tokens: 19.04 us for B/4's step, 19.20 by 64x32 w4 s3 packed, which copies ahead",
    ),
    ("attention_jvp", 72, "64x64 w4 s2"): (
        WAITS,
        (
            "of one step at 64 tokens; where the persistent kernel does not serve, 0.88 ms for 256 samples of 256 "
            "tokens, 1.02 by 128x64 w8 s3 packed separate, which copies ahead"
        ),
    ),
    ("attention", 72, "64x128 w4 s2"): (WAITS, "of one step below 128 tokens: nothing to copy ahead; not timed there"),
}
"""By (op, head dim, config): the rule for chosen configs that it breaks, and why it is chosen nevertheless. Times are
of an H200, by ``benchmarks.tune``.
"""


def problems(row: dict) -> list[str]:
    """The rules for every config, candidates too, that a row breaks, in words."""
    if "error" in row:
        return [f"does not compile: {row['error'].splitlines()[-1]}"]
    found = []
    arch = int(row["arch"].removeprefix("sm_"))
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    limit = row["shared_limit_bytes"] if arch in THOROUGH else min(FALLBACK_SHARED, row["shared_limit_bytes"])
    if row["shared_bytes"] > limit:
        found.append(f"asks for {row['shared_bytes']} bytes of shared memory, a block may have {limit}")
    half = row["dtype"] in ("float16", "bfloat16")
    narrow = [name for name, width in row["global_loads"].items() if width <= 2]
    if half and narrow:
        found.append(f"loads 2 bytes a thread from {', '.join(narrow)}")
    if half and arch == 90 and row["folder"] == "attention" and row["dots"] and not row["wgmma"]:
        found.append("multiplies matrices without wgmma")
    return found


def exposed(row: dict) -> list[str]:
    """The rules for chosen configs that a row of sm_90's attention forward breaks at the models' head dims: what in its
    loop leaves the tensor cores waiting.
    """
    forward = row["op"] in ("attention", "attention_jvp") and row["dtype"] in ("float16", "bfloat16")
    if row["arch"] != "sm_90" or not forward or row["head_dim"] not in (64, 72) or not row.get("wgmma"):
        return []
    if "loop_wgmma" not in row:
        return ["shows no loop with wgmma"]
    found = [SERIALISED] * row["wgmma_serialized"] + [CONVERTS] * bool(row["loop_conversions"])
    # the persistent kernel's loop loads nothing: other warps do, and it waits for the one slot that it reads
    return found + [WAITS] * bool(row["loop_loads"] and not row["loop_copies_in_flight"])


def judge(row: dict) -> None:
    """Add to a chosen config's row what it breaks of :func:`exposed`, under ``problems`` or, in a line, ``excused``."""
    chosen = row["op"], row.get("head_dim"), row["config"].removesuffix(" ragged")
    rule, why = EXCUSED.get(chosen, (None, ""))
    broken = exposed(row)
    row["problems"] += [x for x in broken if x != rule]
    row["excused"] = f"{' '.join(map(str, chosen))}: {rule}, {why}" if rule in broken else ""
