"""Launch choices: one small table per architecture and head size, each line with its reason. No autotuning.

A first call must cost seconds, not minutes, so nothing is swept on the user's time. The figures behind the choices
are in `kernels/README.md`. Shared memory a block may take: 99 KB on sm_86/89/120, 163 KB on sm_80, 227 KB on
sm_90/100; `tests/ops/test_compile_chunk.py` compiles every line of this table for each of them.
"""

import functools
from typing import NamedTuple

import torch
import triton

from . import _switch
from .limits import NORM_EPS


# What is private to Triton, or experimental there, is used only beside versions that it was tried with. Other versions launch
# by Triton's public call (`_launch.run`), and get the Triton kernels for the Gluon ones; so does Triton's interpreter, which
# has none for Gluon.
TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])
LAUNCHER = TRITON in ((3, 6), (3, 7), (3, 8), (3, 9))  # the signature of a compiled kernel's `run` read in each
# compiled and run beside each; 3.8 compiles
GLUON = TRITON in ((3, 6), (3, 7)) and not triton.knobs.runtime.interpret and _switch.uses("gluon")
# keeps more in registers: what was measured beside 3.6 and 3.7 spills two to five times as much there
NEWER = TRITON >= (3, 8)
EPS = NORM_EPS
CHUNK = 64  # tokens in a chunk: the unit of the triangular inverse and of a scan step


class Launch(NamedTuple):
    """How one kernel is launched; block_v is the number of value columns a program (or a loop step) works on."""

    block_v: int
    num_warps: int
    num_stages: int
    deep: bool = False  # reverse scan: the tensor cores transpose dO, exactly
    maxnreg: int | None = None  # registers a thread, where more programs beat fewer spills


class Plan(NamedTuple):
    """All launch choices of one call."""

    prepare: Launch  # block_v is the slice of key columns a step loads; one chunk in 16x16 blocks
    scores: Launch  # P, where it is stored; block_v likewise
    scan: Launch  # forward scan; its block_v is that of the reverse scan too
    reverse: Launch  # reverse scan
    grads: Launch  # chunk-parallel gradients
    entry: Launch | None = None  # forward scan without output (segments), if other than scan
    # by the Gluon kernels (hopper_*.py), where rows of the inputs are aligned
    gluon_grads: bool = False
    gluon_scans: int = 0  # value columns of a program of the forward one; 0: none
    stored: bool = True  # P by a kernel of its own; else by each scan, which saves 24 KB a chunk
    beside: bool = False  # the Gluon kernel of the gradients starts while the reverse scan runs


@functools.cache
def arch_of(device_index: int | None) -> int:
    """80, 86, 89, 90, 100, 120: compute capability as one number. None, a CPU with Triton's interpreter, passes for an H100."""
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
    """Bytes of shared memory one block may use."""
    if arch in (90, 100, 103):
        return 232448
    return 166912 if arch in (80, 87) else 101376


@functools.cache
def chain(arch: int, K: int) -> Launch:
    """The chain of segments, on 16 value columns. Phi does not wait for the state, so as much of it is under way as fits:
    27 us with three stages, 51 with one, for 8 segments at 32768 tokens. A stage of 128 keys is 64 KB, and Triton 3.8 takes one
    stage more than others. Wider keys do without: a half is as much.
    """
    return Launch(16, 8, 1 if K > 128 else 3 if K <= 64 else shared_memory_limit(arch) // 2**16)


@functools.cache
def plan(arch: int, K: int, V: int, wide: bool, few: bool) -> Plan:
    """The launch table. `wide`: fp32 scratch (fp32 and fp16 inputs). `few`: at most one scan program a multiprocessor."""
    d = max(K, V)
    if wide:
        # tf32 operands take twice the shared memory: narrow blocks, whatever the chip
        scan = Launch(16, 4, 1)
        return Plan(Launch(32, 1, 1), Launch(32, 4, 1), scan, scan, Launch(16, 4, 1))
    # one warp: 16x16 blocks offer no more work, and there is no barrier to wait at (four warps on 64x64: 0.26 ms, not
    # 0.21, at 8 x 4096 x 16 x 128). All slices of the keys are under way at once; twelve programs a multiprocessor, for a
    # few spills, beat ten at d <= 128 (0.066 ms, not 0.068; d = 64: 0.093), but not eight at d = 256 (0.051, not 0.055)
    prepare = Launch(64, 1, 5) if K > 128 else Launch(32, 1, 3 if K <= 64 else 4, maxnreg=168)
    scores = Launch(64, 4, 3)  # 13 us at 1 x 4096 x 16 x 128, not the 19 of 128 columns in two stages
    if arch in (90, 100, 103):
        if K > 128 and arch == 90:
            # two halves of the state are 128 registers; 8 warps on 128 columns need no more of them, and all of shared
            # memory to load ahead
            scan = Launch(64 if NEWER else 128, 8, 2)
            return Plan(prepare, scores, scan, scan, Launch(64, 8, 1))
        if K > 128:  # compiled, not measured; of 64 columns Triton 3.6 and 3.7 make an empty reverse scan for sm_100
            return Plan(prepare, scores, Launch(32, 8, 1), Launch(32, 8, 1), Launch(32, 8, 1))
        # d = 64: three programs a multiprocessor. d = 128: all registers. Keys narrower than 64: of steps of 64 columns
        # ptxas 12.8 makes wrong code (README, "What ptxas gets wrong")
        columns = 32 if K < 64 or (NEWER and d <= 64) else 64
        grads = Launch(columns, 4, 1, maxnreg=168 if d <= 64 else None)
        gluon = GLUON and arch == 90 and K in (64, 128) and V in (64, 128)
        # two warp groups a program share q, k, A and P; where few run, one each (1 x 4096 x 16 x 128: 0.115 ms, not 0.170)
        scans = 0 if not gluon else 64 if few else V
        entry = Launch(64, 4, 3)  # without q three stages fit: 0.176 ms, not 0.227, at 1 x 32768 x 16 x 128
        if arch != 90:  # compiled, not measured: the form that spills least
            return Plan(prepare, scores, Launch(64, 8, 2), Launch(64, 8, 2), grads, entry)
        if few:
            # alone on its multiprocessor a program must hide the loads itself: three stages; the chain from state to
            # state is all that counts, so P is computed elsewhere (0.12 ms, not 0.27, at 1 x 4096 x 16 x 128); Gluon's scans
            # compute it in the chain's gaps
            spills = NEWER and d > 64
            scan, reverse = Launch(64, 8 if spills else 4, 3), Launch(64, 4, 3, deep=not spills)
            return Plan(prepare, scores, scan, reverse, grads, entry, gluon, scans, stored=not gluon, beside=gluon)
        # as many stages as let two programs share a multiprocessor, where memory's bandwidth is what counts
        # (d = 64: 0.176 ms with three, 0.215 with two)
        scan = Launch(64, 4, 3 if d <= 64 else 2)
        return Plan(prepare, scores, scan, Launch(64, 4, 2, deep=True), grads, entry, gluon, scans, stored=False)
    # compiled, not measured: blocks that fit 99 KB; at d = 256 and 32 columns the reverse scan took 112 KB
    block_v = 16 if d > 128 else 32
    scan = Launch(block_v, 4 if d <= 64 else 8, 1)
    return Plan(prepare, scores, scan, scan, Launch(block_v, 8 if d > 128 else 4, 1))
