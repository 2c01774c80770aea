"""Launches that go past Triton, and calls past the launchers: on a CPU with a kernel that only notes down what it is
told.
"""

import inspect
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch


triton = pytest.importorskip("triton")
from deltanet_kernels import _launch, _replay, chunk_delta_rule, plan  # noqa: E402


class Kernel:
    """What `launch` uses of a Triton kernel and of a compiled one."""

    arg_names = ("x", "y", "n", "C", "D")
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.fn, self.compiled, self.told, self.loaded = object(), 0, [], False

    def __getitem__(self, grid):
        self.loaded = True
        return lambda *args, **constants: self.first(args, constants) if constants else self.told.append((grid, args))

    def first(self, args, constants):
        self.compiled += 1
        return self

    def warmup(self, *args, grid, **constants):
        self.compiled += 1
        self.thread = threading.current_thread()
        return self

    def run(self, *args):
        self.told.append(args)


@pytest.fixture
def kernel(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: "stream"))
    monkeypatch.setattr(_launch, "driver", driver)
    monkeypatch.setattr(_launch, "_compiled", {})
    return Kernel()


def launch(kernel, x, y, n=3, **constants):
    _launch.launch(kernel, (5, 6), (x, y), (n,), {"D": 8, "C": 7, **constants}, {"num_warps": 4})


def test_other_tensors_of_the_same_kind(kernel):
    """A call would write to the tensors of the call before, or with its constants in the wrong order."""
    a, b = torch.zeros(8), torch.zeros(8)
    launch(kernel, a, None)
    launch(kernel, b, None)
    assert kernel.compiled == 1
    expected = (5, 6, 1, "stream", "function", "metadata", None, None, None, b.data_ptr(), None, 3, 7, 8)
    assert kernel.told == [expected]


def test_whatever_triton_specialises_on_compiles_again(kernel):
    """Code made for aligned addresses, or for other types and sizes, would run on what it cannot read."""
    a = torch.zeros(9)
    for x, y, n, C in (
        (a, a, 3, 7), (a, None, 3, 7), (a[1:], a, 3, 7), (a, a[1:], 3, 7), (a.double(), a, 3, 7), (a, a, 4, 7),
        (a, a, 3, 9),
    ):  # fmt: skip
        before = kernel.compiled
        launch(kernel, x, y, n, C=C)
        assert kernel.compiled == before + 1
    launch(kernel, a, a)
    assert kernel.compiled == 7 and len(kernel.told) == 1


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_with_a_hook_triton_launches(kernel, monkeypatch, name):
    """A profiler would not see the kernels, or see them without their names."""
    a = torch.zeros(8)
    launch(kernel, a, a)
    monkeypatch.setattr(triton.knobs.runtime, name, lambda metadata: None)
    launch(kernel, a, a)
    assert kernel.told == [((5, 6, 1), (a.data_ptr(), a.data_ptr(), 3, 7, 8))]


def test_beside_an_untried_triton_triton_launches(kernel, monkeypatch):
    """A release that changes what its compiled kernels take would be handed a stream for a size, silently."""
    monkeypatch.setattr(_launch, "LAUNCHER", False)
    monkeypatch.setattr(_launch, "driver", None)  # is not asked for a stream either
    a = torch.zeros(8)
    launch(kernel, a, None)
    launch(kernel, a, None)
    assert kernel.told == [((5, 6, 1), (a.data_ptr(), None, 3, 7, 8))]


def test_an_untried_triton_plays_tapes(kernel, monkeypatch):
    """Recorded calls have a way of their own to the driver."""
    monkeypatch.setattr(_launch, "LAUNCHER", False)
    monkeypatch.setattr(_launch, "driver", None)
    monkeypatch.setattr(_replay, "_tapes", {})

    def call(n, x):
        y = torch.empty_like(x)
        launch(kernel, x, y, n)
        return [y]

    x = torch.zeros(8)
    for _ in range(3):
        (y,) = _replay.replay(call, (3,), (x,))
    (tape,) = _replay._tapes.values()
    assert type(tape) is _replay.Tape
    assert kernel.told[-1] == ((5, 6, 1), (x.data_ptr(), y.data_ptr(), 3, 7, 8))


def test_the_private_launcher_was_read_for_this_triton():
    """`run` is called with what stands before a kernel's own arguments: nine values, and hooks None."""
    source = inspect.getsource(triton.compiler.CompiledKernel)
    assert _launch.LAUNCHER, f"read the launcher of Triton {triton.__version__}, then add it to _launch.LAUNCHER"
    wanted = (
        "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata, "
        "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *args)"
    )
    assert wanted in " ".join(source.split())


def test_a_version_says_what_is_private():
    """A nightly build or a release candidate of an untried version must not pass for a tried one, nor fail to
    import.
    """
    code = (
        "import triton, sys; triton.__version__ = sys.argv[1]; from deltanet_kernels import _launch, plan; "
        "print(_launch.LAUNCHER, plan.GLUON)"
    )
    for version, expected in (("3.6.0+git1234", "True True"), ("3.10.0rc1", "False False"), ("4.0.0", "False False")):
        env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, "-c", code, version], env=env, capture_output=True, text=True)
        assert done.stdout.split() == expected.split(), done.stderr


def test_fusion_is_asked_for(kernel):
    """Triton 3.9 would warn at a first call, and from 3.10 on results would change with the version."""
    seen = []
    kernel.first = lambda args, constants: seen.append(constants["enable_fp_fusion"])
    launch(kernel, torch.zeros(8), None)
    assert seen == [True]


class Call:
    """A function as `replay` takes it: two allocations, a launch on them and on what it is given, and `odd` in
    between.
    """

    def __init__(self, kernel, odd=None):
        self.kernel, self.odd, self.runs = kernel, odd, 0

    def __call__(self, n, x, y):
        self.runs += 1
        # detached, where somebody else holds it too
        first = torch.empty_like(x, memory_format=torch.contiguous_format)
        second = x.new_empty(n, dtype=torch.float64)
        if self.odd is not None:
            first = self.odd(first)
        launch(self.kernel, second, first, n)
        launch(self.kernel, x, y, n)
        return [first, None, second, x]


def test_a_call_is_played_on_other_tensors(kernel):
    """A call would write to what another was given or returned, or launch in another order."""
    call = Call(kernel)
    for _ in range(2):
        _replay.replay(call, (3,), (torch.zeros(8, 2), None))
    kernel.told.clear()
    results = []
    for _ in range(2):
        x = torch.zeros(8, 2)
        results.append(_replay.replay(call, (3,), (x, None)))
        first, nothing, second, same = results[-1]
        assert same is x and nothing is None
        assert (first.shape, first.dtype, second.shape, second.dtype) == ((8, 2), x.dtype, (3,), torch.float64)
        start = (5, 6, 1, "stream", "function", "metadata", None, None, None)
        assert kernel.told[-2:] == [
            (*start, second.data_ptr(), first.data_ptr(), 3, 7, 8),
            (*start, x.data_ptr(), None, 3, 7, 8),
        ]
    assert call.runs == 2 and kernel.compiled == 2 and len(kernel.told) == 4
    assert len({x.data_ptr() for result in results for x in result if x is not None}) == 6


def test_whatever_a_call_depends_on_runs_it_again(kernel):
    """Another plan, other strides or code for aligned rows would be played on tensors that need their own."""
    x, call = torch.zeros(9, 2), Call(kernel)
    others = [
        (3, x, x.clone()), (4, x, None), (3, x[:8], None), (3, x[1:], None), (3, x.T.contiguous().T, None),
        (3, x.double(), None),
    ]  # fmt: skip
    for n, *tensors in [(3, x, None), *others]:
        before = call.runs
        for _ in range(4):
            _replay.replay(call, (n,), tuple(tensors))
        assert call.runs == before + 2
    other = Call(kernel)
    _replay.replay(other, (3,), (x, None))
    assert other.runs == 1


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x[1:], lambda x: x.view(-1), lambda x: x.clone(), lambda x: x.zero_(), lambda x: torch.zeros(8, 2),
        lambda x: x.as_strided((4, 4), (4, 1)), lambda x: x.as_strided((4, 2), (4, 1), 2),
    ],
)  # fmt: skip
def test_what_does_more_than_allocate_and_launch_is_not_played(kernel, odd):
    """The view would not be taken, the copy not made, the zeros not written."""
    call = Call(kernel, odd)
    for _ in range(4):
        _replay.replay(call, (3,), (torch.zeros(8, 2), None))
    assert call.runs == 4


def test_a_view_from_the_start_is_played(kernel):
    """Segments, rows of a larger batch to the kernels, would never be."""

    def call(x):
        out = torch.empty_like(x)
        launch(kernel, x.as_strided((4, 4), (4, 1)), out.as_strided((4, 4), (4, 1)))
        return [out]

    for _ in range(4):
        x = torch.zeros(8, 2)
        (out,) = _replay.replay(call, (), (x,))
    assert type(*_replay._tapes.values()) is _replay.Tape
    assert out.shape == x.shape and kernel.told[-1][-5:-3] == (x.data_ptr(), out.data_ptr())


def test_a_view_from_the_middle_is_played(kernel):
    """Tensors that are parts of one piece of memory would be taken for all of it."""

    def call(x):
        memory = x.new_empty(64, dtype=torch.uint8)
        launch(kernel, x, memory[32:].view(torch.float32).view(4, 2)[1])
        return [memory]

    for _ in range(4):
        x = torch.zeros(8, 2)
        (memory,) = _replay.replay(call, (), (x,))
    assert type(*_replay._tapes.values()) is _replay.Tape
    assert kernel.told[-1][-5:-3] == (x.data_ptr(), memory.data_ptr() + 40)


def test_one_tensor_under_two_names_is_not_recorded(kernel):
    """The next call's would be taken for one another."""
    x, call = torch.zeros(8, 2), Call(kernel)
    for _ in range(4):
        _replay.replay(call, (3,), (x, x))
    assert call.runs == 4


def test_nothing_is_played_where_triton_interprets(kernel, monkeypatch):
    """A tape without its kernels would return memory as it was allocated."""
    monkeypatch.setattr(Kernel, "first", lambda self, args, constants: None)
    call = Call(kernel)
    for _ in range(4):
        _replay.replay(call, (3,), (torch.zeros(8, 2), None))
    assert call.runs == 4


@pytest.mark.gpu
def test_gpu_hooks_see_every_launch():
    """Triton's profiler hangs itself into both; and a hook that is gone must not be called."""
    q, k, v = torch.randn(3, 1, 128, 2, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    beta = torch.rand(1, 128, 2, device="cuda").bfloat16()
    names, hook = [], triton.knobs.runtime.launch_enter_hook
    scores = plan.make_plan(q, k, v, beta, None, False).scores is not None

    def see(metadata):
        names.append(metadata.get()["name"])

    results = [chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0]]
    for add in (True, False):
        (hook.add if add else hook.remove)(see)
        for _ in range(3):  # once through Triton, once recorded, once played
            results.append(chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0])
        assert names == ["prepare_kernel", *["scores_kernel"] * scores, "scan_kernel"] * 3
    assert all(torch.equal(results[0], x) for x in results[1:])


CASES = {
    "plain": {},
    "states": {"state": True},
    "packed": {"packed": True, "state": True},
    "grouped": {"HV": 4, "d": 64},
    "fp32": {"dtype": torch.float32, "state": True},
    "fp16": {"dtype": torch.float16, "d": 64},
    "d = 256": {"d": 256},
    "off alignment": {"shift": 1},
    "many programs": {"B": 40},
    "segments": {"T": 8192, "H": 1},
    "segments of any length": {"T": 8200, "H": 1},
    "segments in forward": {"T": 4096, "H": 1},
    "segments, states": {"T": 4096, "H": 1, "state": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_gpu_a_played_call_gives_the_same_bits(case):
    """Training would learn from other numbers from its third step on."""

    def tensors(seed, B=2, T=150, H=2, HV=2, d=128, dtype=torch.bfloat16, state=False, packed=False, shift=0):
        torch.manual_seed(seed)
        B, HV = (1 if packed or T > 150 else B), (1 if H == 1 else HV)
        q, k, v, do = (
            torch.randn(B, T, h, d + shift, device="cuda", dtype=dtype)[..., shift:] for h in (H, H, HV, HV)
        )
        beta, h0 = torch.rand(B, T, HV, device="cuda", dtype=dtype), None
        kw = {"use_qk_l2norm_in_kernel": True, "output_final_state": state}
        if packed:
            kw["cu_seqlens"] = torch.tensor([0, 70, 70, 150], device="cuda")
        if state:
            h0 = torch.randn(3 if packed else B, HV, d, d, device="cuda")
        return [q, k, v, beta, h0], do, kw

    def run(seed):
        inputs, do, kw = tensors(seed, **CASES[case])
        inputs = [x if x is None else x.requires_grad_() for x in inputs]
        o, ht = chunk_delta_rule(*inputs[:4], initial_state=inputs[4], **kw)
        given = [x for x in inputs if x is not None]
        outputs, gradients = ([o], [do]) if ht is None else ([o, ht], [do, torch.ones_like(ht)])
        return [*outputs, *torch.autograd.grad(outputs, given, gradients)]

    expected = []
    for seed in range(5):
        _replay.forget()
        expected.append(run(seed))
    _replay.forget()
    for seed in range(5):
        assert all(torch.equal(x, y) for x, y in zip(run(seed), expected[seed], strict=True))
    played = [type(tape) is _replay.Tape for tape in _replay._tapes.values()]
    assert all(played) if case not in ("segments, states", "fp16") else not all(played)
