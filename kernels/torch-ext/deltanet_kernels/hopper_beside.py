"""The gradients beside the reverse scan that feeds them, in Gluon for Hopper.

A scan of few programs leaves most multiprocessors idle: 32 run at 1 x 4096 x 16 x 128, on a chip of 132. So the
gradients' kernel is launched as a programmatic dependent: it may start as soon as every program of the scan runs, and
its program of a chunk waits until the scan has set that chunk's flags. Nobody waits for a program that has no place to
run. Chunks are taken in the order in which the scan comes to them, the last one first.

A flag stands for GROUP chunks, at the place of the first of them that the scan comes to: before it is set, all that
was written must have arrived, which takes 0.36 us, a fifth of what the scan takes for a chunk.

The scan clears its flags before it lets the others start, so memory may hold anything before. Kernels that follow wait
for the gradients alone; hence those of a first chunk wait for the end of the scan.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents


GROUP = gl.constexpr(4)
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7's name and 3.6's


@gluon.jit
def let_dependents_start(flags, stride, N):
    """Clears the N flags of this program, then says that the gradients may start."""
    o = gl.arange(0, 128, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    for i in range(0, N, 128):
        gl.store(flags + (i + o) * stride, gl.full([128], 0, gl.int32, o.type.layout), mask=i + o < N)
    gl.inline_asm_elementwise("fence.acq_rel.gpu; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    barrier()
    gdc_launch_dependents()


@gluon.jit
def _set_flag(flags, stride, N, group, where):
    gl.atomic_xchg(flags + (N - 1 - group * GROUP) * stride, 1, mask=where, sem="release", scope="gpu")


@gluon.jit
def say_written(flags, stride, N, i):
    """At the start of the scan's turn i: all turns but the last one are written, since dv is stored a turn late."""
    if i % GROUP == 1:
        barrier()
        _set_flag(flags, stride, N, (i - 1) // GROUP - 1, i > GROUP)


@gluon.jit
def say_all_written(flags, stride, N):
    barrier()
    _set_flag(flags, stride, N, (N - 1) // GROUP - 1, N > GROUP)
    _set_flag(flags, stride, N, (N - 1) // GROUP, N > 0)


@gluon.jit
def wait_for_chunk(flags, stride, N, i_c, FLAGS: gl.constexpr):
    """Until chunk i_c of N is written. `flags` are those of the sequence's first chunk, FLAGS of them next to each
    other.
    """
    flags += (N - 1 - (N - 1 - i_c) // GROUP * GROUP) * stride
    for i in gl.static_range(FLAGS):
        seen = gl.atomic_add(flags + i, 0, sem="acquire", scope="gpu")
        while seen == 0:
            seen = gl.atomic_add(flags + i, 0, sem="acquire", scope="gpu")


@gluon.jit
def chunk_in_order(NT, PACKED: gl.constexpr):
    """The chunk of this program: the scan's programs, one a sequence, all come to their last one first."""
    i = gl.program_id(1)
    if PACKED:
        i_t = gl.num_programs(1) - 1 - i
    else:
        sequences = gl.num_programs(1) // NT
        i_t = i % sequences * NT + NT - 1 - i // sequences
    return i_t
