"""The short convolution against plain sums in fp64, forward and every gradient.

Without a GPU the kernels run in Triton's interpreter (see conftest.py); with one, the same tests run on it.
Whether they compile for GPUs that are not there is tested in test_recurrent.py.
"""

import pytest
import torch
from _reference import DEVICE, assert_close


triton = pytest.importorskip("triton")

from deltanet_kernels import short_conv, short_conv_step  # noqa: E402


CUDA = torch.cuda.is_available()
BACKEND = "inductor" if CUDA else "aot_eager"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
pytestmark = pytest.mark.usefixtures("short_segments")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


def reference(xs, weights, activation, initial_state, cu_seqlens):
    """(y of all tensors side by side, final state), in fp64."""
    x, w = torch.cat(list(xs), 2).double(), torch.cat(list(weights)).double()
    B, T, D = x.shape
    W = w.shape[1]
    sequences = [(b, 0, T) for b in range(B)]
    if cu_seqlens is not None:
        sequences = [(0, first, last) for first, last in zip(cu_seqlens[:-1], cu_seqlens[1:])]
    ys, states = [], []
    for n, (b, first, last) in enumerate(sequences):
        before = x.new_zeros(W - 1, D) if initial_state is None else initial_state[n].double().T
        row = torch.cat([before, x[b, first:last]])
        z = sum(w[:, i] * row[i : i + last - first] for i in range(W))
        ys.append(z * z.sigmoid() if activation == "silu" else z)
        states.append(row[len(row) - (W - 1) :].T)
    return torch.cat(ys).reshape(B, T, D), torch.stack(states)


def make_convolution(B, T, sizes, W, dtype=torch.float32, N=None, state=False):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype).requires_grad_()

    xs, weights = [randn(B, T, D) for D in sizes], [randn(D, W) for D in sizes]
    return xs, weights, randn(N or B, sum(sizes), W - 1) if state else None


def gradients_of(y, inputs):
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.device)
    return torch.autograd.grad((y.double() * dy).sum(), inputs)


def check(xs, weights, state, tolerance, activation="silu", cu_seqlens=None):
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    ys, final_state = short_conv(xs, weights, activation, state, True, cu)
    assert all(y.dtype == x.dtype and y.shape == x.shape for x, y in zip(xs, ys))
    y, wanted_state = reference(xs, weights, activation, state, cu_seqlens)
    inputs = [*xs, *weights, *([] if state is None else [state])]
    names = ["y", *(f"dx{i}" for i in range(len(xs))), *(f"dw{i}" for i in range(len(xs))), "dstate"]
    ours = torch.cat(ys, 2)
    # a text that is read in segments teaches through the state, too
    outputs = [torch.cat((a.flatten(), b.flatten())) for a, b in ((ours, final_state), (y, wanted_state))]
    gradients = [gradients_of(x, inputs) for x in outputs]
    assert_close(names, (ours, *gradients[0]), (y, *gradients[1]), tolerance)
    assert torch.equal(final_state.double(), wanted_state)
    with torch.no_grad():  # then a kernel writes it
        assert torch.equal(short_conv(xs, weights, activation, state, True, cu)[1].double(), wanted_state)


CASES = {  # B, T, sizes, W, dtype, activation, state
    "q, k, v with a state": (2, 20, (20, 33, 16), 4, torch.float32, "silu", True),
    "no activation, width 2": (2, 5, (20, 33), 2, torch.float32, None, False),
    "width 3, one tensor": (1, 9, (17,), 3, torch.float32, "silu", True),
    "shorter than the window": (2, 2, (16, 16, 32), 4, torch.float32, "silu", True),
    "one token": (2, 1, (16,), 4, torch.float32, "silu", False),
    "several channel blocks": (1, 6, (300, 520), 4, torch.float32, "silu", False),
    "bf16": (1, 20, (16, 16), 4, torch.bfloat16, "silu", True),
    "fp16": (1, 20, (16, 16), 4, torch.float16, "silu", False),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case):
    """A wrong output or gradient here is a model that trains to something else."""
    B, T, sizes, W, dtype, activation, state = CASES[case]
    check(*make_convolution(B, T, sizes, W, dtype, state=state), TOLERANCE[dtype], activation)


def test_segments_as_on_a_gpu(monkeypatch):
    """The launch choices that all other tests leave out would lose rows."""
    monkeypatch.undo()  # the short segments
    check(*make_convolution(1, 135, (17,), 4), TOLERANCE[torch.float32])


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_packed_sequences(W, state):
    """Nothing leaks across a border, forward or backward, wherever it falls in a block, with empty neighbours."""
    cu_seqlens = [0, 0, 1, 20, 24, 27, 27, 28, 35, 35]
    tensors = make_convolution(1, 35, (20, 16), W, N=len(cu_seqlens) - 1, state=state)
    check(*tensors, TOLERANCE[torch.float32], cu_seqlens=cu_seqlens)


def test_no_tokens():
    """An empty batch hands its state through."""
    xs, weights, state = make_convolution(2, 0, (16, 8), 4, state=True)
    ys, final_state = short_conv(xs, weights, "silu", state, True)
    assert [y.shape for y in ys] == [x.shape for x in xs]
    assert torch.equal(final_state, state)


def test_strided_and_poisoned():
    """Views of one projection are read in place, and not a value beyond their borders is used."""
    xs, weights, _ = make_convolution(2, 11, (24, 16), 4)
    buffer = torch.full((2, 15, 60), torch.nan, device=DEVICE)
    views = [buffer[:, 2:13, 3:27], buffer[:, 2:13, 40:56]]
    views = [view.copy_(x.detach()).requires_grad_() for view, x in zip(views, xs)]
    plain, strided = (torch.cat(short_conv(x, weights)[0], 2) for x in (xs, views))
    assert torch.equal(plain, strided)
    for a, b in zip(gradients_of(plain, [*xs, *weights]), gradients_of(strided, [*views, *weights])):
        assert torch.equal(a, b)


def test_weights_in_fp32_beside_bf16():
    """Master weights may stay in fp32, and get their gradient in fp32."""
    xs, _, _ = make_convolution(1, 9, (16,), 4, torch.bfloat16)
    _, weights, _ = make_convolution(1, 9, (16,), 4, torch.float32)
    (dw,) = gradients_of(short_conv(xs, weights)[0][0], weights)
    assert dw.dtype == torch.float32
    (wanted,) = gradients_of(reference(xs, weights, "silu", None, None)[0], weights)
    assert_close(["dw"], [dw], [wanted], 1e-2)


def test_one_tensor_does_not_need_a_gradient():
    """A frozen projection leaves the other gradients as they are."""
    xs, weights, _ = make_convolution(1, 9, (16, 8), 4)
    xs[0].requires_grad_(False)
    inputs = [xs[1], *weights]
    ours = gradients_of(torch.cat(short_conv(xs, weights)[0], 2), inputs)
    assert_close("xvw", ours, gradients_of(reference(xs, weights, "silu", None, None)[0], inputs), 1e-5)


@pytest.mark.parametrize("W, dtype", [(2, torch.float32), (3, torch.float32), (4, torch.bfloat16)])
def test_step(W, dtype):
    """Decoding token by token gives the very values of the whole sequence, and the same state."""
    xs, weights, state = make_convolution(2, 9, (16, 20, 8), W, dtype, state=True)
    xs, weights, state = [x.detach() for x in xs], [w.detach() for w in weights], state.detach()
    whole, final_state = short_conv(xs, weights, "silu", state, True)
    moving, steps = state.clone(), []
    for t in range(9):
        steps.append(short_conv_step([x[:, t : t + 1] for x in xs], weights, moving))
    for y, *ys in zip(whole, *steps):
        assert_close("y", [torch.cat(ys, 1)], [y], TOLERANCE[dtype])
    assert torch.equal(moving, final_state)


def test_compile_fullgraph():
    """torch.compile goes through forward, backward and the step without a graph break."""
    xs, weights, state = make_convolution(2, 9, (16, 20, 8), 4, state=True)

    def run(xs, weights, state):
        ys, final_state = short_conv(xs, weights, "silu", state, True)
        return torch.cat(ys, 2), final_state

    inputs = [*xs, *weights, state]
    eager, compiled = run(xs, weights, state), torch.compile(run, fullgraph=True, backend=BACKEND)(xs, weights, state)
    assert torch.equal(eager[1], compiled[1])
    pair = [(y, *gradients_of(torch.cat((y.flatten(), s.flatten())), inputs)) for y, s in (eager, compiled)]
    assert_close(["y", *map(str, range(7))], *pair, 1e-6)

    def step(xs, weights, state):
        return torch.cat(short_conv_step([x[:, :1] for x in xs], weights, state), 2)

    with torch.no_grad():
        states = state.clone(), state.clone()
        eager = step(xs, weights, states[0])
        compiled = torch.compile(step, fullgraph=True, backend=BACKEND)(xs, weights, states[1])
    assert torch.equal(eager, compiled) and torch.equal(*states) and not torch.equal(states[1], state)


def test_errors_name_what_came():
    """A wrong shape is refused in words, not by a wrong result or an illegal memory access."""
    xs, weights, state = make_convolution(2, 3, (16, 8), 4, state=True)
    with pytest.raises(ValueError, match="1 to 3 tensors.*2 and 1"):
        short_conv(xs, weights[:1])
    with pytest.raises(ValueError, match=r"weights\[1\] must be \[8, 4\].*\[16, 4\]"):
        short_conv(xs, [weights[0], weights[0]])
    with pytest.raises(ValueError, match=r"W in 2\.\.4, got \[16, 5\]"):
        short_conv(xs[:1], [torch.zeros(16, 5, device=DEVICE)])
    with pytest.raises(ValueError, match="'gelu'"):
        short_conv(xs, weights, "gelu")
    with pytest.raises(ValueError, match=r"\[2, 24, 3\].*\[1, 24, 3\]"):
        short_conv(xs, weights, initial_state=state[:1])
    with pytest.raises(ValueError, match="B = 1, got B = 2"):
        short_conv(xs, weights, cu_seqlens=torch.tensor([0, 3], device=DEVICE))
    with pytest.raises(ValueError, match="T = 1, got T = 3"):
        short_conv_step(xs, weights, state)
    with pytest.raises(ValueError, match="no backward"):
        short_conv_step([x[:, :1] for x in xs], weights, state)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("state", [False, True])
    def test_real_sizes(self, dtype, state):
        check(*make_convolution(2, 1000, (2048, 2048, 1024), 4, dtype, state=state), TOLERANCE[dtype])

    def test_real_sizes_packed(self):
        cu_seqlens = [0, 1, 64, 64, 700, 1500]
        check(
            *make_convolution(1, 1500, (1024, 1024, 512), 4, torch.bfloat16, N=5, state=True),
            1e-2,
            cu_seqlens=cu_seqlens,
        )

    def test_deterministic(self):
        """Two runs give the same bits: no atomics, one order of summation."""
        xs, weights, _ = make_convolution(2, 1000, (1024, 1024), 4, torch.bfloat16)
        runs = []
        for _ in range(2):
            y = torch.cat(short_conv(xs, weights)[0], 2)
            runs.append((y, *gradients_of(y, [*xs, *weights])))
        assert all(torch.equal(a, b) for a, b in zip(*runs))

    def test_step_in_a_cuda_graph(self):
        """A captured step replays on new inputs and moves the state on."""
        xs, weights, state = make_convolution(4, 3, (512, 512, 512), 4, torch.bfloat16, state=True)
        xs, weights, start = [x.detach() for x in xs], [w.detach() for w in weights], state.detach()
        token, state, eager = [x[:, :1].clone() for x in xs], start.clone(), start.clone()
        short_conv_step(token, weights, start.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = short_conv_step(token, weights, state)
        for t in range(3):
            for x, y in zip(token, xs):
                x.copy_(y[:, t : t + 1])
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(ys, short_conv_step(token, weights, eager)))
        assert torch.equal(state, eager)
