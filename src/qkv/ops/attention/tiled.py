"""Exact attention in memory that grows with the length, not with its square.

Scores are made tile by tile and forgotten. Forward keeps, for each query, the largest score so far and the sum of the
exponentials below it, and rescales what it has read whenever a larger score appears (the online softmax). What remains
of a row is its log-sum-exp, from which backward makes the weights of any tile again. Dao et al. 2022; Milakov and
Gimelshein 2018.

Every product writes into memory that is there already: this is faster, and autocast leaves such products alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qkv.ops.attention.naive import check

TileOf = Callable[[slice, slice], Tensor | None]
"""(rows, columns) → a mask or bias for these queries and keys, broadcastable to B H t s; None is 'all' or 'nothing'."""

TILE_ELEMENTS = 2**19  # over all heads: backward's two buffers of 2 MB (fp32) stay in the cache


def tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | TileOf | None = None,
    bias: Tensor | TileOf | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    tile: int | None = None,
) -> Tensor:
    """Attention in O(T + S) memory, forward and backward: O = softmax(cap(Q Kᵀ · scale) + bias, masked) V.

    q: B H T K, k: B G S K, v: B G S V → B H T V in the type of q, computed in fp32 (fp64 for fp64).
    mask (boolean, true = may be seen) and bias are tensors that broadcast to B H T S, or functions of (rows, columns)
    that give the part for one tile, or None for 'all seen' and 'nothing added'; a bias tensor gets its gradient, a
    function's result none. A tile that causal or the mask rules out costs no product. cap(s) = c · tanh(s / c) with a
    softcap c. Dropout follows torch's global generator and keeps each weight with a probability that is a multiple of
    2^-16. `tile` is the side of a tile; by default it is chosen for the cache.
    Raises QkvError where shapes do not fit. Dao et al. 2022.
    """
    repeat = check(q, k, v, mask, dropout)
    bias_tensor = _four(bias) if isinstance(bias, Tensor) else None
    tiles = _Tiles(
        batch=q.shape[0],
        groups=k.shape[1],
        repeat=repeat,
        rows=q.shape[2],
        columns=k.shape[2],
        side=tile or _side(q.shape[0] * k.shape[1]),
        device=q.device,
        mask=_tile_of(mask),
        bias=_tile_of(bias),
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        dropped=min(round(dropout * 2**16), 2**16 - 1),
        seed=int(torch.randint(2**62, ())) if dropout else 0,
    )
    return _Attention.apply(q, k, v, bias_tensor, tiles)


def _side(matrices: int) -> int:
    """The side of a tile: of 64 to 512, measured best are 512 for 1 matrix, 256 for 8, 128 for 32, 64 for hundreds."""
    return min(512, max(64, 2 ** int(math.log2(TILE_ELEMENTS / max(1, matrices)) / 2)))


@dataclass(frozen=True, eq=False)
class _Tiles:
    """How one call is cut into tiles, and what is added to and dropped from each.

    Inside, queries are folded to (B G) (T R) K with the R = H // G heads of a group beside each other: heads that share
    k and v are rows of one product, and nothing is repeated.
    """

    batch: int
    groups: int
    repeat: int
    rows: int
    columns: int
    side: int
    device: torch.device
    mask: TileOf | None
    bias: TileOf | None
    causal: bool
    scale: float
    softcap: float | None
    dropped: int  # of 2^16 weights
    seed: int

    @property
    def keep(self) -> float:
        """The share of the weights that dropout leaves."""
        return 1 - self.dropped / 2**16

    def fold(self, x: Tensor) -> Tensor:
        """B H T D → (B G) (T R) D; a view where nothing is grouped and the strides allow."""
        x = x.unflatten(1, (self.groups, self.repeat)).transpose(2, 3)
        return x.reshape(self.batch * self.groups, self.rows * self.repeat, x.shape[-1])

    def unfold(self, x: Tensor, t: int) -> Tensor:
        """(B G) (t R) D → B H t D."""
        x = x.view(self.batch, self.groups, t, self.repeat, x.shape[-1]).transpose(2, 3)
        return x.reshape(self.batch, self.groups * self.repeat, t, x.shape[-1])

    def across(self) -> Iterator[tuple[slice, slice]]:
        """The queries of each row of tiles, as tokens and as folded rows."""
        step = max(1, self.side // self.repeat)
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            yield slice(start, stop), slice(start * self.repeat, stop * self.repeat)

    def along(self, rows: slice) -> Iterator[tuple[slice, Tensor | None]]:
        """The keys of each tile of which these queries may see any, and what is added to its scores."""
        end = min(self.columns, rows.stop + self.columns - self.rows) if self.causal else self.columns
        for start in range(0, end, self.side):
            columns = slice(start, min(start + self.side, end))
            seen = self.seen(rows, columns)
            if seen is not None and not seen.is_meta and not seen.any():  # of a meta tensor nothing is known
                continue
            added = None if self.bias is None else self.bias(rows, columns)
            if seen is not None:
                hidden = torch.where(seen, 0.0, -math.inf)  # to add this is far cheaper than to fill by a mask
                added = hidden if added is None else added + hidden
            yield columns, added

    def seen(self, rows: slice, columns: slice) -> Tensor | None:
        """The mask of one tile, or None where all is seen."""
        seen = None if self.mask is None else self.mask(rows, columns)
        t, s = rows.stop - rows.start, columns.stop - columns.start
        diagonal = rows.start + self.columns - self.rows - columns.start  # the last key that the first query sees
        if not self.causal or diagonal >= s - 1:
            return seen
        lower = torch.ones(t, s, dtype=torch.bool, device=self.device).tril(diagonal)
        return lower if seen is None else seen & lower

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Room for the largest tile of all heads, allocated once."""
        r = min(self.rows * self.repeat, max(self.side, self.repeat))
        s = min(self.columns, self.side)
        return torch.empty(self.batch * self.groups * r * s, dtype=dtype, device=self.device)

    def scores(self, q: Tensor, k: Tensor, buffer: Tensor) -> Tensor:
        """cap(q kᵀ) of one tile, q already scaled."""
        s = torch.bmm(q, k.mT, out=_room(buffer, q, k))
        return s if self.softcap is None else s.div_(self.softcap).tanh_().mul_(self.softcap)

    def add(self, s: Tensor, added: Tensor | None) -> Tensor:
        """The folded scores and, in place, what broadcasts to B H t s."""
        if added is None:
            return s
        added = _four(added)
        heads = (1, 1) if added.shape[1] == 1 else (self.groups, self.repeat)
        added = added.unflatten(1, heads).transpose(2, 3)
        s.view(self.batch, self.groups, s.shape[1] // self.repeat, self.repeat, s.shape[2]).add_(added)
        return s

    def kept(self, p: Tensor, rows: slice, columns: slice) -> Tensor | None:
        """Where dropout leaves a weight; each tile has its own seed, so that backward draws what forward drew."""
        if not self.dropped:
            return None
        generator = torch.Generator(p.device).manual_seed(self.seed + rows.start * self.columns + columns.start)
        words = torch.empty(-(-p.numel() // 4), dtype=torch.int64, device=p.device)
        words.random_(-(2**63), None, generator=generator)  # one draw decides on four weights with 16 bits each
        return (words.view(torch.int16)[: p.numel()] >= self.dropped - 2**15).view(p.shape)


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exp of each row; backward makes the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tiles: _Tiles) -> Tensor:
        out, lse = _forward(q, k, v, tiles)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.tiles = tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if ctx.needs_input_grad[3] else None
        dq, dk, dv = _backward(q, k, v, out, lse, d_out, d_bias, ctx.tiles)
        return dq, dk, dv, d_bias, None


def _forward(q: Tensor, k: Tensor, v: Tensor, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each folded row; it is +inf for a row that saw nothing."""
    wide = torch.promote_types(q.dtype, torch.float32)
    Q, K, V = tiles.fold(q), k.to(wide).flatten(0, 1), v.to(wide).flatten(0, 1)
    out = Q.new_empty(*Q.shape[:2], V.shape[-1])
    lse = Q.new_empty(*Q.shape[:2], 1, dtype=wide)
    buffer = tiles.buffer(wide)
    for rows, folded in tiles.across():
        qi = Q[:, folded].to(wide) * tiles.scale
        m = torch.full_like(qi[..., :1], torch.finfo(wide).min)  # finite, so that −inf − m is −inf and never NaN
        total = torch.zeros_like(m)
        o = qi.new_zeros(*qi.shape[:2], V.shape[-1])
        for columns, added in tiles.along(rows):
            s = tiles.add(tiles.scores(qi, K[:, columns], buffer), added)
            m, older = torch.maximum(m, s.amax(-1, keepdim=True)), m
            shrink = older.sub_(m).exp_()
            p = s.sub_(m).exp_()
            total.mul_(shrink).add_(p.sum(-1, keepdim=True))
            kept = tiles.kept(p, rows, columns)
            o.mul_(shrink).baddbmm_(p if kept is None else p.mul_(kept), V[:, columns])
        blind = total == 0
        out[:, folded] = o.div_(total.masked_fill(blind, 1.0)).div_(tiles.keep)
        lse[:, folded] = m.add_(total.log_()).masked_fill_(blind, math.inf)
    return tiles.unfold(out, tiles.rows), lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_bias: Tensor | None, tiles: _Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, which autograd rounds to their types; that of the bias is added to d_bias."""
    wide = lse.dtype
    Q, K, V = tiles.fold(q), k.to(wide).flatten(0, 1), v.to(wide).flatten(0, 1)
    out, d_out = tiles.fold(out), tiles.fold(d_out)
    dQ, dK, dV = torch.empty_like(Q, dtype=wide), torch.zeros_like(K), torch.zeros_like(V)
    buffers = tiles.buffer(wide), tiles.buffer(wide)
    for rows, folded in tiles.across():
        qi, g = Q[:, folded].to(wide) * tiles.scale, d_out[:, folded].to(wide)
        delta = (g * out[:, folded]).sum(-1, keepdim=True)  # Σ_j p_j dp_j, found without the weights
        g = g / tiles.keep
        dq = torch.zeros_like(qi)
        for columns, added in tiles.along(rows):
            kj, vj = K[:, columns], V[:, columns]
            s = tiles.scores(qi, kj, buffers[0])
            slope = None if tiles.softcap is None else 1 - (s / tiles.softcap).square_()
            p = tiles.add(s, added).sub_(lse[:, folded]).exp_()
            room = _room(buffers[1], qi, kj)
            kept = tiles.kept(p, rows, columns)
            dV[:, columns].baddbmm_((p if kept is None else torch.mul(p, kept, out=room)).mT, g)
            dp = torch.bmm(g, vj.mT, out=room)
            ds = (dp if kept is None else dp.mul_(kept)).sub_(delta).mul_(p)
            if d_bias is not None:
                part = _cut(d_bias, rows, columns)
                part += tiles.unfold(ds, rows.stop - rows.start).sum_to_size(part.shape)
            if slope is not None:
                ds.mul_(slope)
            dq.baddbmm_(ds, kj)
            dK[:, columns].baddbmm_(ds.mT, qi)
        dQ[:, folded] = dq.mul_(tiles.scale)
    return tiles.unfold(dQ, tiles.rows), dK.view(k.shape), dV.view(v.shape)


def _four(x: Tensor) -> Tensor:
    """With leading axes of one, up to four."""
    return x.reshape((1,) * (4 - x.dim()) + x.shape)


def _cut(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """The tile of what broadcasts to B H T S, as a view."""
    every = slice(None)
    return x[:, :, every if x.shape[2] == 1 else rows, every if x.shape[3] == 1 else columns]


def _tile_of(x: Tensor | TileOf | None) -> TileOf | None:
    """A tensor as a function of its tiles."""
    if not isinstance(x, Tensor):
        return x
    whole = _four(x.detach())
    return lambda rows, columns: _cut(whole, rows, columns)


def _room(buffer: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The front of the buffer as the tile of q and k; one allocation serves all tiles."""
    n, r, s = q.shape[0], q.shape[1], k.shape[1]
    return buffer[: n * r * s].view(n, r, s)
