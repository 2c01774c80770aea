"""What every kernel is measured against, and how: the delta rule token by token in fp64, with autograd, which shares
no code with one; random inputs for it; the error of a result.
"""

import torch
import torch.nn.functional as F


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(
    B, T, H, K, V=None, HV=None, N=None, dtype=torch.float32, *,
    keys="random", beta_max=2.0, state=True, seed=0, device=DEVICE, requires_grad=False,
):  # fmt: skip
    """Random q, k, v, beta and initial state (fp32 or fp64; None without `state`) of N sequences, B by default.

    `keys`: "random"; "unit", of norm 1; "silu", q and k after a SiLU; "repeated", one key for all tokens. beta lies
    between 0 and `beta_max`.
    """
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    V, HV = V or K, HV or H
    q, k = (torch.randn(B, T, H, K, generator=g, dtype=wide) for _ in "qk")
    if keys == "unit":
        k = F.normalize(k, dim=-1)
    elif keys == "silu":
        q, k = F.silu(q), F.silu(k)
    elif keys == "repeated":
        k = k[:, :1].expand_as(k).clone()
    else:
        assert keys == "random", keys
    v = torch.randn(B, T, HV, V, generator=g, dtype=wide)
    beta = torch.rand(B, T, HV, generator=g, dtype=wide) * beta_max
    inputs = [x.to(device, dtype) for x in (q, k, v, beta)]
    if state:
        inputs.append(torch.randn(N or B, HV, K, V, generator=g, dtype=wide).to(device))
    inputs = [x.requires_grad_(requires_grad) for x in inputs]
    return inputs if state else [*inputs, None]


def delta_rule_fp64(q, k, v, beta, scale=None, initial_state=None, l2norm=False, cu_seqlens=None, g=None):
    """Same arguments as the kernels, with g the gated rule; returns (o, final_state) in fp64."""
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    K, group = q.shape[-1], v.shape[2] // q.shape[2]
    scale = K**-0.5 if scale is None else scale
    if l2norm:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(group, 2) for x in (q, k))
    if cu_seqlens is None:
        pieces = [(slice(b, b + 1), slice(0, q.shape[1])) for b in range(q.shape[0])]
    else:
        c = [int(border) for border in cu_seqlens]
        pieces = [(slice(0, 1), slice(s, e)) for s, e in zip(c, c[1:], strict=False)]
    outputs, states = [], []
    for n, (b, t) in enumerate(pieces):
        S = q.new_zeros(v.shape[2], K, v.shape[3]) if initial_state is None else initial_state[n].double()
        out = []
        for i in range(t.start, t.stop):
            k_t, q_t = k[b, i][0], q[b, i][0]
            if g is not None:
                S = S * g[b, i][0].double().exp()[:, None, None]
            e = v[b, i][0] - torch.einsum("hkv,hk->hv", S, k_t)
            S = S + torch.einsum("hk,hv->hkv", k_t, beta[b, i][0][:, None] * e)
            out.append(torch.einsum("hkv,hk->hv", S, q_t * scale))
        outputs.append(torch.stack(out)[None] if out else v[b, t].clone())
        states.append(S)
    return torch.cat(outputs, 0 if cu_seqlens is None else 1), torch.stack(states)


def error(x, ref):
    """||x - ref|| / ||ref||; NaN and infinity count as infinite."""
    x, ref = x.detach().double().cpu(), ref.detach().double().cpu()
    assert x.shape == ref.shape, (x.shape, ref.shape)
    value = ((x - ref).norm() / ref.norm().clamp_min(1e-30)).item() if x.numel() else 0.0
    return value if value == value else float("inf")


def assert_close(names, got, wanted, tolerance):
    """Each of `got` is within `tolerance` of what is wanted, by `error`, or both are None. There may be more names."""
    assert len(got) == len(wanted) <= len(names), (len(got), len(wanted), len(names))
    for name, a, b in zip(names, got, wanted):
        assert (a is None) == (b is None), name
        if a is not None:
            off = error(a, b)
            assert off <= tolerance, f"{name}: {off:.2e} > {tolerance:.0e}"
