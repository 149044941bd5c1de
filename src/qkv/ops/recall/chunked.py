"""The recurrence of a memory in chunks of tokens: matrix products within a chunk, a recurrence between chunks.

For the tokens t of one chunk let P_t = Σ_{i ≤ t} g_i and R_t = Σ_{i > t} g_i: when t is read, e^{P_t} is left of what
the memory S held before the chunk, and at the chunk's end e^{R_t} is left of what t wrote. For a chunk of C tokens

    O = A_q X + (Q ⊙ e^P) S      S ← e^{P_C} ⊙ S + (K ⊙ e^R)ᵀ X      A_q[t, j] = Σ_c q_tc k_jc e^{g_{j+1,c} + … + g_tc}

for j ≤ t, else 0. X is V; with the delta rule it is what remains to be written once the memory has answered each key,
X = β (V − (K ⊙ e^P) S − stril(A_k) X), a triangular system that is solved for V and K ⊙ e^P before S is known.

The decays in A are sums of gates and never differences of running sums: those lose a weak gate behind a strong one,
and one of −∞ makes them NaN. `decayed` finds the sums by halves (in place of the secondary chunks of Yang 2023, GLA;
the chunks are those of Yang 2024, Gated DeltaNet).
"""

from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.errors import QkvError
from qkv.ops.precision import as_given
from qkv.ops.recall.naive import Recalled, arrange, naive

SEGMENT = 1024
"""Tokens whose chunks are worked on at once: longer, and what one step leaves is out of the cache at the next."""


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Recalled:
    """As `naive`, in time linear in T; a single token is one step of the recurrence.

    `chunk` is a power of two; left out it is the fastest, 64 tokens, or 32 where each row of the memory has a gate.
    """
    T = v.shape[2]
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise QkvError(f"recall: found a chunk of {chunk} tokens, expected a power of two")
    if T == 1:
        return naive(q, k, v, g, beta, state)
    with as_given(v):
        x = arrange(q, k, v, g, beta, state)
        C = min(chunk or (64 if x.g.shape[-1] == 1 else 32), 1 << (T - 1).bit_length())

        def cut(x: Tensor) -> tuple[Tensor, ...]:
            """… T D → … N C D, a segment at a time; zeros fill up the last chunk: they keep and write nothing."""
            x = F.pad(x, (0, 0, 0, -T % C)) if T % C else x
            return x.unflatten(-2, (-1, C)).split(max(SEGMENT // C, 1), -3)

        S, outs = x.state, []
        betas = repeat(None) if x.beta is None else cut(x.beta)
        for Q, K, V, G, b in zip(cut(x.q), cut(x.k), cut(x.v), cut(x.g), betas, strict=False):
            out, S = segment(Q, K, V, G, b, S)
            outs.append(out.flatten(-3, -2))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, -2)
    return Recalled(out[..., :T, :].flatten(1, 2).to(v.dtype), S.flatten(1, 2))


def segment(Q: Tensor, K: Tensor, V: Tensor, g: Tensor, beta: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks in a row, … N C K|V|1, from the memory S (… K V) on → what they read, and the memory at the end."""
    a = scores(Q[None] if beta is None else torch.stack((Q, K)), K, g)
    U, W = (V, None) if beta is None else solved(K, V, beta, a)
    X, starts, S = written(U, W, (K * a.R.exp()).mT, a.P[..., -1, :].exp()[..., None], S)
    return a.A[0] @ X + (Q * a.P.exp()) @ starts, S


@dataclass(frozen=True, eq=False)
class Decayed:
    """Scores within chunks of C tokens, and how far their tokens decay."""

    A: Tensor
    """… C C: Σ_c rows_tc k_jc e^{g_{j+1,c} + … + g_tc} for j ≤ t, else 0."""
    P: Tensor
    """… C K|1: the sum of the gates up to and with each token."""
    R: Tensor
    """… C K|1: the sum of the gates after each token."""


def scores(rows: Tensor, k: Tensor, g: Tensor) -> Decayed:
    """rows and k: … C K, g: … C K or … C 1; a gate that all K share stands apart from the products."""
    if g.shape[-1] == k.shape[-1]:
        return decayed(rows, k, g)
    one = torch.ones_like(g)
    d = decayed(one, one, g)
    return Decayed((rows @ k.mT) * d.A, d.P, d.R)


def decayed(rows: Tensor, k: Tensor, g: Tensor) -> Decayed:
    """Both halves are this problem again, solved at once; from an early to a late token it is e^{P_t} times e^{R_j}."""
    C = k.shape[-2]
    if C == 1:
        A = (rows * k * torch.ones_like(g)).sum(-1, keepdim=True)
        return Decayed(A, g, torch.zeros_like(g))
    halves = [x.unflatten(-2, (2, C // 2)) for x in (rows, k, g)]
    half = decayed(*halves)
    (A0, A1), (P0, P1), (R0, R1) = half.A.unbind(-3), half.P.unbind(-3), half.R.unbind(-3)
    before, after = halves[2].sum(-2, keepdim=True).unbind(-3)
    A10 = products(halves[0].unbind(-3)[1] * P1.exp(), halves[1].unbind(-3)[0] * R0.exp())
    A = torch.cat((F.pad(A0, (0, C // 2)), torch.cat((A10, A1), -1)), -2)
    return Decayed(A, torch.cat((P0, before + P1), -2), torch.cat((R0 + after, R1), -2))


def products(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ; many products of two rows each are one pass over both instead."""
    return a @ b.mT if a.shape[-2] > 2 else (a[..., :, None, :] * b[..., None, :, :]).sum(-1)


def solved(K: Tensor, V: Tensor, beta: Tensor, a: Decayed) -> tuple[Tensor, Tensor]:
    """U and W with (I + β stril(A_k)) [U, W] = β [V, K ⊙ e^P]: the delta rule writes X = U − W S."""
    right = beta * torch.cat((V, (K * a.P.exp()).expand(*V.shape[:-1], -1)), -1)
    both = torch.linalg.solve_triangular(beta * a.A[1].tril(-1), right, upper=False, unitriangular=True)
    return both[..., : V.shape[-1]], both[..., V.shape[-1] :]


def written(U: Tensor, W: Tensor | None, K: Tensor, keep: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From chunk to chunk S ← keep ⊙ S + K X, X = U − W S; K: … N K C → X, S before each chunk, S after the last."""
    starts = []
    if W is None:
        for write, kept in zip((K @ U).unbind(-3), keep.unbind(-3), strict=True):
            starts.append(S)
            S = torch.addcmul(write, kept, S)
        return U, torch.stack(starts, -3), S
    values = []
    for u, w, k, kept in zip(U.unbind(-3), W.unbind(-3), K.unbind(-3), keep.unbind(-3), strict=True):
        starts.append(S)
        values.append(u - w @ S)
        S = torch.addcmul(k @ values[-1], kept, S)
    return torch.stack(values, -3), torch.stack(starts, -3), S
