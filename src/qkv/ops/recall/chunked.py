"""The recurrence of a memory in chunks of tokens: matrix products within a chunk, a recurrence between chunks.

For the tokens t of one chunk let P_t = Σ_{i ≤ t} g_i and R_t = Σ_{i > t} g_i: when t is read, e^{P_t} is left of what
the memory S held before the chunk, and at the chunk's end e^{R_t} is left of what t wrote. For a chunk of C tokens

    O = A_q X + (Q ⊙ e^P) S      S ← e^{P_C} ⊙ S + (K ⊙ e^R)ᵀ X      A_q[t, j] = Σ_c q_tc k_jc e^{g_{j+1,c} + … + g_tc}

for j ≤ t, else 0, and X is V. The delta rule writes with the keys β K, which then stand for K here and in A, what the
memory does not answer to K yet: X = V − (K ⊙ e^P) S − stril(A_k) X (the chunks of Yang 2024, Gated DeltaNet).
"""

from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.errors import QkvError
from qkv.ops.precision import as_given
from qkv.ops.recall.carried import carried
from qkv.ops.recall.naive import Recalled, arrange, naive
from qkv.ops.recall.scores import scores

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

    `chunk` is a power of two; left out it is 32, which is the fastest or within 5 % of that for gates of any kind.
    """
    T = v.shape[2]
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise QkvError(f"recall: found a chunk of {chunk} tokens, expected a power of two")
    if T == 1:
        return naive(q, k, v, g, beta, state)
    with as_given(v):
        x = arrange(q, k, v, g, beta, state)
        C = min(chunk or 32, 1 << (T - 1).bit_length())

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
    a = scores(g, K, Q) if beta is None else scores(g, beta * K, Q, K)
    return carried(a, V, S)
