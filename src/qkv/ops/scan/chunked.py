"""The selective scan a segment at a time; the backward pass recomputes the states within each segment.

The loop over tokens runs in place on states that lie time first, so that each of its steps is one pass over memory that
is still in the cache. Only the states between segments are kept: T / 64 of them, where autograd would keep 4 T.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qkv.ops.precision import as_given
from qkv.ops.scan.naive import Scanned, begin, naive


def chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None = None, *, segment: int = 64
) -> Scanned:
    """As `naive`, with memory for the states of one segment of tokens; differentiable once."""
    if x.shape[1] == 1:
        return naive(x, dt, A, B, C, h)
    h = begin(x, dt, A, B, C, h)
    with as_given(x):
        y, h = _Scan.apply(*(z.to(h.dtype) for z in (x, dt, A, B, C)), h, segment)
    return Scanned(y.to(x.dtype), h)


def states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """x, dt: L B D and B: L B N of one segment → the decays e^{ΔA} and the states h, both L B D N."""
    a, hs = (dt[..., None] * A).exp_(), (dt * x)[..., None] * B[:, :, None]
    for a_t, h_t in zip(a, hs, strict=True):
        h = h_t.addcmul_(a_t, h)
    return a, hs


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, segment: int
    ) -> tuple[Tensor, Tensor]:
        ys, starts = [], [h]
        for xs, ds, Bs, Cs in zip(*(z.transpose(0, 1).split(segment) for z in (x, dt, B, C)), strict=True):
            _, hs = states(xs, ds, A, Bs, starts[-1])
            ys.append((hs @ Cs[..., None])[..., 0])
            starts.append(hs[-1].clone())
        ctx.save_for_backward(x, dt, A, B, C, *starts[:-1])
        ctx.segment = segment
        return torch.cat(ys).transpose(0, 1), starts[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, *starts = ctx.saved_tensors
        cuts = zip(*(z.transpose(0, 1).split(ctx.segment) for z in (x, dt, B, C, dy)), strict=True)
        dA, found = torch.zeros_like(A), []
        for (xs, ds, Bs, Cs, dys), start in reversed(list(zip(cuts, starts, strict=True))):
            a, hs = states(xs, ds, A, Bs, start)
            dC = (dys[..., None, :] @ hs)[..., 0, :]
            g = dys[..., None] * Cs[:, :, None]  # of each state: from its own output, and below from all later ones
            g[-1] += dh
            for t in range(len(g) - 1, 0, -1):
                g[t - 1].addcmul_(a[t], g[t])
            dh = a[0] * g[0]
            written = (g @ Bs[..., None])[..., 0]  # of Δ x
            dB = ((ds * xs)[..., None, :] @ g)[..., 0, :]
            log_a = a.mul_(g)  # of Δ A: the decay times the state that decayed times the gradient of what came out
            log_a[1:] *= hs[:-1]
            log_a[0] *= start
            dA += torch.einsum("lbdn,lbd->dn", log_a, ds)
            found.append((written * ds, (log_a * A).sum(-1) + written * xs, dB, dC))
        dx, ddt, dB, dC = (torch.cat(z[::-1]).transpose(0, 1) for z in zip(*found, strict=True))
        return dx, ddt, dA, dB, dC, dh, None
