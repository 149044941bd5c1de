"""The memory from chunk to chunk, and what its tokens read.

    O = A X + Q S      S ← keep ⊙ S + Kᵀ X      X = V, or with the delta rule X = T (V − P S), T = (I + stril(L))⁻¹

S: … K V, keep: … N K|1 1, K, Q and P: … N C K with their decays, V: … N C V, A and L: … N C C. Each chunk's S is some
times as large as its tokens, and is used while it is at hand, forward as backward.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qkv.ops.recall.scores import Scores


def carried(a: Scores, V: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """→ O (… N C V), and S after the last chunk; second rows of the scores, if any, make it the delta rule."""
    rows = (x for pair in zip(a.A, a.before, strict=True) for x in pair)
    each = (x.reshape(-1, *x.shape[-3:]) for x in (a.keep.mT, a.after, V, *rows))
    out, end = _Carried.apply(S.flatten(0, -3), *each)
    return out.view_as(V), end.view_as(S)


def chunks(*each: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The N chunks of tensors b N …, one after the other."""
    return zip(*(repeat(None) if x is None else x.unbind(1) for x in each), strict=False)


def inverse(L: Tensor) -> Tensor:
    """(I + stril(L))⁻¹."""
    one = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L, one, upper=False, unitriangular=True)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        S: Tensor,
        keep: Tensor,
        K: Tensor,
        V: Tensor,
        A: Tensor,
        Q: Tensor,
        L: Tensor | None = None,
        P: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        T = None if L is None else inverse(L)
        Os, Xs, Ss = [], [], [S]
        for kept, k, v, a, q, t, p in chunks(keep, K, V, A, Q, T, P):
            S = Ss[-1]
            x = v if t is None else t @ torch.baddbmm(v, p, S, alpha=-1)
            Os.append(torch.baddbmm(q @ S, a, x))
            Ss.append(torch.baddbmm(kept * S, k.mT, x))
            Xs.append(x)
        ctx.save_for_backward(keep, K, V if T is None else torch.stack(Xs, 1), A, Q, T, P, *Ss[:-1])
        return torch.stack(Os, 1), Ss[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dO: Tensor, dS: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors  # to be asked for once, where they are recomputed
        each, starts, found = saved[:7], saved[7:], []
        for (kept, k, x, a, q, t, p, do), S in reversed(list(zip(chunks(*each, dO), starts, strict=True))):
            dx = torch.baddbmm(a.mT @ do, k, dS)
            now = [(dS * S).sum_to_size(kept.shape), x @ dS.mT, dx, do @ x.mT, do @ S.mT]
            dS = torch.baddbmm(kept * dS, q.mT, do)
            if t is not None:  # X = T E, so that of E it is Tᵀ dX, and of T⁻¹ −Tᵀ dX Xᵀ
                now[2] = de = t.mT @ dx
                now += [-(de @ x.mT).tril(-1), -(de @ S.mT)]
                dS = torch.baddbmm(dS, p.mT, de, alpha=-1)
            found.append(now)
        return dS, *(torch.stack(x, 1) for x in zip(*reversed(found), strict=True))
