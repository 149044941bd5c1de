"""The selective scan, written to be read; the chunked form is checked against it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.errors import QkvError


@dataclass(frozen=True, eq=False)
class Scanned:
    """What came out, `out` (B T D), and what is carried on, `state` (B D N)."""

    out: Tensor
    state: Tensor


def naive(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor | None = None,
    first: Tensor | None = None,
) -> Scanned:
    """One token after the other; x, dt: B T D, A: D N, B, C: B T N, h: B D N, first: 1|B T.

    The output has the type of x, the state fp32 (fp64 for fp64). Raises QkvError where shapes do not fit.
    """
    h = begin(x, dt, A, B, C, h)
    begins = [None] * x.shape[1] if first is None else first[..., None, None].unbind(1)
    ys = []
    # unbind: the gradient of an index has the size of the whole tensor, which would make the loop quadratic
    each = (z.to(h.dtype).unbind(1) for z in (x, dt, B, C))
    for x_t, dt_t, B_t, C_t, begins_t in zip(*each, begins, strict=True):
        h = h if begins_t is None else h.masked_fill(begins_t, 0)
        h = (dt_t[..., None] * A).exp() * h + (dt_t * x_t)[..., None] * B_t[:, None]
        ys.append((h * C_t[:, None]).sum(-1))
    return Scanned(torch.stack(ys, 1).to(x.dtype), h)


def begin(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None) -> Tensor:
    """Check the shapes → the first state, in the type of the computation."""
    (rows, T, D), N = x.shape, A.shape[1]
    if dt.shape != x.shape or len(A) != D or B.shape != (rows, T, N) or C.shape != B.shape:
        found = ", ".join(str(tuple(z.shape)) for z in (x, dt, A, B, C))
        raise QkvError(f"scan: found x, dt, A, B, C of {found}, expected B T D twice, D N, and B T N twice")
    wide = torch.promote_types(x.dtype, torch.float32)
    if h is None:
        return x.new_zeros(rows, D, N, dtype=wide)
    if h.shape != (rows, D, N):
        raise QkvError(f"scan: found a state {tuple(h.shape)}, expected {(rows, D, N)}")
    return h.to(wide)
