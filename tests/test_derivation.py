"""The formulas of `kernels/README.md`, step by step in fp64, against the recurrence and autograd through it.

A reader who ports the kernels, or changes one, works from these formulas: a wrong one would send them astray. The
names are those of the document.
"""

import torch


C, K, V, CHUNKS, SCALE, EPS = 8, 5, 6, 3, 0.7, 1e-6


def inputs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(CHUNKS * C, n, dtype=torch.float64) for n in (K, K, V))
    beta = 2 * torch.rand(CHUNKS * C, dtype=torch.float64)
    h0, dht = torch.randn(2, K, V, dtype=torch.float64)
    return q, k, v, beta, h0, torch.randn(CHUNKS * C, V, dtype=torch.float64), dht


def normalised(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def recurrence(q, k, v, beta, S):
    outputs = []
    for q_t, k_t, v_t, beta_t in zip(normalised(q), normalised(k), v, beta):
        S = S + k_t.outer(beta_t * (v_t - S.T @ k_t))
        outputs.append(SCALE * (S.T @ q_t))
    return torch.stack(outputs), S


def chunks(*tensors):
    return list(zip(*(x.split(C) for x in tensors)))


def reciprocal_norm(x):
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def inverse(M):
    """(I + M)^-1 of a strictly lower M."""
    identity = torch.eye(len(M), dtype=M.dtype)
    return torch.linalg.solve_triangular(identity + M, identity, upper=False, unitriangular=True)


def matrices(q, k, beta):
    """rk, rq, A and P of one chunk ("One chunk", "Norms as row scalars")."""
    rk, rq, beta = reciprocal_norm(k), reciprocal_norm(q), beta[:, None]
    M = (beta * rk * (k @ k.T) * rk.T).tril(-1)
    A = rk * (inverse(M) * beta.T)
    return rk, rq, A, SCALE * rq * (q @ k.T).tril()


def scan(q, k, v, beta, S):
    """O, the state, and per chunk what backward reads ("The forward scan")."""
    outputs, kept = [], []
    for q_c, k_c, v_c, beta_c in chunks(q, k, v, beta):
        rk, rq, A, P = matrices(q_c, k_c, beta_c)
        U = A @ v_c - A @ (rk * (k_c @ S))
        outputs.append(SCALE * rq * (q_c @ S) + P @ U)
        kept.append((rk, rq, A, P, U, S))
        S = S + k_c.T @ U
    return torch.cat(outputs), S, kept


def norm_backward(x, r, y):
    """dx from y = r dx^ ("Through the norms")."""
    return y - x * (r * r * (x * y).sum(-1, keepdim=True))


def test_a_chunk_is_a_triangular_system():
    """One chunk by the formulas would not be what the recurrence computes."""
    q, k, v, beta, h0, *_ = inputs()
    o, state, _ = scan(q, k, v, beta, h0)
    torch.testing.assert_close((o, state), recurrence(q, k, v, beta, h0))


def test_backward_is_the_adjoint_of_the_scan():
    """A gradient of the document would be another than the one that autograd finds through the recurrence."""
    *given, do, dht = inputs()
    leaves = [x.clone().requires_grad_() for x in given]
    wanted = torch.autograd.grad(recurrence(*leaves), leaves, (do, dht))
    q, k, v, beta, h0 = given
    kept, dS, found = scan(q, k, v, beta, h0)[2], dht, []
    for (q_c, k_c, v_c, do_c), (rk, rq, A, P, U, S) in zip(reversed(chunks(q, k, v, do)), reversed(kept)):
        dU = P.T @ do_c + k_c @ dS
        dV = A.T @ dU
        # chunk-parallel, from U, dV, the state that enters and the gradient of the one that leaves
        R = (do_c @ U.T).tril()
        E = -(rk * (dV @ U.T)).tril(-1)
        dq = norm_backward(q_c, rq, rq * SCALE * (do_c @ S.T + R @ k_c))
        dk = -rk * (dV @ S.T) + U @ dS.T + (SCALE * rq * R).T @ q_c + (E + E.T) @ k_c
        dbeta = rk[:, 0] * (dV @ U.T).diag() / A.diag() ** 2
        # the same without a division: the error that was found missing, and its adjoint y
        G = (rk * (k_c @ k_c.T) * rk.T).tril(-1)
        error = v_c - rk * (k_c @ S) - G @ (U / rk)
        y = rk * dU - G.T @ dV
        torch.testing.assert_close(dbeta, (y * error).sum(-1))
        found.append((dq, norm_backward(k_c, rk, dk), dV, dbeta))
        dS = dS + q_c.T @ (SCALE * rq * do_c) - k_c.T @ (rk * dV)
    gradients = [torch.cat(parts[::-1]) for parts in zip(*found)]
    torch.testing.assert_close([*gradients, dS], list(wanted))


def test_a_segment_acts_as_an_affine_map():
    """Segments chained through Phi and N would not give the states of the whole sequence, or their gradients."""
    q, k, v, beta, h0, do, dht = inputs()
    state = h0.clone().requires_grad_()
    o, last = recurrence(q, k, v, beta, state)
    N = scan(q, k, v, beta, torch.zeros_like(h0))[1]
    Phi = scan(q, k, k.new_zeros(len(k), K), beta, torch.eye(K, dtype=k.dtype))[1]
    torch.testing.assert_close(last, Phi @ h0 + N)
    product = torch.eye(K, dtype=k.dtype)
    for _, k_c, beta_c in chunks(q, k, beta):
        rk, _, A, _ = matrices(k_c, k_c, beta_c)
        product = (torch.eye(K, dtype=k.dtype) - k_c.T @ A @ (rk * k_c)) @ product
    torch.testing.assert_close(Phi, product)
    assert torch.linalg.matrix_norm(Phi, 2) <= 1  # beta up to 2, normalised keys
    whole, from_outputs = (
        torch.autograd.grad((o, last), state, (do, g), retain_graph=True)[0] for g in (dht, 0 * dht)
    )
    torch.testing.assert_close(whole, Phi.T @ dht + from_outputs)


def test_beta_may_be_split_into_roots():
    """Near beta = 0 the inverse is computed by this identity: a wrong one would change A everywhere."""
    _, k, _, beta, *_ = inputs()
    k, beta = k[:C], beta[:C] * torch.tensor([1, -1, 1e-30, 0, 1, 1, -1, 1], dtype=torch.float64)
    rk, _, A, _ = matrices(k, k, beta)
    p = beta.sign() * beta.abs().sqrt()
    N = (p.abs()[:, None] * rk * (k @ k.T) * rk.T * p).tril(-1)
    torch.testing.assert_close(A, rk * p[:, None] * inverse(N) * p.abs(), atol=1e-20, rtol=1e-9)


def test_the_inverse_by_doubling():
    """The inverse on blocks of 2, 4, 8 rows would not be the inverse."""
    M = torch.randn(C, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1)
    i = torch.arange(C)
    T = torch.eye(C, dtype=M.dtype) - M * (i[:, None] // 2 == i // 2)
    for b in (4, 8):
        lower_left = (i[:, None] // b == i // b) & (i[:, None] % b >= b // 2) & (i % b < b // 2)
        T = T - T @ (M * lower_left) @ T
    torch.testing.assert_close(T, inverse(M))


def test_entries_of_the_inverse_are_bounded():
    """fp16 could overflow in the inverse: the document says that no entry exceeds 2 for normalised keys."""
    _, k, _, beta, *_ = inputs()
    k, beta = normalised(k[:C]), beta[:C]
    T = inverse((beta[:, None] * (k @ k.T)).tril(-1))
    for s in range(C):
        x = k[s]
        for t in range(s + 1, C):
            torch.testing.assert_close(T[t, s], -beta[t] * k[t] @ x)
            x = x - k[t] * (beta[t] * (k[t] @ x))
    k = k[:1].expand(64, -1)
    assert inverse((2 * (k @ k.T)).tril(-1)).abs().max() <= 2


def gated_recurrence(q, k, v, beta, g, S):
    outputs = []
    for q_t, k_t, v_t, beta_t, g_t in zip(normalised(q), normalised(k), v, beta, g):
        S = S * g_t.exp()
        S = S + k_t.outer(beta_t * (v_t - S.T @ k_t))
        outputs.append(SCALE * (S.T @ q_t))
    return torch.stack(outputs), S


def test_the_gate():
    """A chunk with a gate, and its gradients, g's among them, would not be those of the recurrence ("The gate")."""
    *given, do, dht = inputs()
    g = -torch.rand(CHUNKS * C, dtype=torch.float64) * torch.tensor([0.0, 1.0, 50.0, 0.1] * (CHUNKS * C // 4))
    given.insert(4, g)
    leaves = [x.clone().requires_grad_() for x in given]
    wanted_outputs = gated_recurrence(*leaves)
    wanted = torch.autograd.grad(wanted_outputs, leaves, (do, dht))

    *given, S = given
    outputs, kept, found = [], [], []
    for q_c, k_c, v_c, beta_c, g_c in chunks(*given):
        rk, rq, A, P = matrices(q_c, k_c, beta_c)
        b = g_c.cumsum(0)[:, None]
        D = (b - b.T).tril().exp().tril()
        before, after, whole = b.exp(), (b[-1] - b).exp(), b[-1].exp()
        A, P = D * A, D * P
        U = A @ v_c - A @ (rk * before * (k_c @ S))
        outputs.append(SCALE * rq * before * (q_c @ S) + P @ U)
        kept.append((rk, rq, A, P, D, U, S, before, after, whole))
        S = whole * S + k_c.T @ (after * U)
    torch.testing.assert_close((torch.cat(outputs), S), wanted_outputs)

    dS = dht
    for (q_c, k_c, do_c), (rk, rq, A, P, D, U, S, before, after, whole) in zip(
        reversed(chunks(given[0], given[1], do)), reversed(kept)
    ):
        dU = P.T @ do_c + after * (k_c @ dS)
        dV = A.T @ dU
        R = D * (do_c @ U.T).tril()
        E = -D * (rk * (dV @ U.T)).tril(-1)
        q_y = rq * SCALE * (before * (do_c @ S.T) + R @ k_c)
        reads, writes = -rk * before * (dV @ S.T), after * (U @ dS.T)
        k_y = reads + writes + (SCALE * rq * R).T @ q_c + (E + E.T) @ k_c
        dbeta = rk[:, 0] * (dV @ U.T).diag() / A.diag() ** 2
        comes_in = (q_c * q_y + k_c * (reads + E @ k_c)).sum(1)
        goes_out = (k_c * (writes + (SCALE * rq * R).T @ q_c + E.T @ k_c)).sum(1)
        leaves_with = whole * (S * dS).sum() + (k_c * writes).sum()  # <S', dS'>
        dg = (comes_in - goes_out).flip(0).cumsum(0).flip(0) + leaves_with
        found.append((norm_backward(q_c, rq, q_y), norm_backward(k_c, rk, k_y), dV, dbeta, dg))
        dS = whole * dS + q_c.T @ (SCALE * rq * before * do_c) - k_c.T @ (rk * before * dV)
    gradients = [torch.cat(parts[::-1]) for parts in zip(*found)]
    torch.testing.assert_close([*gradients, dS], list(wanted))
