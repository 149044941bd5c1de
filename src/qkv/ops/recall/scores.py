"""Scores between the tokens of a chunk, decayed by the gates between them.

    A[t, j] = Σ_c r_tc k_jc e^{g_{j+1,c} + … + g_tc}   for j ≤ t, else 0

The exponents are sums of gates and never differences of running sums: those lose a weak gate behind a strong one, and
one of −∞ makes them NaN. The sums are found by halves (in place of the secondary chunks of Yang 2023, GLA): of two
neighbouring blocks of s tokens, from a token j of the first to a token t of the second it is e^{R_j} to the end of the
first and then e^{P_t} from there, for every two blocks one product of matrices; then both are one block of 2s.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Scores:
    """What the tokens of a chunk of C are to each other, to what came before, and to what comes after."""

    A: tuple[Tensor, ...]
    """… C C for each kind of rows."""
    before: tuple[Tensor, ...]
    """… C K for each kind of rows r: r ⊙ e^P, which finds what decay leaves of what the chunk began with."""
    after: Tensor
    """… C K: k ⊙ e^R, what decay leaves of k at the chunk's end."""
    keep: Tensor
    """… 1 K|1: e^{P_C}, what is left at the chunk's end of what it began with."""


def scores(g: Tensor, k: Tensor, *rows: Tensor) -> Scores:
    """g: … C K or … C 1, k and each of the rows: … C K; a gate that all K share stands apart from the products."""
    n = len(rows)
    if g.shape[-1] == k.shape[-1]:
        after, keep, *both = _Decayed.apply(g, *(x.expand_as(g) for x in (k, *rows)))
        return Scores(tuple(both[:n]), tuple(both[n:]), after, keep)
    one = torch.ones_like(g)
    R, keep, decay, P = _Decayed.apply(g, one, one)
    return Scores(tuple((row @ k.mT) * decay for row in rows), tuple(row * P for row in rows), k * R, keep)


def halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """The first and the second of every two blocks of s tokens, views; … C K → twice … C/2s s K."""
    first, second = x.unflatten(-2, (-1, 2, s)).unbind(-3)
    return first, second


def below(A: Tensor, s: int) -> Tensor:
    """Of every two blocks of s tokens the second's rows and the first's columns, a view; … C C → … C/2s s s."""
    pairs = A.unflatten(-1, (-1, 2, s)).unflatten(-4, (-1, 2, s)).diagonal(0, -6, -3)
    return pairs[..., 1, :, 0, :, :].movedim(-1, -3)


@dataclass(frozen=True, eq=False)
class Decays:
    """What decay leaves within blocks of 1, 2, 4, … tokens, and within the chunk."""

    halves: list[tuple[Tensor, Tensor]]
    """Of every two blocks e^P of the second and e^R of the first; … C/2s s K."""
    P: Tensor
    """e^P of the chunk; … C K."""
    R: Tensor


def decays(g: Tensor) -> Decays:
    """P_t is the sum of the gates of a block up to and with t, and R_t that of those after t, in ever larger blocks."""
    P = g / math.log(2)  # powers of 2 cost a third of those of e
    R, found, s = torch.zeros_like(P), [], 1
    while s < g.shape[-2]:
        (P0, P1), R0 = halves(P, s), halves(R, s)[0]
        found.append((P1.exp2(), R0.exp2()))
        R0 += P1[..., -1:, :]
        P1 += P0[..., -1:, :]
        s *= 2
    return Decays(found, P.exp2_(), R.exp2_())


class _Decayed(torch.autograd.Function):
    """Backward goes from the largest blocks to the smallest; it too only adds, so that nothing passes through −∞."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, k: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        e = decays(g)
        A = [torch.diag_embed((row * k).sum(-1)) for row in rows]
        for p, r in e.halves:
            s = p.shape[-2]
            early = halves(k, s)[0] * r
            for row, a in zip(rows, A, strict=True):
                below(a, s).copy_(transposed(halves(row, s)[1] * p, early))
        ctx.save_for_backward(g, k, *rows)
        return k * e.R, e.P[..., -1:, :].clone(), *A, *(row * e.P for row in rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dafter: Tensor, dkeep: Tensor, *dboth: Tensor) -> tuple[Tensor, ...]:
        g, k, *rows = ctx.saved_tensors
        e, dA, dbefore = decays(g), dboth[: len(rows)], dboth[len(rows) :]
        dk, drows = dafter * e.R, [d * e.P for d in dbefore]
        dR, dP = dk * k, total(d * row for d, row in zip(drows, rows, strict=True))  # of the sums of gates
        dP[..., -1:, :] += dkeep * e.P[..., -1:, :]
        for row, drow, d in zip(rows, drows, dA, strict=True):
            own = d.diagonal(0, -2, -1)[..., None]  # no gate decays a token's own product
            dk.addcmul_(own, row)
            drow.addcmul_(own, k)
        for p, r in reversed(e.halves):
            s = p.shape[-2]
            (dP0, dP1), dR0 = halves(dP, s), halves(dR, s)[0]
            dP0[..., -1, :] += total(dP1.unbind(-2))
            dP1[..., -1, :] += total(dR0.unbind(-2))
            early, dearly = halves(k, s)[0] * r, []
            for row, drow, d in zip(rows, drows, dA, strict=True):
                d, late = below(d, s).contiguous(), halves(row, s)[1] * p
                dlate = times(d, early)
                dearly.append(times(d.mT, late))
                dP1.addcmul_(dlate, late)
                halves(drow, s)[1].addcmul_(dlate, p)
            both = total(dearly)
            dR0.addcmul_(both, early)
            halves(dk, s)[0].addcmul_(both, r)
        return dP, dk, *drows


def transposed(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ; many products of two rows each are one pass over both instead."""
    return a @ b.mT if a.shape[-2] > 2 else (a[..., :, None, :] * b[..., None, :, :]).sum(-1)


def times(a: Tensor, b: Tensor) -> Tensor:
    """a b; many products of two columns each likewise."""
    if a.shape[-1] > 2:
        return a @ b
    return total(x[..., None] * y[..., None, :] for x, y in zip(a.unbind(-1), b.unbind(-2), strict=True))


def total(each: Iterable[Tensor]) -> Tensor:
    """Their sum: of few tensors it is faster than along a dimension."""
    first, *rest = each
    return sum(rest, first)
