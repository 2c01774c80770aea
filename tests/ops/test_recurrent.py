"""The token-by-token kernels and the decode step against the recurrence in fp64, forward and every gradient.

Without a GPU they run in Triton's interpreter (see conftest.py); with one, the same tests run on it.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _reference import DEVICE, assert_close, delta_rule_fp64, make


triton = pytest.importorskip("triton")

from deltanet_kernels import (  # noqa: E402
    delta_rule_step,
    fused_recurrent_delta_rule,
    recurrent,  # noqa: E402
)


CUDA = torch.cuda.is_available()
# inductor compiles for the GPU; on the CPU tracing and the registrations are what can be tried
BACKEND = "inductor" if CUDA else "aot_eager"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = ("o", "final_state", "dq", "dk", "dv", "dbeta", "dinitial_state")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
make_leaves = functools.partial(make, keys="unit", requires_grad=True)


def outputs_and_gradients(function, inputs, with_state=True):
    o, final_state = function(*inputs)
    g = torch.Generator().manual_seed(7)
    loss = (o * torch.randn(o.shape, generator=g).to(o.device, o.dtype)).sum()
    if with_state:
        loss = loss + (final_state * torch.randn(final_state.shape, generator=g).to(o.device)).sum()
    gradients = torch.autograd.grad(loss, [x for x in inputs if x is not None], allow_unused=True)
    return (o, final_state, *gradients)


def check(inputs, tolerance, scale=None, norm=False, cu_seqlens=None, with_state=True):
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)

    def ours(q, k, v, beta, h0):
        return fused_recurrent_delta_rule(q, k, v, beta, scale, h0, True, norm, cu)

    def wanted(q, k, v, beta, h0):
        return delta_rule_fp64(q, k, v, beta, scale, h0, norm, cu_seqlens)

    assert_close(
        NAMES,
        outputs_and_gradients(ours, inputs, with_state),
        outputs_and_gradients(wanted, inputs, with_state),
        tolerance,
    )


CASES = {  # B, T, H, HV, K, V, dtype, norm, state
    "plain": (2, 9, 2, 2, 16, 16, torch.float32, False, False),
    "norm and state": (1, 9, 1, 2, 32, 24, torch.float32, True, True),
    "one token": (2, 1, 1, 1, 16, 32, torch.float32, True, True),
    "bf16": (1, 9, 2, 4, 32, 16, torch.bfloat16, True, True),
    "fp16": (1, 9, 1, 1, 16, 16, torch.float16, True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case):
    """A wrong output or gradient here is a model that trains to something else."""
    B, T, H, HV, K, V, dtype, norm, state = CASES[case]
    check(
        make_leaves(B, T, H, K, V, HV, dtype=dtype, state=state),
        TOLERANCE[dtype],
        norm=norm,
        scale=0.3 if state else None,
    )


@pytest.mark.parametrize("K, V", [(32, 64), (64, 96), (96, 128), (128, 32), (192, 16), (16, 192), (256, 256)])
def test_head_sizes(K, V):
    """Every documented head size works, also those that are no power of two, and K != V."""
    check(make_leaves(1, 2, 1, K, V), TOLERANCE[torch.float32], norm=True)


def test_packed_sequences():
    """A packed sequence gives what it gives alone, empty neighbours included."""
    cu_seqlens = [0, 3, 3, 4, 11]
    check(make_leaves(1, 11, 1, 16, HV=2, N=4), TOLERANCE[torch.float32], norm=True, cu_seqlens=cu_seqlens)


def test_no_tokens():
    """An empty batch hands its state through, and the state's gradient back."""
    q, k, v, beta, h0 = make_leaves(2, 0, 1, 16)
    o, final_state = fused_recurrent_delta_rule(q, k, v, beta, None, h0, True)
    assert o.shape == v.shape
    assert torch.equal(final_state, h0)
    (dh0,) = torch.autograd.grad((final_state * 3).sum(), [h0])
    assert torch.equal(dh0, torch.full_like(h0, 3))


def test_beta_zero():
    """A padded token (beta = 0) has exact gradients, that of beta included: nothing is divided by it."""
    q, k, v, beta, h0 = make_leaves(1, 7, 1, 16)
    with torch.no_grad():
        beta[:, ::2] = 0
    check((q, k, v, beta, h0), TOLERANCE[torch.float32])


def test_gradient_from_output_or_state_alone():
    """A loss on the output alone, or on the final state alone, needs no gradient of the other."""
    inputs = make_leaves(1, 5, 1, 16)
    check(inputs, TOLERANCE[torch.float32], with_state=False)
    grads = []
    for function in (
        lambda q, k, v, b, h: fused_recurrent_delta_rule(q, k, v, b, None, h, True),
        lambda q, k, v, b, h: delta_rule_fp64(q, k, v, b, None, h, False, None),
    ):
        _, final_state = function(*inputs)
        grads.append(torch.autograd.grad(final_state.square().sum(), inputs, allow_unused=True))
    assert not grads[0][0].any()  # nothing depends on q
    assert_close(NAMES, (None, None, None, *grads[0][1:]), (None, None, None, *grads[1][1:]), TOLERANCE[torch.float32])


def test_strided_and_poisoned():
    """q, k, v are read in place from one projection, and not a value beyond their borders is used."""
    B, T, H, K, V = 2, 6, 2, 24, 40
    inputs = make_leaves(B, T, H, K, V)
    plain = fused_recurrent_delta_rule(*inputs[:4], initial_state=inputs[4])[0]
    buffer = torch.full((B, T + 3, H * (2 * K + V) + H + 5), torch.nan, device=DEVICE)
    views, first = [], 0
    for x in inputs[:4]:
        width = x[0, 0].numel()
        views.append(buffer[:, 1 : T + 1, first : first + width].unflatten(2, x.shape[2:]))
        views[-1].copy_(x.detach())
        first += width
    views = [x.requires_grad_() for x in views]
    strided = fused_recurrent_delta_rule(*views, initial_state=inputs[4])[0]
    assert torch.equal(plain, strided)
    do = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(plain, inputs, do), torch.autograd.grad(strided, (*views, inputs[4]), do)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", [False, True])
def test_step(norm):
    """Decoding token by token gives what the whole sequence gives, and leaves the same state behind."""
    q, k, v, beta, h0 = make(2, 4, 1, 24, 40, HV=2, keys="unit")
    expected, final_state = delta_rule_fp64(q, k, v, beta, None, h0, norm, None)
    pool = torch.full((3, 2, 24, 48), torch.nan, device=DEVICE)
    state = pool[:2, :, :, :40].copy_(h0)
    outputs = []
    for t in range(4):
        token = slice(t, t + 1)
        outputs.append(delta_rule_step(q[:, token], k[:, token], v[:, token], beta[:, token], state, None, norm))
    assert_close(NAMES, (torch.cat(outputs, 1), state), (expected, final_state), TOLERANCE[torch.float32])
    assert torch.isnan(pool[2]).all() and torch.isnan(pool[:2, :, :, 40:]).all()


def test_step_half_precision():
    """The state stays in fp32 whatever the inputs are."""
    q, k, v, beta, h0 = make(1, 1, 1, 32, dtype=torch.bfloat16, keys="unit")
    expected = delta_rule_fp64(q, k, v, beta, None, h0, True, None)
    o = delta_rule_step(q, k, v, beta, h0, use_qk_l2norm_in_kernel=True)
    assert o.dtype == torch.bfloat16
    assert_close(NAMES, (o,), expected[:1], TOLERANCE[torch.bfloat16])
    assert_close(NAMES, (None, h0), (None, expected[1]), TOLERANCE[torch.float32])


def test_compile_fullgraph():
    """torch.compile goes through forward, backward and the step without a graph break."""
    inputs = make_leaves(1, 5, 1, 16, HV=2)

    def run(q, k, v, beta, h0):
        return fused_recurrent_delta_rule(q, k, v, beta, None, h0, True, True)

    eager = outputs_and_gradients(run, inputs)
    compiled = outputs_and_gradients(torch.compile(run, fullgraph=True, backend=BACKEND), inputs)
    assert_close(NAMES, compiled, eager, 1e-6)
    q, k, v, beta, h0 = (x.detach() for x in inputs)
    states = h0.clone(), h0.clone()

    def step(q, k, v, beta, state):
        return delta_rule_step(q[:, :1], k[:, :1], v[:, :1], beta[:, :1], state)

    eager = step(q, k, v, beta, states[0])
    compiled = torch.compile(step, fullgraph=True, backend=BACKEND)(q, k, v, beta, states[1])
    assert torch.equal(eager, compiled) and torch.equal(*states) and not torch.equal(states[1], h0)


def test_errors_name_what_came():
    """A wrong shape is refused in words, not by a wrong result or an illegal memory access."""
    q, k, v, beta, h0 = make(2, 3, 2, 16, HV=4, keys="unit")
    with pytest.raises(ValueError, match=r"k must have the shape of q.*\[2, 2, 2, 16\]"):
        fused_recurrent_delta_rule(q, k[:, :2], v, beta)
    with pytest.raises(ValueError, match=r"multiple of q's 2 heads, got 3"):
        fused_recurrent_delta_rule(q, k, v[:, :, :3], beta)
    with pytest.raises(ValueError, match=r"beta must be \[2, 3, 4\]"):
        fused_recurrent_delta_rule(q, k, v, beta[:, :, :2])
    with pytest.raises(ValueError, match="float64"):
        fused_recurrent_delta_rule(q.double(), k.double(), v.double(), beta)
    with pytest.raises(ValueError, match=r"initial_state must be \[2, 4, 16, 16\]"):
        fused_recurrent_delta_rule(q, k, v, beta, initial_state=h0[:1])
    with pytest.raises(ValueError, match="B = 1, got 2"):
        fused_recurrent_delta_rule(q, k, v, beta, cu_seqlens=torch.tensor([0, 3], device=DEVICE))
    with pytest.raises(ValueError, match="T = 1, got T = 3"):
        delta_rule_step(q, k, v, beta, h0)
    with pytest.raises(ValueError, match="no backward"):
        delta_rule_step(q[:, :1].clone().requires_grad_(), k[:, :1], v[:, :1], beta[:, :1], h0)
    with pytest.raises(TypeError):
        fused_recurrent_delta_rule(q, k, v, beta, cu_seqlen=None)


SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}  # of a block, KB
# The token loops run one warp a program and may take what there is; the others need many warps to hide memory.
REGISTERS = {"recurrent": 255, "conv": 168, "step": 128}
COMPILED = [(80, 256), (89, 128), (90, 128), (90, 256), (100, 128)]


@pytest.fixture(scope="module")
def compiled():
    """What one process has compiled: (capability, d) -> kernel -> resources."""
    here = Path(__file__).parent
    paths = [str(Path(recurrent.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, here / "offline.py", *(f"{capability}:{d}" for capability, d in COMPILED)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]  # the lines tell how many went well
    return dict(zip(COMPILED, map(json.loads, done.stdout.splitlines())))


@pytest.mark.parametrize("capability, d", COMPILED)
def test_compiles_offline(compiled, capability, d):
    """Every kernel of recurrent.py and short_conv.py fits the GPUs we name, and keeps its state in registers."""
    for name, (registers, stack, local, shared) in compiled[capability, d].items():
        assert stack == 0 and local == 0, f"{name} spills: {stack} bytes of stack, {local} of local memory"
        assert registers <= REGISTERS[name.split()[0].strip(",")], f"{name}: {registers} registers"
        assert shared <= SHARED_MEMORY[capability] * 1024, f"{name}: {shared} bytes of shared memory"


def measured(K=128, V=128, dtype=torch.bfloat16, **kwargs):
    return make_leaves(2, 384, 4, K, V, HV=8, dtype=dtype, **kwargs)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("K, V", [(64, 64), (128, 128), (256, 256), (96, 192)])
    def test_real_sizes(self, K, V, dtype):
        check(measured(K, V, dtype), TOLERANCE[dtype], norm=True)

    def test_real_sizes_packed(self):
        check(
            make_leaves(1, 700, 4, 128, N=4, dtype=torch.bfloat16), 1e-2, norm=True, cu_seqlens=[0, 1, 300, 301, 700]
        )

    def test_deterministic(self):
        """Two runs give the same bits: no atomics, one order of summation."""
        inputs = measured()

        def run(q, k, v, beta, h0):
            return fused_recurrent_delta_rule(q, k, v, beta, None, h0, True, True)

        for a, b in zip(outputs_and_gradients(run, inputs), outputs_and_gradients(run, inputs)):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("B, K", [(1, 128), (64, 128), (3, 256), (5, 32), (2, 192)])
    def test_step_sizes(self, B, K):
        q, k, v, beta, h0 = make(B, 1, 8, K, HV=16, dtype=torch.bfloat16, keys="unit")
        expected = delta_rule_fp64(q, k, v, beta, None, h0, True, None)
        o = delta_rule_step(q, k, v, beta, h0, use_qk_l2norm_in_kernel=True)
        assert_close(NAMES, (o,), expected[:1], 1e-2)
        assert_close(NAMES, (None, h0), (None, expected[1]), 1e-5)

    def test_step_in_a_cuda_graph(self):
        """A captured step replays on new inputs and moves the state on, as serving engines need it."""
        q, k, v, beta, h0 = make(4, 3, 8, 128, dtype=torch.bfloat16, keys="unit")
        token = [x[:, :1].clone() for x in (q, k, v, beta)]
        state = h0.clone()
        delta_rule_step(*token, state.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = delta_rule_step(*token, state)
        eager = h0.clone()
        for t in range(3):
            for x, y in zip(token, (q, k, v, beta)):
                x.copy_(y[:, t : t + 1])
            graph.replay()
            assert torch.equal(o, delta_rule_step(*token, eager))
        assert torch.equal(state, eager)
