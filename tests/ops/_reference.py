"""The delta rule token by token in fp64, with autograd: what every kernel is measured against. Shares no code with
one.
"""

import torch


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
