"""States in a server's pool: every function finds and leaves them by index, to the bit as if they had been gathered
before the call and scattered after it.

Without a GPU the kernels run in Triton's interpreter (see conftest.py); with one, the same tests run on it.
"""

import pytest
import torch
from _plans import change_plans
from _reference import DEVICE, make


triton = pytest.importorskip("triton")

from deltanet_kernels import (  # noqa: E402
    _switch,
    chunk,
    chunk_delta_rule,
    chunk_gated_delta_rule,
    delta_rule_step,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_rule_step,
    plan,
    short_conv,
    short_conv_step,
)


CUDA = torch.cuda.is_available()
BACKEND = "inductor" if CUDA else "aot_eager"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
SIZES = [(64, 64), (128, 128), (96, 192)]
# Five sequences: one token, none, a padded one of three, one from zeros, one more than a chunk long on a GPU
PLACES = [5, 2, -1, 0, 3]
GOES_ON = [True, True, True, False, True]
BORDERS = [0, 1, 1, 4, 6, 80 if CUDA else 8]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def poisoned_pool(states, places, layout, goes_on=None):
    """A pool that holds the states `[N, ...]` at their places, and NaN wherever nobody may look: in other slots, in
    those of sequences that start from zeros, and between slots.
    """
    shape = list(states.shape[1:])
    memory = torch.full((8, 2, *(shape if layout == "rows" else [*shape[:-2], shape[-1], shape[-2]])), torch.nan)
    memory[0] = 7  # where a slot -1 would be
    pool = memory.to(DEVICE, states.dtype)[1:, 0]
    pool = pool if layout == "rows" else pool.mT
    for n, place in enumerate(places):
        if place >= 0 and (goes_on is None or goes_on[n]):
            pool[place] = states[n]
    return pool


def expected_pool(pool, states, places):
    pool = pool.clone(memory_format=torch.preserve_format)
    for n, place in enumerate(places):
        if place >= 0:
            pool[place] = states[n]
    return pool


def check(got, wanted, exact):
    """Equal to the bit, or on a GPU, where sums over transposed states have another order, nearly so. The pool is the
    last.
    """
    memory = got[-1]._base
    assert (memory[0] == 7).all() and memory[1:, 1].isnan().all()
    for a, b in zip(got, wanted, strict=True):
        if exact:
            assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
        else:
            tolerance = 1e-2 if a.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)


def check_rule(function, inputs, borders, l2norm=True, exact=True, layout="rows", index_type=torch.int32, g=None):
    """A packed call on a pool against gather, call, scatter, with NaN for the tokens of the padded sequence."""
    q, k, v, beta, states = inputs
    options = {"use_qk_l2norm_in_kernel": l2norm, "output_final_state": True, "beta": beta}
    options |= {} if g is None else {"g": g}
    options["cu_seqlens"] = torch.tensor(borders, device=DEVICE)
    first = states.clone()
    first[[n for n, goes_on in enumerate(GOES_ON) if not goes_on]] = 0
    o, final = function(q, k, v, initial_state=first, **options)
    rows = slice(borders[2], borders[3])
    for x in (q, k, v):
        x[:, rows] = torch.nan
    pool = poisoned_pool(states, PLACES, layout, GOES_ON)
    wanted = expected_pool(pool, final, PLACES)
    o[:, rows] = 0
    where = {
        "state_indices": torch.tensor(PLACES, device=DEVICE, dtype=index_type),
        "has_initial_state": torch.tensor(GOES_ON, device=DEVICE),
    }
    got, returned = function(q, k, v, initial_state=pool, **options, **where)
    assert returned is pool
    check((got, pool), (o, wanted), exact)


def gate_like(beta, seed=3):
    return -torch.rand(beta.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


CASES = [("rows", 64, 64, False), ("rows", 128, 128, True), ("columns", 96, 192, False)]


@pytest.mark.parametrize("layout, K, V, gated", CASES)
def test_step(layout, K, V, gated):
    """A server's token would read another request's memory, or its padding would write over one."""
    *inputs, states = make(5, 1, 1, K, V, HV=2, dtype=torch.bfloat16 if gated else torch.float32)
    step = gated_delta_rule_step if gated else delta_rule_step
    inputs = [*inputs[:3], gate_like(inputs[3]), inputs[3]] if gated else inputs
    pool = poisoned_pool(states, PLACES, layout)
    o = step(*inputs, states, use_qk_l2norm_in_kernel=True)
    o[2] = 0
    for x in inputs:
        x[2] = torch.nan
    wanted = expected_pool(pool, states, PLACES)
    places = torch.tensor(PLACES, device=DEVICE)
    got = step(*inputs, pool, use_qk_l2norm_in_kernel=True, state_indices=places)
    check((got, pool), (o, wanted), layout == "rows" or not CUDA)


@pytest.mark.parametrize("layout, K, V, gated", [("rows", 24, 48, False), ("columns", 64, 24, True)])
def test_token_by_token(layout, K, V, gated):
    """A short prompt would go on from another request's memory, or from what a slot was left with."""
    inputs = make(1, BORDERS[-1], 1, K, V, HV=2, N=5, dtype=torch.bfloat16 if gated else torch.float32)
    g = gate_like(inputs[3]) if gated else None
    rule = fused_recurrent_gated_delta_rule if gated else fused_recurrent_delta_rule
    check_rule(rule, inputs, BORDERS, exact=layout == "rows" or not CUDA, layout=layout, g=g)


@pytest.mark.parametrize("layout, K, V, gated", CASES)
def test_chunks(layout, K, V, gated):
    """A prompt, or a part of one, would go on from another request's memory, or from what a slot was left with."""
    inputs = make(1, BORDERS[-1], 1, K, V, HV=2, N=5, dtype=torch.float32 if K == 64 else torch.bfloat16)
    g = gate_like(inputs[3]) if gated else None
    rule = chunk_gated_delta_rule if gated else chunk_delta_rule
    check_rule(rule, inputs, BORDERS, layout=layout, index_type=torch.int64 if gated else torch.int32, g=g)


def test_chunks_whose_states_are_copied(monkeypatch):
    """Where a sequence is cut into segments, they would be those of other sequences."""
    change_plans(monkeypatch, segments=2)
    q, k, v, beta, states = make(3, 70, 1, 40, 24)
    options = {"beta": beta, "use_qk_l2norm_in_kernel": True, "output_final_state": True}
    pool, places = poisoned_pool(states, [4, -1, 1], "columns"), torch.tensor([4, -1, 1], device=DEVICE)
    o, final = chunk_delta_rule(q, k, v, initial_state=states, **options)
    o[1] = 0
    wanted = expected_pool(pool, final, [4, -1, 1])
    got, _ = chunk_delta_rule(q, k, v, initial_state=pool, **options, state_indices=places)
    check((got, pool), (o, wanted), True)


@pytest.mark.parametrize("B", [1, 3])
def test_chunks_in_parts(B, monkeypatch):
    """More tokens than a set of launches takes would each start from the first part's state."""
    q, k, v, beta, states = make(B, 135, 1, 16)
    options = {"beta": beta, "use_qk_l2norm_in_kernel": True, "output_final_state": True}
    places, goes_on = [4, -1, 1][:B], torch.tensor([False, True, True][:B], device=DEVICE)
    pool = poisoned_pool(states, places, "rows", goes_on)
    where = {"state_indices": torch.tensor(places, device=DEVICE), "has_initial_state": goes_on}
    copy = pool.clone()
    o, _ = chunk_delta_rule(q, k, v, initial_state=copy, **options, **where)
    monkeypatch.setattr(chunk, "MAX_CHUNKS", 2 if B == 1 else 3)
    got, returned = chunk_delta_rule(q, k, v, initial_state=pool, **options, **where)
    assert returned is pool
    torch.testing.assert_close((got, pool), (o, copy), atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("layout, W, dtype", [("rows", 4, torch.bfloat16), ("columns", 3, torch.float32)])
@pytest.mark.usefixtures("short_segments")
def test_convolution(layout, W, dtype):
    """A prompt's first tokens, and each further one, would see another request's last ones."""
    torch.manual_seed(0)
    T = BORDERS[-1]
    xs = [torch.randn(1, T, D, device=DEVICE, dtype=dtype) for D in (24, 17)]
    weights = [torch.randn(D, W, device=DEVICE, dtype=dtype) for D in (24, 17)]
    states = torch.randn(5, 41, W - 1, device=DEVICE, dtype=dtype)
    first = states.clone()
    first[3] = 0
    cu, places = torch.tensor(BORDERS, device=DEVICE), torch.tensor(PLACES, device=DEVICE, dtype=torch.int32)
    ys, final = short_conv(xs, weights, "silu", first, True, cu)
    for x, y in zip(xs, ys):
        x[:, 1:4], y[:, 1:4] = torch.nan, 0
    pool = poisoned_pool(states, PLACES, layout, GOES_ON)
    wanted = expected_pool(pool, final, PLACES)
    where = {"state_indices": places, "has_initial_state": torch.tensor(GOES_ON, device=DEVICE)}
    got, returned = short_conv(xs, weights, "silu", pool, True, cu, **where)
    assert returned is pool
    check((*got, pool), (*ys, wanted), True)

    token = [torch.randn(5, 1, D, device=DEVICE, dtype=dtype) for D in (24, 17)]
    pool = poisoned_pool(states, PLACES, layout)
    ys = short_conv_step(token, weights, states)
    for x, y in zip(token, ys):
        x[2], y[2] = torch.nan, 0
    wanted = expected_pool(pool, states, PLACES)
    got = short_conv_step(token, weights, pool, state_indices=places)
    check((*got, pool), (*ys, wanted), True)


def test_more_rows_than_a_grid_takes(monkeypatch):
    """The rows of a second launch would take the slots of the first."""
    from deltanet_kernels import convolution

    xs, weights = [torch.randn(5, 2, 16, device=DEVICE)], [torch.randn(16, 4, device=DEVICE)]
    states, places = torch.randn(5, 16, 3, device=DEVICE), torch.tensor(PLACES, device=DEVICE)
    pools = [poisoned_pool(states, PLACES, "rows") for _ in range(2)]
    ys = []
    for pool, limit in zip(pools, (65535, 2)):
        monkeypatch.setattr(convolution, "GRID_LIMIT", limit)
        ys += short_conv(xs, weights, "silu", pool, state_indices=places)[0]
    check((ys[0], pools[0]), (ys[1], pools[1]), True)


def test_compile_fullgraph():
    """An engine that compiles its model would break its graph at each layer, or lose the new states."""
    q, k, v, beta, states = make(5, 1, 1, 16)
    weights, places = [torch.randn(16, 4, device=DEVICE)], torch.tensor(PLACES, device=DEVICE)
    goes_on = torch.tensor(GOES_ON, device=DEVICE)
    conv = torch.randn(7, 16, 3, device=DEVICE)

    def run(pool, conv):
        where = {"state_indices": places}
        (y,) = short_conv_step([q[:, :, 0]], weights, conv, **where)
        o = delta_rule_step(y.unsqueeze(2), k, v, beta, pool, **where)
        where |= {"has_initial_state": goes_on}
        (y,), _ = short_conv([q[:, :, 0]], weights, None, conv, **where)
        for rule in (chunk_delta_rule, fused_recurrent_delta_rule):
            o = o + rule(y.unsqueeze(2), k, v, beta, None, pool, False, True, **where)[0]
        return o

    pools = [(poisoned_pool(states, PLACES, "rows"), conv.clone()) for _ in range(2)]
    eager, compiled = run(*pools[0]), torch.compile(run, fullgraph=True, backend=BACKEND)(*pools[1])
    torch.testing.assert_close((compiled, *pools[1]), (eager, *pools[0]), equal_nan=True)
    assert not torch.equal(pools[0][1], conv)


def test_errors_name_what_came():
    """A mistake would be an illegal memory access, or somebody else's answer."""
    q, k, v, beta, states = make(2, 1, 1, 16)
    places, goes_on = torch.tensor([1, 0], device=DEVICE), torch.tensor([True, False], device=DEVICE)
    for rule in (chunk_delta_rule, fused_recurrent_delta_rule):
        with pytest.raises(ValueError, match="state_indices is for states in a pool, got no pool"):
            rule(q, k, v, beta, state_indices=places)
        with pytest.raises(ValueError, match="has_initial_state is for states in a pool, got no state_indices"):
            rule(q, k, v, beta, initial_state=states, has_initial_state=goes_on)
        with pytest.raises(ValueError, match=r"state_indices must be int32 or int64 \[2\], got torch.int64 \[1\]"):
            rule(q, k, v, beta, initial_state=states, state_indices=places[:1])
        with pytest.raises(ValueError, match=r"has_initial_state must be bool \[2\], got torch.int64 \[2\]"):
            rule(q, k, v, beta, initial_state=states, state_indices=places, has_initial_state=places)
        with pytest.raises(ValueError, match=r"torch.float32 \[slots, 1, 16, 16\], got torch.bfloat16 \[2, 1, 16, 16"):
            rule(q, k, v, beta, initial_state=states.bfloat16(), state_indices=places)
        with torch.enable_grad(), pytest.raises(ValueError, match="no backward.*requires_grad"):
            rule(q.clone().requires_grad_(), k, v, beta, initial_state=states, state_indices=places)
    with pytest.raises(ValueError, match=r"\[slots, 1, 16, 16\], got torch.float32 \[2, 16, 16\]"):
        delta_rule_step(q, k, v, beta, states[:, 0], state_indices=places)
    xs, weights = [torch.zeros(2, 1, 16, device=DEVICE)], [torch.zeros(16, 4, device=DEVICE)]
    with pytest.raises(ValueError, match=r"\[slots, 16, 3\], got torch.float32 \[7, 16, 2\]"):
        short_conv_step(xs, weights, torch.zeros(7, 16, 2, device=DEVICE), state_indices=places)
    with torch.enable_grad(), pytest.raises(ValueError, match="no backward"):
        pool = torch.zeros(7, 16, 3, device=DEVICE)
        short_conv([xs[0].requires_grad_()], weights, "silu", pool, state_indices=places)


@pytest.mark.parametrize("places, message", [([7, 1], "-1 to 6.*got 7 at 0"), ([3, 3], "once, got 3 at 0 and 1")])
def test_check_reads_the_indices(places, message, monkeypatch):
    """`DELTANET_KERNELS=check` would pass over what reads beyond the pool, or mixes two requests."""
    monkeypatch.setattr(_switch, "CHECKS", True)
    q, k, v, beta, states = make(2, 1, 1, 16)
    xs, weights = [q[:, :, 0]], [torch.ones(16, 4, device=DEVICE)]
    pool, conv = poisoned_pool(states, [1, 2], "rows"), torch.zeros(7, 16, 3, device=DEVICE)

    def run(where):
        delta_rule_step(q, k, v, beta, pool, state_indices=where)
        chunk_delta_rule(q, k, v, beta, initial_state=pool, state_indices=where)
        fused_recurrent_delta_rule(q, k, v, beta, initial_state=pool, state_indices=where)
        short_conv(xs, weights, "silu", conv, state_indices=where)
        short_conv_step(xs, weights, conv, state_indices=where)

    wrong = torch.tensor(places, device=DEVICE)
    for call in (
        lambda: delta_rule_step(q, k, v, beta, pool, state_indices=wrong),
        lambda: chunk_delta_rule(q, k, v, beta, initial_state=pool, state_indices=wrong),
        lambda: fused_recurrent_delta_rule(q, k, v, beta, initial_state=pool, state_indices=wrong),
        lambda: short_conv(xs, weights, "silu", conv, state_indices=wrong),
        lambda: short_conv_step(xs, weights, conv, state_indices=wrong),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    run(torch.tensor([1, -1], device=DEVICE))  # other slots may hold whatever they hold


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("layout", ["rows", "columns"])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("K, V", [*SIZES, (256, 256)])
    def test_real_sizes(self, K, V, gated, layout):
        """Prompts of all lengths on Hopper's kernels, replayed from a tape, too."""
        borders = [0, 64, 64, 300, 301, 1500]
        for _ in range(3):
            inputs = make(1, borders[-1], 4, K, V, HV=8, N=5, dtype=torch.bfloat16)
            g = gate_like(inputs[3]) if gated else None
            check_rule(chunk_gated_delta_rule if gated else chunk_delta_rule, inputs, borders, layout=layout, g=g)

    def test_segments(self):
        """A long prompt of one request is cut, and its state copied."""
        q, k, v, beta, states = make(1, 8192, 2, 128, dtype=torch.bfloat16)
        assert plan.make_plan(q, k, v, beta, None, False).segments > 1
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        pool, places = poisoned_pool(states, [3], "columns"), torch.tensor([3], device=DEVICE)
        o, final = chunk_delta_rule(q, k, v, beta, initial_state=states, **options)
        wanted = expected_pool(pool, final, [3])
        got, _ = chunk_delta_rule(q, k, v, beta, initial_state=pool, **options, state_indices=places)
        check((got, pool), (o, wanted), True)

    @pytest.mark.parametrize("layout", ["rows", "columns"])
    def test_step_in_a_cuda_graph(self, layout):
        """A captured step follows the indices of each replay, as a server's batch changes from token to token."""
        q, k, v, beta, states = make(4, 1, 8, 128, dtype=torch.bfloat16)
        pool = poisoned_pool(states, [0, 1, 2, 3], layout).nan_to_num(0.5)
        where = torch.tensor([0, 1, 2, 3], device=DEVICE, dtype=torch.int32)
        delta_rule_step(q, k, v, beta, pool.clone(memory_format=torch.preserve_format), state_indices=where)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = delta_rule_step(q, k, v, beta, pool, state_indices=where)
        for places in ([6, 5, 4, -1], [-1, -1, 2, 6]):
            copy = pool.clone(memory_format=torch.preserve_format)
            where.copy_(torch.tensor(places))
            graph.replay()
            wanted = delta_rule_step(q, k, v, beta, copy, state_indices=where)
            assert torch.equal(o, wanted) and torch.equal(pool, copy)
