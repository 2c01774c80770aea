"""The chunked kernels against the fp64 token-by-token rule: output, final state and every gradient.

Without a GPU they run in Triton's interpreter on small shapes, in fp32 (numpy has no bf16: the interpreter multiplies
its bit patterns), which reaches every line except the cast to bf16. Tests marked `gpu` run the real thing.
"""

import functools

import pytest
import torch

from tests.ops._reference import DEVICE, assert_close, delta_rule_fp64, error, make


triton = pytest.importorskip("triton")
import deltanet_kernels  # noqa: E402
from deltanet_kernels import _replay, chunk_delta_rule, chunk_gated_delta_rule, plan, reverse  # noqa: E402

from tests.ops._plans import call, change_plans, decide_anew  # noqa: E402


# ||x - ref|| / ||ref|| for o, final state and gradients. fp32: three tf32 products; fp16 goes through fp32 scratch
TOLERANCE = {torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 1.2e-2}


def compare(q, k, v, beta, h0, l2norm=True, cu_seqlens=None, tolerance=None, scale=None, **options):
    """Runs both; checks o, final state and the gradients of all inputs, with a gradient on the final state."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, beta, h0) if x is not None]
    args = leaves if h0 is not None else [*leaves, None]
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    ref = delta_rule_fp64(*args[:4], scale, args[4], l2norm, cu)
    g = torch.Generator().manual_seed(1)
    do, dht = (torch.randn(x.shape, generator=g).to(DEVICE) for x in ref)
    do = do.to(v.dtype)
    want = [*ref, *torch.autograd.grad(ref, leaves, [do.double(), dht.double()])]
    out = chunk_delta_rule(
        *args[:4], scale=scale, initial_state=args[4], output_final_state=True, use_qk_l2norm_in_kernel=l2norm,
        cu_seqlens=cu, **options,
    )  # fmt: skip
    got = [*out, *torch.autograd.grad(out, leaves, [do, dht])]
    assert out[0].dtype == v.dtype and out[1].dtype == torch.float32
    names = ("o", "ht", "dq", "dk", "dv", "dbeta", "dh0")
    assert_close(names, got, want, TOLERANCE[q.dtype] if tolerance is None else tolerance)
    return got


@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_any_length(T):
    """A sequence need not fill its last chunk."""
    compare(*make(1, T, 1, 32))


@pytest.mark.parametrize("K, V", [(32, 64), (64, 32), (96, 16), (192, 32), (256, 32)])
def test_head_sizes(K, V):
    """Keys and values may differ in size; sizes that are no power of two, or beyond 128, are padded or halved."""
    compare(*make(1, 70, 1, K, V))


def test_grouped_value_heads():
    """Two value heads share a key head: its gradients are the sum over both."""
    compare(*make(2, 70, 2, 32, 32, HV=4))


@pytest.mark.parametrize("state", [True, False])
def test_without_norm(state):
    """Keys normalised by the caller, with and without an initial state."""
    compare(*make(1, 100, 2, 32, keys="unit", state=state), l2norm=False)


@pytest.mark.parametrize("stored, deep", [(False, False), (False, True), (True, True)])
def test_every_form_of_the_scans(stored, deep, monkeypatch):
    """Which form runs depends on the chip's size and the head's: each must give the same as the others."""
    change_plans(monkeypatch, scores=plan.Launch(32, 4, 1) if stored else None, deep=deep)
    compare(*make(2, 100, 1, 64, 32, HV=2))
    compare(*make(1, 150, 1, 192, 16, keys="unit", N=2), l2norm=False, cu_seqlens=[0, 70, 150])


def test_packed():
    """Documents packed along T must not see each other, also where a border falls inside a chunk or one is empty."""
    compare(*make(1, 200, 2, 32, N=5, HV=2), cu_seqlens=[0, 0, 5, 68, 133, 200])


def test_beta_zero_and_two():
    """A masked token (beta 0) still gets its exact dbeta, though the kernels divide by beta; 2 reflects the state."""
    q, k, v, beta, h0 = make(1, 70, 1, 32)
    beta[:, ::3] = 0
    beta[:, 1::3] = 2
    compare(q, k, v, beta, h0)
    beta = torch.zeros_like(beta)
    beta[:, -1] = 1
    compare(q, k, v, beta, h0)


def test_one_key_for_a_whole_chunk():
    """The triangular system is at its worst here: a Neumann series in its place would lose all digits."""
    q, k, v, beta, h0 = make(1, 64, 1, 32)
    compare(q, k[:, :1].expand_as(k).contiguous(), v, torch.full_like(beta, 2.0), h0, tolerance=1e-4)


def test_strided_input_is_read_in_place():
    """q, k and v cut from one projection: no copy, same result."""
    B, T, H, K = 1, 70, 2, 32
    x = torch.randn(B, T, 3 * H * K + 7, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    q, k, v = (x[..., i * H * K : (i + 1) * H * K].view(B, T, H, K) for i in range(3))
    beta = torch.rand(B, T, 2 * H, device=DEVICE)[..., ::2]
    o, _ = chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)
    same, _ = chunk_delta_rule(*(t.contiguous() for t in (q, k, v, beta)), use_qk_l2norm_in_kernel=True)
    assert torch.equal(o, same)
    assert error(o, delta_rule_fp64(q, k, v, beta, l2norm=True)[0]) < TOLERANCE[q.dtype]


def test_nan_beyond_the_borders_is_never_read():
    """Memory before and after the tensors, and between documents, may hold anything."""
    B, T, H, K = 1, 70, 1, 32
    *x, h0 = make(B, T, H, K)

    def poisoned(t):
        big = torch.full((B, T + 128, *t.shape[2:]), float("nan"), device=DEVICE, dtype=t.dtype)
        big[:, 64 : 64 + T] = t
        return big[:, 64 : 64 + T]

    compare(*(poisoned(t) for t in x), h0)
    q, k, v, beta = x
    for t in (q, k, v, beta):
        t[:, 40:] = float("nan")
    o, ht = chunk_delta_rule(
        q, k, v, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=torch.tensor([0, 40, T], device=DEVICE),
        output_final_state=True,
    )  # fmt: skip
    assert o[:, :40].isfinite().all() and ht[0].isfinite().all()


@pytest.mark.parametrize("B, T", [(2, 0), (1, 0)])
def test_no_tokens(B, T):
    """Nothing in: empty output, the state goes through, its gradient too."""
    q, k, v, beta, h0 = make(B, T, 1, 32)
    h0.requires_grad_()
    o, ht = chunk_delta_rule(q, k, v, beta, initial_state=h0, output_final_state=True)
    assert o.shape == v.shape and torch.equal(ht, h0)
    (g,) = torch.autograd.grad(ht.sum(), h0)
    assert torch.equal(g, torch.ones_like(h0))


def test_scale_and_outputs():
    """A scale of one's own; without `output_final_state` there is none."""
    q, k, v, beta, h0 = make(1, 70, 1, 32)
    compare(q, k, v, beta, h0, scale=0.5)
    assert chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)[1] is None


def test_split_in_two_calls():
    """A token's result must not depend on whether its prefix came in the same call."""
    q, k, v, beta, _ = make(1, 130, 1, 32)
    whole, end = chunk_delta_rule(q, k, v, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
    kw = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    first, state = chunk_delta_rule(*(x[:, :77] for x in (q, k, v, beta)), **kw)
    second, state = chunk_delta_rule(*(x[:, 77:] for x in (q, k, v, beta)), initial_state=state, **kw)
    assert error(torch.cat([first, second], 1), whole) < 1e-5 and error(state, end) < 1e-5


@pytest.mark.parametrize(
    "B, T, HV, K, V, backward",
    [
        (1, 512, 1, 32, 32, False), (2, 512, 2, 32, 16, True), (1, 577, 1, 16, 32, False), (2, 513, 1, 32, 32, True),
        (1, 512, 1, 192, 16, True),
    ],
)  # fmt: skip
def test_segments(monkeypatch, B, T, HV, K, V, backward):
    """A long sequence cut into segments, in backward too or not, gives what the plain scan gives. It need not be a
    multiple of them.
    """
    decide_anew(monkeypatch, count_segments=lambda *_: 4, cuts_backward=lambda *_: backward)
    x = make(B, T, 1, K, V, HV=HV)
    made = plan.make_plan(*x[:4], None, True)
    assert (made.segments, made.segments_backward) == (4, 4 if backward else 1)
    cut = compare(*x)
    decide_anew(monkeypatch, SEGMENTS=False)
    assert plan.make_plan(*x[:4], None, True).segments == 1
    for a, b in zip(cut, compare(*x), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_operators_trace(packed):
    """torch.compile sees one operator each way: no graph break, shapes as the kernels make them."""
    q, k, v, beta, h0 = make(1, 130, 1, 32, N=2 if packed else None)
    cu = torch.tensor([0, 77, 130], device=DEVICE) if packed else None

    def loss(q, k, v, beta, h0):
        o, ht = chunk_delta_rule(
            q, k, v, beta, initial_state=h0, output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=cu
        )
        return o.square().sum() + ht.square().sum()

    def run(f):
        x = [t.detach().requires_grad_() for t in (q, k, v, beta, h0)]
        return torch.autograd.grad(f(*x), x)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(loss), strict=True):
        assert error(a, b) < 1e-5


def test_operators_trace_for_any_length():
    """A compiled model with dynamic shapes would fail where a plan is made: torch's symbols cannot be looked up."""

    def loss(q, k, v, beta):
        return chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (70, 100):
        *x, _ = make(2, T, 1, 32)
        x = [t.requires_grad_() for t in x]
        for a, b in zip(torch.autograd.grad(compiled(*x), x), torch.autograd.grad(loss(*x), x), strict=True):
            assert error(a, b) < 1e-5


@pytest.mark.parametrize(
    "shape, training, inference",
    [
        ((1, 16, 128, 2), {2048: 1, 2496: 1, 2497: 4, 32768 + 1: 4, 131072: 4}, {2497: 4, 32768: 4, 131072: 8}),
        ((1, 20, 128, 2), {8192: 1, 131072: 1}, {16384: 1, 32768: 4, 131072: 4}),
        ((1, 32, 64, 1), {4096: 4, 131072: 4}, {4096: 4, 131072: 4}),  # whole heads already
        ((1, 1, 128, 2), {2048: 1, 4096: 8, 8192: 8, 16384: 16, 131072: 32}, {131072: 32}),  # the root of the chunks
        ((2, 16, 128, 2), {32768: 1}, {16384: 1, 32768: 4}),
        ((8, 16, 128, 2), {131072: 1}, {131072: 1}),
        ((1, 8, 256, 2), {2048: 1, 4096: 4, 8192: 8}, {32768: 8}),
        ((1, 16, 256, 2), {3072: 1, 4096: 4}, {3072: 1}),
    ],
)
def test_segment_count(shape, training, inference):
    """Few programs: cut. Enough programs or a short sequence: leave alone."""
    B, HV, K, blocks = shape
    for lengths, backward in ((training, True), (inference, False)):
        calls = {T: call(B=B, T=T, HV=HV, K=K, gradients=backward) for T in lengths}
        assert {T: plan.count_segments(x, blocks) for T, x in calls.items()} == lengths


def test_two_segments_are_for_heads_that_forget():
    """32 value heads of a gated model would leave half of the chip idle; without a gate two segments gain nothing."""
    for T, gated, s in ((32768, True, 2), (32768, False, 1), (8192, True, 2), (4096, True, 1)):
        assert plan.count_segments(call(B=1, T=T, HV=32, K=128, gradients=True)._replace(gated=gated), 2) == s


@pytest.mark.parametrize(
    "T, K, programs, beside, cut",
    [
        (8128, 128, 16, True, False), (8129, 128, 16, True, True), (65536, 128, 32, True, False),
        (8129, 128, 32, False, True), (4096, 256, 16, False, True),
    ],
)  # fmt: skip
def test_backward_is_cut_where_it_pays(T, K, programs, beside, cut):
    """A short sequence would wait for the host, and gradients for a chip that is full."""
    assert plan.cuts_backward(call(T=T, K=K), programs, beside) is cut


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 4, 1, 16)}, "k must have the shape of q"),
        ({"v": torch.zeros(1, 5, 1, 32)}, "v must be"),
        ({"beta": torch.zeros(1, 4, 2)}, "beta must be"),
        ({"v": torch.zeros(1, 4, 1, 32).half()}, "like q"),
        ({"q": torch.zeros(1, 4, 1, 32).double()}, "bfloat16, float16 or float32"),
        ({"initial_state": torch.zeros(1, 1, 32, 31)}, "initial_state must be"),
        ({"initial_state": torch.zeros(1, 1, 32, 32).double()}, "float32"),
        ({"head_first": True}, r"\[B, T, H, D\]"),
        ({"chunk_size": 128}, "16, 32 or 64, got 128"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "int32 or int64"),
        ({"v": torch.zeros(1, 4, 32, 1).transpose(2, 3).expand(1, 4, 1, 32)[..., ::2]}, "v"),
    ],
)
def test_errors_name_what_came(change, message):
    """A wrong argument is refused before a kernel runs."""
    x = torch.zeros(1, 4, 1, 32)
    with pytest.raises(ValueError, match=message):
        chunk_delta_rule(**{"q": x, "k": x, "v": x, "beta": torch.zeros(1, 4, 1), **change})


def test_unknown_keyword():
    x = torch.zeros(1, 4, 1, 32)
    with pytest.raises(TypeError):
        chunk_delta_rule(x, x, x, torch.zeros(1, 4, 1), cu_seqlen=None)


def test_what_the_gluon_kernels_take(monkeypatch):
    """Other chips, sizes, types and rows off alignment would reach kernels that were not made for them."""
    monkeypatch.setattr(plan, "GLUON", True)  # as where nothing is interpreted
    monkeypatch.setattr(plan, "launch_table", plan.launch_table.__wrapped__)
    make_plan = plan.plan_of.__wrapped__
    sizes = [(128, 128), (64, 128), (64, 64), (128, 64)]
    many, few = ([make_plan(call(B=B, K=K, V=V)) for K, V in sizes] for B in (99, 1))
    assert all(x.scan.gluon and x.reverse.gluon and x.grads.gluon and x.scores is None for x in many + few)
    assert [x.scan.columns for x in many] == [128, 128, 64, 64] and [x.scan.columns for x in few] == [64] * 4
    others = [{"arch": 100}, {"arch": 80}, {"K": 256, "V": 256}, {"K": 96, "V": 96}, {"dtype": torch.float16}]
    for change in [*others, {"aligned": False}]:
        x = make_plan(call(**change))
        assert not (x.scan.gluon or x.reverse.gluon or x.grads.gluon or x.beside)

    def cut(width, first):  # 128 columns of rows that are wider
        return torch.zeros(2, 70, 4, width, dtype=torch.bfloat16)[..., first : first + 128]

    assert plan.is_aligned(cut(128, 0), cut(144, 16), cut(144, 8))
    for x in (cut(144, 4), cut(136, 8), cut(132, 0)):
        assert not plan.is_aligned(cut(128, 0), x)


def test_a_plan_explains_itself():
    """A report of a wrong result would not say what computed it."""
    text = str(plan.plan_of.__wrapped__(call(T=32768, K=256, V=256, arch=90)))
    for part in (
        "T 32768",
        "K 256",
        "sm_90",
        "16 segments per sequence",
        "scores: Triton, 64 key columns",
        "chain: Triton",
    ):
        assert part in text, text
    x = make(1, 70, 2, 32)
    lines = deltanet_kernels.explain(*x[:4]).splitlines()
    assert "B 1, T 70, H 2, HV 2, K 32, V 32, float32" in lines[0] and "sequences whole" in lines[2]


# --------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("K, V", [(32, 32), (64, 64), (96, 64), (128, 128), (128, 256), (192, 128), (256, 256)])
def test_gpu_types_and_sizes(dtype, K, V):
    compare(*make(1, 130, 2, K, V, dtype=dtype), tolerance=2e-5 if dtype == torch.float32 else None)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000])
def test_gpu_lengths(T):
    compare(*make(2, T, 2, 128, HV=4, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("d, heads", [(64, 136), (96, 68), (128, 68), (256, 68)])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 67, 100]])
def test_gpu_more_programs_than_multiprocessors(d, heads, cu_seqlens):
    """Where many heads run, other launch choices are made: they must be right too."""
    n = None if cu_seqlens is None else len(cu_seqlens) - 1
    x = make(1, 100, heads // 2, d, HV=heads, N=n, dtype=torch.bfloat16)
    made = plan.make_plan(*x[:4], None, True)
    assert heads * made.value_tiles > made.call.sms and not made.beside
    compare(*x, cu_seqlens=cu_seqlens)


def spy_on_gluon(monkeypatch):
    """Names of the Gluon kernels as they are launched."""
    if not plan.GLUON or plan.arch_of(0) != 90:
        pytest.skip("the Gluon kernels are for Hopper, beside a known Triton")
    from deltanet_kernels import hopper_grads, hopper_reverse, hopper_scan

    ran = set()
    for module in (hopper_grads, hopper_reverse, hopper_scan):
        launch = module.launch
        monkeypatch.setattr(
            module, "launch", lambda kernel, *x, go=launch: (ran.add(kernel.fn.__name__), go(kernel, *x))
        )
    return ran


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [2, 34])
@pytest.mark.parametrize("K, V", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("T, cu_seqlens", [(448, None), (430, None), (430, [0, 64, 64, 70, 300, 430])])
def test_gpu_gluon(heads, K, V, T, cu_seqlens, monkeypatch):
    """Long enough that each stage of shared memory is used again; full chunks, cut ones and packed ones; few programs,
    many.
    """
    ran = spy_on_gluon(monkeypatch)
    x = make(
        1, T, heads, K, V, HV=4 * heads, N=None if cu_seqlens is None else len(cu_seqlens) - 1, dtype=torch.bfloat16
    )
    compare(*x, cu_seqlens=cu_seqlens)
    assert ran == {"grads_kernel", "reverse_kernel", "scan_kernel", "sum_heads_kernel"}


@pytest.mark.gpu
@pytest.mark.parametrize("l2norm", [True, False])
def test_gpu_gluon_borders(l2norm, monkeypatch):
    """NaN around the inputs, as views of one projection, reaches nothing; rows off alignment go to the Triton
    kernels.
    """
    ran = spy_on_gluon(monkeypatch)
    for shift, kernels in ((16, {"grads_kernel", "reverse_kernel", "scan_kernel"}), (4, set())):
        ran.clear()
        q, k, v, beta, h0 = make(1, 200, 68, 128, dtype=torch.bfloat16, keys="random" if l2norm else "unit")
        wide = torch.full((1, 300, 68, 3 * 128 + 2 * shift), torch.nan, device=DEVICE, dtype=torch.bfloat16)
        inside = wide[:, 50:250, :, shift:-shift]
        inside.copy_(torch.cat((q, k, v), -1))
        compare(*inside.split(128, -1), beta, h0, l2norm=l2norm)
        assert ran == kernels


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "T, cu_seqlens",
    [(50, None), (300, None), (1000, None), (4096, None), (1000, [0, 0, 5, 325, 325, 1000]), (700, [0, 64, 700])],
)
def test_gpu_gradients_beside_the_scan(T, cu_seqlens, d, gated, monkeypatch):
    """They would be computed from what the scan has not written yet, and only sometimes. With a gate and keys that the
    caller normalises the scan leaves them sums, too.
    """
    n = None if cu_seqlens is None else len(cu_seqlens) - 1
    x = make(1, T, 4, d, HV=8, N=n, dtype=torch.bfloat16, keys="unit")
    rule, options = chunk_delta_rule, {"use_qk_l2norm_in_kernel": not gated}
    if gated:
        rule = functools.partial(chunk_gated_delta_rule, g=-0.1 * torch.rand(x[3].shape, device=DEVICE))
    x = [t.requires_grad_() for t in x]
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    do = torch.randn_like(x[2])
    plan_of, hopper, flags = plan.plan_of, reverse.hopper_reverse.reverse, []

    def spy(*args):
        flags.append(args[-1])
        hopper(*args)

    monkeypatch.setattr(reverse.hopper_reverse, "reverse", spy)

    def run(times):
        _replay.forget()
        o, _ = rule(*x[:3], beta=x[3], initial_state=x[4], cu_seqlens=cu, **options)
        for _ in range(times):  # through one graph, from memory that holds neither zeros nor what the last time wrote
            poison = [torch.full((2**25,), torch.nan, device=DEVICE)]
            poison += [torch.ones(2**15, dtype=torch.int32, device=DEVICE) for _ in range(100)]
            del poison
            yield torch.autograd.grad(o, x, do, retain_graph=True)

    change_plans(monkeypatch, beside=False)
    (want,) = run(1)
    assert flags == [None]
    monkeypatch.setattr(plan, "plan_of", plan_of)
    for got in run(10):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert flags[1] is not None


@pytest.mark.gpu
def test_gpu_packed():
    compare(*make(1, 200, 2, 128, N=5, dtype=torch.bfloat16), cu_seqlens=[0, 0, 5, 68, 133, 200])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "T, d", [(16384, 64), (4096, 128), (4096, 256), (2500, 64), (2240, 128), (2100, 192), (2240, 256)]
)
@pytest.mark.parametrize("backward", [True, False])
def test_gpu_segments(monkeypatch, T, d, backward):
    """What enters a segment would come from another place, or its gradient go to one; backward may be uncut."""
    decide_anew(monkeypatch, MIN_TOTAL=1, MIN_BACKWARD=1 if backward else 1000)
    x = make(2 if T < 4096 else 1, T, 1, d, dtype=torch.bfloat16)
    assert plan.make_plan(*x[:4], None, True).segments > 1
    compare(*x)


@pytest.mark.gpu
@pytest.mark.parametrize("d, heads", [(64, 4), (128, 4), (128, 80), (256, 4)])
def test_gpu_is_deterministic(d, heads):
    """Two runs give the same bits: no atomics anywhere."""
    q, k, v, beta, _ = make(2, 1000, heads, d, dtype=torch.bfloat16, state=False)

    def run():
        x = [t.detach().requires_grad_() for t in (q, k, v, beta)]
        o, _ = chunk_delta_rule(*x, use_qk_l2norm_in_kernel=True)
        return [o, *torch.autograd.grad(o.float().square().sum(), x)]

    first = run()
    for _ in range(3):
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_compile_fullgraph(packed):
    """torch.compile goes through forward and backward without a graph break."""
    q, k, v, beta, h0 = make(1, 200, 2, 64, dtype=torch.bfloat16, N=2 if packed else None)
    cu = torch.tensor([0, 77, 200], device=DEVICE) if packed else None

    def loss(q, k, v, beta, h0):
        o, ht = chunk_delta_rule(
            q, k, v, beta, initial_state=h0, output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=cu
        )
        return o.float().square().sum() + ht.square().sum()

    def run(f):
        x = [t.detach().requires_grad_() for t in (q, k, v, beta, h0)]
        return torch.autograd.grad(f(*x), x)

    for a, b in zip(run(torch.compile(loss, fullgraph=True)), run(loss), strict=True):
        assert error(a, b) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_graph_capture(packed):
    """Nothing synchronises with the host, lengths of packed sequences included."""
    q, k, v, beta, _ = make(1, 256, 2, 128, dtype=torch.bfloat16, state=False)
    cu = torch.tensor([0, 77, 256], device=DEVICE) if packed else None
    x = [t.requires_grad_() for t in (q, k, v, beta)]
    do = torch.randn_like(v)

    def run():
        o, _ = chunk_delta_rule(*x, use_qk_l2norm_in_kernel=True, cu_seqlens=cu)
        return [o, *torch.autograd.grad(o, x, do)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)


def test_the_table_has_every_architecture():
    for arch in (80, 86, 89, 90, 100, 120):
        for K in (32, 64, 96, 128, 192, 256):
            for wide in (False, True):
                assert plan.launch_table(arch, K, K, wide, False).scan.columns >= 16
