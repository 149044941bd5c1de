"""The selective scan a segment at a time; the backward pass recomputes the states within each segment.

The loop over tokens runs in place on states that lie time first, so that each of its steps is one pass over memory that
is still in the cache. Only the states between segments are kept: T / 64 of them, where autograd would keep 4 T.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qkv.ops.precision import as_given
from qkv.ops.scan.naive import Scanned, begin, naive


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor | None = None,
    first: Tensor | None = None,
    *,
    segment: int = 64,
) -> Scanned:
    """As `naive`, with memory for the states of one segment of tokens; differentiable once."""
    if x.shape[1] == 1:
        return naive(x, dt, A, B, C, h, first)
    h = begin(x, dt, A, B, C, h)
    with as_given(x):
        y, h = _Scan.apply(*(z.to(h.dtype) for z in (x, dt, A, B, C)), h, first, segment)
    return Scanned(y.to(x.dtype), h)


def states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor, first: Tensor | None, a: Tensor, hs: Tensor
) -> tuple[Tensor, Tensor]:
    """x, dt: L B D, B: L B N and first: L 1|B of one segment → the decays e^{ΔA} and the states h, both L B N D.

    A (N D) and h (B N D) have their channels last too, so that each product runs over a whole row of them. `a` and `hs`
    are where the results go: memory that is used again is still in the cache.
    """
    a = torch.mul(dt[:, :, None], A, out=a[: len(x)]).exp_()
    hs = torch.mul((dt * x)[:, :, None], B[..., None], out=hs[: len(x)])
    if first is not None:  # no step is so large that all is forgotten, but its decay may be 0 all the same
        a.masked_fill_(first[..., None, None], 0)
    for a_t, h_t in zip(a.unbind(), hs.unbind(), strict=True):
        h = h_t.addcmul_(a_t, h)
    return a, hs


def cuts(segment: int, first: Tensor | None, *each: Tensor) -> Iterator[tuple[Any, ...]]:
    """Segments of tensors B T …, time first, and of `first` at the end of each tuple."""
    pieces: list[Sequence[Tensor | None]] = [z.transpose(0, 1).split(segment) for z in each]
    pieces.append([None] * len(pieces[0]) if first is None else first.transpose(0, 1).split(segment))
    return zip(*pieces, strict=True)


def room(count: int, segment: int, x: Tensor, h: Tensor) -> list[Tensor]:
    """Memory for so many values of each state of a segment."""
    return [h.new_empty(min(segment, x.shape[1]), *h.shape) for _ in range(count)]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        h: Tensor,
        first: Tensor | None,
        segment: int,
    ) -> tuple[Tensor, Tensor]:
        y, A, starts = torch.empty_like(x), A.mT.contiguous(), [h.mT.contiguous()]
        both = room(2, segment, x, starts[0])
        for xs, ds, Bs, Cs, ys, firsts in cuts(segment, first, x, dt, B, C, y):
            _, hs = states(xs, ds, A, Bs, starts[-1], firsts, *both)
            ys.copy_((Cs[:, :, None] @ hs)[:, :, 0])
            starts.append(hs[-1].clone())
        ctx.save_for_backward(x, dt, A, B, C, first, *starts[:-1])
        ctx.segment = segment
        return y, starts[-1].mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, first, *starts = ctx.saved_tensors
        dx, ddt, dA, dB, dC = (torch.zeros_like(z) for z in (x, dt, A, B, C))
        *both, gs = room(3, ctx.segment, x, starts[0])
        pieces = zip(cuts(ctx.segment, first, x, dt, B, C, dy, dx, ddt, dB, dC), starts, strict=True)
        dh = dh.mT
        for (xs, ds, Bs, Cs, dys, dxs, dds, dBs, dCs, firsts), start in reversed(list(pieces)):
            a, hs = states(xs, ds, A, Bs, start, firsts, *both)
            dCs.copy_((hs @ dys[..., None])[..., 0])
            g = torch.mul(dys[:, :, None], Cs[..., None], out=gs[: len(xs)])
            g[-1] += dh  # of each state: from its own output, and below from all later ones
            for t in range(len(g) - 1, 0, -1):
                g[t - 1].addcmul_(a[t], g[t])
            dh = a[0] * g[0]
            written = (Bs[:, :, None] @ g)[:, :, 0]  # of Δ x
            dBs.copy_((g @ (ds * xs)[..., None])[..., 0])
            log_a = a.mul_(g)  # of Δ A: the decay times the state that decayed times the gradient of what came out
            log_a[1:] *= hs[:-1]
            log_a[0] *= start
            dA += torch.mul(log_a, ds[:, :, None], out=g).sum((0, 1))
            torch.mul(written, ds, out=dxs)
            torch.addcmul(torch.mul(log_a, A, out=g).sum(2), written, xs, out=dds)
        return dx, ddt, dA.mT, dB, dC, dh.mT, None, None
