"""Every route of the delta rule that this machine has, against fp64: what `deltanet check` runs and a bug report
attaches.

A *case* is what is computed (head sizes, dtype, layout, what the inputs hold), a *route* a function that computes it.
Both the command and the GPU tests go through `cases` and `run_case`:

    for case in cases(sizes=[(128, 128)], dtypes=["bfloat16"]):
        errors = run_case(case, torch.device("cuda"), chunk_delta_rule)  # {"output": 0.004, "dq": 0.005, ...}
        assert not too_large(errors, tolerance(case, "kernels"))

An error is ||x - reference|| / ||reference||. The reference is the torch chunk rule in fp64 on the same device, which
`check_reference` compares with the fp64 recurrence once.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from modeling_deltanet.delta_rule import torch_chunk_delta_rule, torch_recurrent_delta_rule


DTYPES = ("bfloat16", "float16", "float32")
# The sizes of published models, two small and uneven pairs, and the largest.
SIZES = ((128, 128), (64, 64), (32, 64), (64, 128), (96, 48), (256, 256))
LARGEST = 256
ALL_SIZES = tuple(itertools.product(range(16, LARGEST + 1, 16), repeat=2))


# --------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """What is computed. Everything else follows from it and a seed, so that a reported case can be run again."""

    K: int
    V: int
    dtype: str  # of q, k, v and beta
    layout: str  # a key of LAYOUTS
    inputs: str = "random"  # a key of INPUTS

    def __str__(self) -> str:
        return f"K {self.K}, V {self.V}, {self.dtype}, {self.layout}" + (
            "" if self.inputs == "random" else f", {self.inputs}"
        )


@dataclass(frozen=True)
class Layout:
    """Shapes of a call. `lengths` are those of packed sequences (then B is 1), or T."""

    B: int
    H: int
    HV: int
    lengths: int | tuple[int, ...]
    states: bool = True  # an initial state, a final one, and a gradient on it
    l2norm: bool = True


PACKED = (0, 1, 63, 64, 65, 130, 17, 99)  # 439 tokens; borders inside of chunks, an empty sequence

# Compiling is what a GPU's user waits for, so a layout combines factors, and two layouts share kernels where they can:
# a kernel is compiled anew for each dtype, K, V, launch choice (few or many programs), packed or not, whole chunks or
# not, value heads per key head (gradients alone), with gradients or without (scan alone), and for sizes that are 1 or
# a multiple of 16. `few` and `segmented` agree in all that: the scans are compiled once for both.
LAYOUTS = {
    # few heads · one sequence per row · whole chunks · one value head per key head
    "few": Layout(2, 2, 2, 192),
    # more programs than multiprocessors · packed · value heads in groups. 48 sequences, 2634 tokens
    "many": Layout(1, 2, 4, PACKED * 6),
    # cut into segments, in forward and in backward · few heads
    "segmented": Layout(1, 2, 2, 8192),
    # what training calls: no states · keys normalised by the caller · a last chunk that is not whole · groups
    "plain": Layout(2, 2, 4, 100, states=False, l2norm=False),
    "length 1": Layout(2, 2, 4, 1),
    "length 63": Layout(2, 2, 4, 63),
    "length 64": Layout(2, 2, 4, 64),
    "length 65": Layout(2, 2, 4, 65),
    "length 1000": Layout(2, 2, 4, 1000),
    # one token of decoding, in place
    "step": Layout(3, 2, 4, 1),
    # the short convolution of q, k and v, packed, with states
    "convolution": Layout(1, 2, 4, PACKED),
}
BASIC = ("few", "many", "segmented")  # the table of sizes
LENGTHS = tuple(name for name in LAYOUTS if name.startswith("length"))
# Elsewhere nothing is cut and nothing depends on the number of programs: shorter, so that a CPU needs a minute.
# Triton's interpreter takes a second per chunk (2026-11-27).
SMALLER = {
    "cpu": {"many": replace(LAYOUTS["many"], lengths=PACKED), "segmented": replace(LAYOUTS["segmented"], lengths=450)},
    "interpreter": {
        "few": Layout(1, 2, 2, 64),
        "many": Layout(1, 1, 2, (0, 1, 65)),
        "segmented": Layout(1, 2, 2, 130),
        "length 1000": Layout(1, 1, 1, 130),
        "convolution": Layout(1, 1, 2, (0, 1, 65)),
    },
}


def layout_on(case: Case, device: torch.device) -> Layout:
    """The shapes of a case on this device."""
    kind = "cuda" if device.type != "cpu" else "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu"
    return SMALLER.get(kind, {}).get(case.layout, LAYOUTS[case.layout])


def cases(
    sizes: Iterable[tuple[int, int]] = SIZES,
    dtypes: Iterable[str] = DTYPES,
    layouts: Iterable[str] = BASIC,
    inputs: Iterable[str] = ("random",),
) -> Iterator[Case]:
    """The product of all that is given, pair by pair: what shares compiled kernels comes together.

    Args:
        sizes: pairs (K, V), multiples of 16 up to 256 (`ALL_SIZES`); others work too.
        dtypes: of `DTYPES`.
        layouts: keys of `LAYOUTS`.
        inputs: keys of `INPUTS`.
    """
    for (K, V), dtype, layout, kind in itertools.product(sizes, dtypes, layouts, inputs):
        yield Case(K, V, dtype, layout, kind)


def quick(sizes=SIZES, dtypes=DTYPES) -> Iterator[Case]:
    """A minute: the basic layouts of each size in bf16, of the first size in every dtype, and what a single size can
    show.
    """
    sizes, dtypes = list(sizes), list(dtypes)
    yield from cases(sizes, dtypes[:1])
    yield from cases(sizes[:1], dtypes[1:])
    yield from _others(sizes[:1], dtypes[:1])


def full(sizes=ALL_SIZES, dtypes=DTYPES) -> Iterator[Case]:
    """Everything: the basic layouts of each size in each dtype, the others of every size of `SIZES` among them.

    Sizes of published models come first: of these, slow routes compute too, so that they take longest.
    """
    sizes, dtypes = list(sizes), list(dtypes)
    published = [pair for pair in sizes if pair in SIZES] or sizes[:1]
    yield from _others(published, dtypes)
    yield from cases(published, dtypes)
    yield from cases([pair for pair in sizes if pair not in published], dtypes)


def _others(sizes, dtypes) -> Iterator[Case]:
    yield from cases(sizes, dtypes, ("step", "convolution", "plain", *LENGTHS))
    yield from cases(sizes, dtypes, ("few",), ("silu", "repeated", "beta"))
    yield from cases(sizes, dtypes, BASIC, GATES)


# -------------------------------------------------------------------------------------------------------- the inputs


def _random(q, k, v, beta):
    return q, k, v, beta * 2


def _silu(q, k, v, beta):
    return F.silu(q), F.silu(k), F.silu(v), beta


def _repeated(q, k, v, beta):
    return q, k[:, :1].expand_as(k), v, beta * 2


BETAS = (0.0, 1e-8, 1e-6, 1e-5)


def _beta(q, k, v, beta):
    """Every third step size zero or tiny, as of masked tokens, every third 2, which reflects the state."""
    beta = beta.clone()
    for i, value in enumerate(BETAS):
        beta[:, 3 * i :: 3 * len(BETAS)] = value
    beta[:, 1::3] = 2
    return q, k, v, beta


# The gated rule: g from numbers uniform in [0, 1], as of a model that begins to learn, and where a twentieth of all
# tokens forgets everything and half of them nothing.
GATES = {
    "gated": lambda x: -0.1 * x,
    "forgetful": lambda x: torch.where(x < 0.05, -50.0, torch.where(x < 0.5, 0.0, -x)),
}
INPUTS = {"random": _random, "silu": _silu, "repeated": _repeated, "beta": _beta} | dict.fromkeys(GATES, _beta)
SMALL_BETA = 1e-4


@dataclass
class Inputs:
    tensors: dict[str, torch.Tensor]  # q, k, v, beta, with a gate g, with states initial_state
    gradients: list[torch.Tensor]  # of the output and, with states, of the final state
    l2norm: bool
    cu_seqlens: torch.Tensor | None


def _borders(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=24)  # a table of sizes would draw, and send to the device, for minutes
def _drawn(device: torch.device, seed: int, index: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1000 + index)).to(device)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Drawn on the CPU, so that every device gets the same numbers; smaller heads are a part of larger ones. Not to be
    changed.
    """
    return _make_inputs(case, layout_on(case, device), device, seed)


@functools.lru_cache(maxsize=2)  # of all calls of a case, in two threads
def _make_inputs(case: Case, shape: Layout, device: torch.device, seed: int) -> Inputs:
    dtype = getattr(torch, case.dtype)
    packed = isinstance(shape.lengths, tuple)
    B, H, HV = shape.B, shape.H, shape.HV
    T, N = (sum(shape.lengths), len(shape.lengths)) if packed else (shape.lengths, B)

    def randn(index, *leading, columns):
        return _drawn(device, seed, index, *leading, max(columns, LARGEST))[..., :columns]

    def states(index):
        return randn(index, N, HV, max(case.K, LARGEST), columns=case.V)[:, :, : case.K].contiguous()

    q, k = (randn(i, B, T, H, columns=case.K) for i in (0, 1))
    v, beta = randn(2, B, T, HV, columns=case.V), randn(3, B, T, columns=HV)
    beta = torch.special.ndtr(beta)  # uniform in [0, 1]
    if not shape.l2norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    q, k, v, beta = (x.to(dtype).contiguous() for x in INPUTS[case.inputs](q, k, v, beta))
    tensors = {"q": q, "k": k, "v": v, "beta": beta}
    if case.inputs in GATES:
        tensors["g"] = GATES[case.inputs](torch.special.ndtr(randn(7, B, T, columns=HV))).contiguous()
    gradients = [randn(4, B, T, HV, columns=case.V).to(dtype).contiguous()]
    if shape.states:
        tensors["initial_state"] = states(5)
        gradients.append(states(6))
    return Inputs(tensors, gradients, shape.l2norm, _borders(shape.lengths, device) if packed else None)


# ------------------------------------------------------------------------------------------------------- the running


def run_case(case: Case, device: torch.device, function: Callable, seed: int = 0, again: int = 0) -> dict[str, float]:
    """Errors by quantity of one route in one case.

    `function` has the signature of `chunk_delta_rule` (and takes g by name, where cases have a gate), of
    `delta_rule_step` for the layout "step", of `short_conv` for "convolution". A quantity is "output", "final state",
    "dq", "dk", "dv", "dbeta", "dg", "dh0" (those that the case has), "output without gradients", and "dbeta of small
    beta" for the inputs "beta", which a norm over all tokens would hide.

    With `again` there is "between calls", too: the largest difference of any quantity from the first call in as many
    more, zero where all bits are equal. A kernel that does not wait for its memory may be right nine times in ten.
    """
    if case.layout == "step":
        return _run_step(case, device, function, seed)
    run = _run_convolution if case.layout == "convolution" else _run_rule
    got = run(case, device, function, seed)
    errors = _compare(got, _reference(case, layout_on(case, device), device, seed))
    if again:
        more = (run(case, device, function, seed) for _ in range(again))
        differ = (error(x[name], got[name]) for x in more for name in got if not torch.equal(x[name], got[name]))
        errors["between calls"] = max(differ, default=0.0)
    return errors


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """||x - reference|| / ||reference||; where that is zero, the root mean square of x. Infinite where x is not
    finite.
    """
    if x.shape != reference.shape:
        return math.inf
    x, reference = x.double(), reference.double()
    norm = reference.norm().item() or math.sqrt(max(1, x.numel()))
    value = (x - reference).norm().item() / norm
    return value if math.isfinite(value) else math.inf


def _compare(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: error(x, wanted[name]) for name, x in got.items()}


@functools.lru_cache(maxsize=2)  # the routes of a case come one after another
def _reference(case: Case, shape: Layout, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    if case.layout == "convolution":
        return _run_convolution(case, device, _conv_fp64, seed, torch.float64)
    return _run_rule(case, device, torch_chunk_delta_rule, seed, torch.float64)


def _run_rule(case: Case, device, function, seed: int, dtype=None) -> dict[str, torch.Tensor]:
    x = make_inputs(case, device, seed)
    leaves = {name: t.to(dtype or t.dtype).detach().requires_grad_() for name, t in x.tensors.items()}
    options = {"output_final_state": "initial_state" in leaves, "use_qk_l2norm_in_kernel": x.l2norm}
    if x.cu_seqlens is not None:
        options["cu_seqlens"] = x.cu_seqlens
    outputs = [t for t in function(**leaves, **options) if t is not None]
    without = outputs[0]
    if dtype is None:  # the reference's is the same
        with torch.no_grad():
            without = function(**leaves, **options)[0]
    gradients = [g.to(dtype or g.dtype) for g in x.gradients]
    grads = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    names = ("dh0" if name == "initial_state" else f"d{name}" for name in leaves)
    got = {"output without gradients": without, **dict(zip(("output", "final state"), outputs))}
    got |= dict(zip(names, grads))
    if case.inputs == "beta":
        got["dbeta of small beta"] = got["dbeta"][x.tensors["beta"] < SMALL_BETA]
    return {name: t.detach() for name, t in got.items()}


def _run_step(case: Case, device, function, seed: int) -> dict[str, float]:
    x = make_inputs(case, device, seed)
    o, final = torch_recurrent_delta_rule(
        **{name: t.double() for name, t in x.tensors.items()}, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    state = x.tensors["initial_state"].clone()  # which the step changes
    tensors = {name: t for name, t in x.tensors.items() if name != "initial_state"}
    with torch.no_grad():
        got = function(**tensors, state=state, use_qk_l2norm_in_kernel=True)
    return _compare({"output": got, "final state": state}, {"output": o, "final state": final})


TAPS = 4


def _run_convolution(case: Case, device, function, seed: int, dtype=None) -> dict[str, torch.Tensor]:
    shape, dtype_in = layout_on(case, device), getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(seed)
    T, N = sum(shape.lengths), len(shape.lengths)
    sizes = shape.H * case.K, shape.H * case.K, shape.HV * case.V

    def randn(*size):
        return torch.randn(*size, generator=generator).to(device, dtype_in).to(dtype or dtype_in).requires_grad_()

    xs = [randn(1, T, D) for D in sizes]
    weights = [randn(D, TAPS) for D in sizes]
    state = randn(N, sum(sizes), TAPS - 1)
    gradients = [randn(1, T, D).detach() for D in sizes]
    borders = _borders(shape.lengths, device)
    ys, final = function(xs, weights, "silu", state, True, borders)
    with torch.no_grad():
        without, _ = function(xs, weights, "silu", state, False, borders)
    *grads, dh = torch.autograd.grad(ys, [*xs, *weights, state], gradients)
    join = functools.partial(torch.cat, dim=-1)
    return {
        "output without gradients": join(without), "output": join(ys).detach(), "final state": final.detach(),
        "dx": join(grads[:3]), "dw": torch.cat(grads[3:]), "dh0": dh,
    }  # fmt: skip


def _conv_fp64(xs, weights, activation, state, output_final_state, borders):
    """torch's own convolution, a sequence at a time."""
    ys, finals, borders, first = [], [], borders.tolist(), 0
    for x, w in zip(xs, weights):
        D, parts, tails = x.shape[-1], [], []
        for n, (start, stop) in enumerate(zip(borders, borders[1:])):
            padded = torch.cat((state[n : n + 1, first : first + D], x[:, start:stop].mT), dim=-1)
            if stop > start:
                parts.append(F.silu(F.conv1d(padded, w.unsqueeze(1), groups=D)).mT)
            tails.append(padded[..., padded.shape[-1] - (TAPS - 1) :])
        ys.append(torch.cat(parts, dim=1))
        finals.append(torch.cat(tails))
        first += D
    return ys, torch.cat(finals, dim=1) if output_final_state else None


def check_reference(device: torch.device, seed: int = 0) -> dict[str, float]:
    """The chunk rule in fp64 against the recurrence in fp64, which is the definition; below 1e-10."""
    case = Case(32, 16, "float32", "length 65", "beta")
    wanted = _run_rule(case, device, torch_recurrent_delta_rule, seed, torch.float64)
    return _compare(_run_rule(case, device, torch_chunk_delta_rule, seed, torch.float64), wanted)


# ---------------------------------------------------------------------------------------------------- the tolerances

# Largest error of any quantity, by kind of route. torch computes in fp32 and rounds once; the kernels multiply bf16 in
# bf16, fp16 in tf32 (0.0051 at most over all sizes on an H100, dbeta of 8192 tokens, commit 0888461) and fp32 in
# three tf32 products.
TOLERANCES = {
    "torch": {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-5},
    "kernels": {"bfloat16": 1.5e-2, "float16": 6e-3, "float32": 2e-5},
}
# A key that comes again and again makes the triangular system as bad as it gets.
REPEATED = 10
# Of few keys each one's rounding counts more: 0.0142 at K = 16 and 0.0100 at K = 32, where fla has 0.0171 and 0.0126;
# 0.0090 at K = 48, where fla has 0.0093 (V = 64, H200, f9b106b, 2026-11-27, h200_small_beta.json).
FEW_KEYS, OF_FEW_KEYS = 48, 1.5
OF_QUANTITY = {
    "dbeta of small beta": {"kernels": {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-3}},
    "between calls": {"kernels": dict.fromkeys(DTYPES, 0.0)},
}
REFERENCE = 1e-10


def tolerance(case: Case, kind: str) -> Callable[[str], float]:
    """What each quantity's error may be; `kind` is "kernels" or "torch"."""
    factor = REPEATED if case.inputs == "repeated" else 1

    def allowed(quantity: str) -> float:
        few = OF_FEW_KEYS if quantity == "dbeta of small beta" and case.K < FEW_KEYS else 1
        return OF_QUANTITY.get(quantity, {}).get(kind, TOLERANCES[kind])[case.dtype] * factor * few

    return allowed


def too_large(errors: dict[str, float], allowed: Callable[[str], float]) -> dict[str, float]:
    """Those of the errors that are not allowed."""
    return {name: value for name, value in errors.items() if not value <= allowed(name)}
