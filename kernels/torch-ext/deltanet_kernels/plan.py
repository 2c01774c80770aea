"""Every decision of a chunked call, made once: which kernels run, Gluon's or Triton's, with which tiles, on how many
segments.

`make_plan` is a pure function of shapes, strides, dtype, alignment, device and switches (DELTANET_KERNELS), cached.
Forward makes the plan and leaves it to backward. `print(plan)` tells what runs and why; DELTANET_KERNELS=explain logs
it for each kind of call.

There is no autotuning: a first call must cost seconds, not minutes, so nothing is swept on the user's time. Each line
of the launch table has its reason beside it; `benchmarks/README.md` holds the figures.
`tests/ops/test_compile_chunk.py` compiles every line for each architecture.
"""

import functools
import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from . import _switch
from ._launch import TRITON
from .limits import CHUNK


# Gluon is experimental in Triton, so its kernels run beside the versions that they were compiled and run with (3.8
# compiles them); other versions, and Triton's interpreter, which has none for Gluon, get the Triton kernels
GLUON = TRITON in ((3, 6), (3, 7)) and not triton.knobs.runtime.interpret and _switch.uses("gluon")
SEGMENTS = _switch.uses("segments")
# keeps more in registers: what was measured beside 3.6 and 3.7 spills two to five times as much there
NEWER = TRITON >= (3, 8)


# ---------------------------------------------------------------------------------------------------------- the record


class Call(NamedTuple):
    """What the decisions depend on."""

    arch: int  # compute capability as one number: 80, 86, 89, 90, 100, 120
    sms: int  # multiprocessors
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    sequences: int  # B, or the number of packed ones
    packed: bool
    dtype: torch.dtype
    gradients: bool  # may be asked for
    can_cut: bool  # a batch entry's rows follow each other as a sequence's tokens do, so that segments need no copy
    aligned: bool  # rows can be copied 16 bytes at a time, which Gluon's kernels need
    gated: bool  # there is a g

    @property
    def wide(self) -> bool:
        """fp16 and fp32 inputs: fp32 scratch and tf32 products."""
        return self.dtype != torch.bfloat16


class Launch(NamedTuple):
    """How one kernel is launched."""

    columns: (
        int  # value columns per program (scans, chain) or loop step (grads); key columns per step (prepare, scores)
    )
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers per thread, where more programs beat fewer spills
    gluon: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)  # one object per kind of call: compared and hashed by identity
class Plan:
    """All decisions of one call."""

    call: Call
    key_tile: int  # key columns of a tile of the state
    key_tiles: int  # one, or two for keys wider than 128
    value_tile: int  # value columns of a tile of u, s and ds, which are those of a program of Triton's scans
    value_tiles: int
    prepare: Launch  # one chunk in 16x16 blocks
    scores: Launch | None  # P and the norms of q, in a kernel of their own; None: each scan computes them
    scan: Launch  # forward
    reverse: Launch  # the reverse scan
    deep: bool  # Triton's reverse scan: the tensor cores transpose dO, exactly
    grads: Launch  # chunk-parallel gradients
    beside: bool  # the gradients start while the reverse scan runs
    entry: Launch  # forward scan without output, for segments
    exit: Launch  # the reverse scan without gradients, for segments
    chain: Launch  # from segment to segment
    segments: int  # that a sequence is cut into, in forward
    segments_backward: int  # the same number, or one

    def __str__(self) -> str:
        return explain(self)


# ---------------------------------------------------------------------------------------------------------- the device


@functools.cache
def arch_of(device_index: int | None) -> int:
    """`Call.arch`. None, a CPU with Triton's interpreter, passes for an H100."""
    if device_index is None:
        return 90
    major, minor = torch.cuda.get_device_capability(device_index)
    return major * 10 + minor


@functools.cache
def multiprocessors(device_index: int | None) -> int:
    if device_index is None:
        return 132
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def shared_memory_limit(arch: int) -> int:
    """Bytes of shared memory one block may use: 99 KB on sm_86, 89 and 120, 163 on sm_80, 227 on sm_90 and 100."""
    if arch in (90, 100, 103):
        return 232448
    return 166912 if arch in (80, 87) else 101376


# ---------------------------------------------------------------------------------------------------- the launch table


class Tiles(NamedTuple):
    """A line of the launch table: the Triton kernels, and whether Gluon's take the place of some."""

    prepare: Launch
    scores: Launch
    scan: Launch
    reverse: Launch
    grads: Launch
    entry: Launch
    stored: bool = True  # P by a kernel of its own; otherwise by each scan, which saves 24 KB per chunk
    deep: bool = False
    gluon: bool = False  # Gluon's kernels take the place of all but prepare


@functools.cache
def launch_table(arch: int, K: int, V: int, wide: bool, few: bool) -> Tiles:
    """`few`: at most one program of a scan per multiprocessor."""
    d = max(K, V)
    if wide:
        # tf32 operands take twice the shared memory: narrow blocks, whatever the chip
        scan = Launch(16, 4, 1)
        return Tiles(Launch(32, 1, 1), Launch(32, 4, 1), scan, scan, Launch(16, 4, 1), scan)
    # one warp: 16x16 blocks offer no more work, and there is no barrier to wait at (0.21 ms, was 0.26 with four warps
    # on 64x64, at 8 x 4096 x 16 x 128). All slices of the keys are under way at once; twelve programs per
    # multiprocessor, for a few spills, beat ten at d <= 128 (0.066 ms, was 0.068), but not eight at d = 256 (0.055 ms,
    # was 0.051)
    prepare = Launch(64, 1, 5) if K > 128 else Launch(32, 1, 3 if K <= 64 else 4, maxnreg=168)
    scores = Launch(64, 4, 3)  # 13 us at 1 x 4096 x 16 x 128 (was 19 with 128 columns in two stages)
    if arch in (90, 100, 103):
        if K > 128 and arch == 90:
            # two halves of the state are 128 registers; 8 warps on 128 columns need no more of them, and all of shared
            # memory to load ahead
            scan = Launch(64 if NEWER else 128, 8, 2)
            return Tiles(prepare, scores, scan, scan, Launch(64, 8, 1), scan)
        if K > 128:  # compiled, not measured; of 64 columns Triton 3.6 and 3.7 make an empty reverse scan for sm_100
            scan = Launch(32, 8, 1)
            return Tiles(prepare, scores, scan, scan, scan, scan)
        # d = 64: three programs per multiprocessor. d = 128: all registers. Keys narrower than 64: of steps of 64
        # columns ptxas 12.8 makes wrong code (kernels/README.md, "What ptxas gets wrong")
        columns = 32 if K < 64 or (NEWER and d <= 64) else 64
        grads = Launch(columns, 4, 1, maxnreg=168 if d <= 64 else None)
        entry = Launch(64, 4, 3)  # without q three stages fit: 0.176 ms (was 0.227), at 1 x 32768 x 16 x 128
        if arch != 90:  # compiled, not measured: the form that spills least
            scan = Launch(64, 8, 2)
            return Tiles(prepare, scores, scan, scan, grads, entry)
        # keys of fewer columns stand in tiles of 64 or 128
        gluon = GLUON and 48 < K <= 128 and K % 16 == 0 and V % 64 == 0
        if few:
            # alone on its multiprocessor a program must hide the loads itself: three stages; the chain from state to
            # state is all that counts, so P is computed elsewhere (0.12 ms, was 0.27, at 1 x 4096 x 16 x 128); Gluon's
            # scans compute it in the chain's gaps
            spills = NEWER and d > 64
            scan, reverse = Launch(64, 8 if spills else 4, 3), Launch(64, 4, 3)
            return Tiles(prepare, scores, scan, reverse, grads, entry, stored=not gluon, deep=not spills, gluon=gluon)
        # as many stages as let two programs share a multiprocessor, where memory's bandwidth is what counts
        # (d = 64: 0.176 ms with three, was 0.215 with two)
        scan = Launch(64, 4, 3 if d <= 64 else 2)
        return Tiles(prepare, scores, scan, Launch(64, 4, 2), grads, entry, stored=False, deep=True, gluon=gluon)
    # compiled, not measured: blocks that fit 99 KB; at d = 256 and 32 columns the reverse scan took 112 KB
    columns = 16 if d > 128 else 32
    scan = Launch(columns, 4 if d <= 64 else 8, 1)
    return Tiles(prepare, scores, scan, scan, Launch(columns, 8 if d > 128 else 4, 1), scan)


@functools.cache
def chain(arch: int, K: int) -> Launch:
    """The chain of segments, on 16 value columns. Phi does not wait for the state, so as much of it is under way as
    fits: 27 us with three stages, was 51 with one, for 8 segments at 32768 tokens. A stage of 128 keys is 64 KB, and
    Triton 3.8 takes one stage more than others. Wider keys do without: a half is as much.
    """
    return Launch(16, 8, 1 if K > 128 else 3 if K <= 64 else shared_memory_limit(arch) // 2**16)


# ------------------------------------------------------------------------------------------------------------ segments

# Chunks of a sequence from which on it is cut. Cut, a call has twice the launches, which at batch 1 an eager one waits
# for: forward + backward of 2048 tokens, 16 heads of 128, took 0.37 to 0.39 ms (was 0.22 uncut; three H100s), though
# the GPU was done sooner (in CUDA graphs 0.149, was 0.162); 3072 tokens 0.35 (was 0.42); so between the two
MIN_TOTAL = 40
# The same for backward: 16 heads of 128 gained 0.016 ms by it at 4096 tokens, in a CUDA graph, and 0.057 at 8192
# (H100); its two more launches cost a host 0.02 to 0.05
MIN_BACKWARD = 128
# Chunks per segment (one head of 128, H100, CUDA graphs: 4096 tokens in eight 0.105 ms, in four 0.125)
MIN_CHUNKS = 8
# where a program holds all columns of a head. 20 heads of 128, 32768 tokens, forward alone: 0.77 ms (was 0.95 uncut)
MIN_CHUNKS_WHOLE = 128
# Chunks of a sequence from which on the gated rule takes two segments. 32 value heads of 128, 8192 tokens, forward,
# where the gate forgets: 0.218 ms (was 0.302 uncut); where it does not, 0.30 either way (c00b2f0, H100)
MIN_FORGETFUL = 128


def count_segments(call: Call, blocks: int) -> int:
    """Segments of a sequence: the largest power of two that gives each multiprocessor one program at most, of a block
    of value columns.

    Not more than the chunks per segment: the chain takes 3.4 us per segment and both scans 1.8 us per chunk, so that
    their sum is least at about the root of all chunks, as was measured (`kernels/README.md`, "Segments").

    Without gradients, long segments may also fill the chip with programs of a whole head, which load once what its
    blocks of columns share; with them, that lost an eighth (32 heads of 128).
    """
    s, chunks = 1, -(-call.T // CHUNK)
    while chunks >= MIN_TOTAL:
        length, heads = chunks // (2 * s), 2 * s * call.B * call.HV
        # for Phi the first pass has as many programs again. Two share a multiprocessor, but of wide keys: they take
        # turns (8 heads of 256, 4096 tokens, forward: four segments 0.192 ms, eight 0.219)
        turns = 2 if call.K > 128 and 2 * heads * blocks > call.sms else 1
        few = heads * blocks <= call.sms and length >= turns * MIN_CHUNKS
        whole = (
            not call.gradients and heads <= call.sms and heads * blocks <= 2 * call.sms and length >= MIN_CHUNKS_WHOLE
        )
        if length < 2 * s or not (few or whole):
            break
        s *= 2
    # two extra passes: worth it from four segments on; in two they take what they save, but for heads that forget, of
    # which the first of them reads a few chunks
    return s if s >= 4 or (call.gated and chunks >= MIN_FORGETFUL) else 1


def cuts_backward(call: Call, programs: int, beside: bool) -> bool:
    """Whether backward of a sequence that forward cut is cut, too. `programs` are those of the uncut reverse scan.

    Its two extra launches come when the host is behind. Where the gradients run `beside` the scan, they fill the chip,
    and only a scan of fewer programs still gains; wide keys gain most.
    """
    return call.K > 128 or (-(-call.T // CHUNK) >= MIN_BACKWARD and (not beside or 6 * programs <= call.sms))


def can_cut(*tensors: torch.Tensor) -> bool:
    """`Call.can_cut`."""
    return all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)


def is_aligned(*tensors: torch.Tensor) -> bool:
    """`Call.aligned`, of tensors [B, T, H, D]; Triton must see it from the strides."""
    for x in tensors:
        batch, time, head, _ = x.stride()
        if x.data_ptr() % 16 or (batch | time | head) % 16:
            return False
    return True


# --------------------------------------------------------------------------------------------------------------- plans


def make_plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    gradients: bool,
    *,
    gated: bool = False,
    cut: bool | None = None,
    aligned: bool | None = None,
) -> Plan:
    """The plan of `chunk_delta_rule`'s arguments. `gradients`: whether they may be asked for; `gated`: whether there
    is a g.

    `cut` and `aligned` take the place of what would be read from the tensors, where these are fakes or only some are
    at hand.
    """
    (B, T), (H, K, HV, V) = k.shape[:2], map(int, (*k.shape[2:], *v.shape[2:]))  # torch.compile's symbols settled
    n = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    cut = can_cut(q, k, v, beta) if cut is None else cut
    aligned = is_aligned(q, k, v) if aligned is None else aligned
    device = k.device.index
    chip, packed = (arch_of(device), multiprocessors(device)), cu_seqlens is not None
    call = Call(*chip, B, T, H, HV, K, V, n, packed, k.dtype, gradients, cut, aligned, gated)
    # a symbol for a length cannot be looked up
    return plan_of(call) if type(B) is type(T) is type(n) is int else plan_of.__wrapped__(call)


@functools.lru_cache(maxsize=4096)
def plan_of(call: Call) -> Plan:
    K, V, wide = call.K, call.V, call.wide
    tile = launch_table(call.arch, K, V, wide, False).scan.columns
    blocks = -(-V // tile)
    segments = count_segments(call, blocks) if not call.packed and SEGMENTS else 1
    few = bool(call.sequences * segments * call.HV * blocks <= call.sms)
    tiles = launch_table(call.arch, K, V, wide, few)
    might_be_beside = tiles.gluon and few
    uncut = call.B * call.HV * blocks
    segments = segments if call.can_cut else 1
    backward = segments if segments > 1 and cuts_backward(call, uncut, might_be_beside) else 1

    value_tile = min(tiles.scan.columns, max(16, triton.next_power_of_2(V)))
    value_tiles = -(-V // value_tile)
    key_tile = max(32, min(128, triton.next_power_of_2(K)))
    scan, reverse, exit, entry = (
        x._replace(columns=value_tile) for x in (tiles.scan, tiles.reverse, tiles.reverse, tiles.entry)
    )
    grads = tiles.grads._replace(columns=min(value_tile, tiles.grads.columns))
    gluon = tiles.gluon and call.aligned
    if gluon:
        # two warp groups per program share q, k, A and P; where few run, one each (0.115 ms, was 0.170, at 1 x 4096 x
        # 16 x 128)
        columns = 64 if few or V % 128 else 128
        scan = Launch(columns, columns // 16, 1, gluon=True)
        # 64 columns are faster with many programs, too (0.230 ms, was 0.248 with 128, at 8 x 4096 x 16 x 128)
        reverse = exit = Launch(64, 4, 1, gluon=True)
        # of more than 128 value columns tiles leave room for one program per multiprocessor: eight warps. With a gate
        # registers are not held to a limit: of what ptxas 12.8 spilled there, dg came out wrong (kernels/README.md,
        # "What ptxas gets wrong")
        limit = None if call.gated else tiles.grads.maxnreg
        grads = Launch(64, 4 if V <= 128 else 8, 1, limit, gluon=True)
    # when the scan's programs fill more than three quarters of the chip there is no room for the gradients
    programs = value_tiles * call.HV * call.sequences * backward
    plan = Plan(
        call=call,
        key_tile=key_tile,
        key_tiles=-(-K // key_tile),
        value_tile=value_tile,
        value_tiles=value_tiles,
        prepare=tiles.prepare._replace(columns=min(tiles.prepare.columns, key_tile)),
        scores=tiles.scores._replace(columns=min(tiles.scores.columns, key_tile)) if tiles.stored else None,
        scan=scan,
        reverse=reverse,
        deep=tiles.deep,
        grads=grads,
        beside=gluon and few and _switch.uses("beside") and 4 * programs <= 3 * call.sms,
        entry=entry,
        exit=exit,
        chain=chain(call.arch, K),
        segments=segments,
        segments_backward=backward,
    )
    if _switch.EXPLAINS:
        logging.getLogger(__package__).warning("%s", plan)
    return plan


def explain(plan: Plan) -> str:
    """What runs, with which tiles, and why: a line per kernel."""
    call = plan.call
    programs = plan.value_tiles * call.HV * call.sequences
    shape = f"B {call.B}, T {call.T}, H {call.H}, HV {call.HV}, K {call.K}, V {call.V}"
    packed = f", {call.sequences} packed sequences" if call.packed else ""
    name, dtype = f"chunk{'_gated' if call.gated else ''}_delta_rule", str(call.dtype).removeprefix("torch.")
    lines = [f"{name}: {shape}, {dtype}{packed}, sm_{call.arch}, {call.sms} SMs"]
    if plan.scan.gluon:
        why = "keys of 64 to 128 and values of multiples of 64 in bf16 on sm_90, rows aligned to 16 bytes"
    elif not GLUON:
        why = f"no Gluon: Triton {triton.__version__}, or DELTANET_KERNELS"
    elif not call.aligned and call.arch == 90:
        why = "rows of q, k or v are not aligned to 16 bytes"
    else:
        why = "Gluon has keys of 64 to 128 and values of multiples of 64 in bf16 on sm_90"
    lines.append(f"  {'Gluon' if plan.scan.gluon else 'Triton'}: {why}")
    if plan.segments > 1:
        lines.append(
            f"  {plan.segments} segments per sequence, {plan.segments_backward} in backward: "
            f"uncut, a scan has {programs} programs"
        )
    else:
        lines.append(f"  sequences whole: a scan has {programs} programs of {plan.value_tile} value columns")
    for name in (
        "prepare",
        "scores",
        "scan",
        "reverse",
        "grads",
        *(("entry", "exit", "chain") if plan.segments > 1 else ()),
    ):
        x = getattr(plan, name)
        if x is None:
            lines.append(f"  {name}: computed by each scan")
            continue
        columns = "key columns" if name in ("prepare", "scores") else "value columns"
        registers = f", at most {x.maxnreg} registers" if x.maxnreg else ""
        beside = ", beside the reverse scan" if name == "grads" and plan.beside else ""
        kind = "Gluon" if x.gluon else "Triton"
        lines.append(
            f"  {name}: {kind}, {x.columns} {columns}, {x.num_warps} warps, {x.num_stages} stages{registers}{beside}"
        )
    return "\n".join(lines)
