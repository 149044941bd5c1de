"""The equation of attention, written to be read; the other forms are checked against it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qkv.errors import QkvError


@dataclass(frozen=True, eq=False)
class Attended:
    """What attention read, and how: `out` (B H T V) and `weights` (B H T S), those before dropout."""

    out: Tensor
    weights: Tensor


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    score: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Attended:
    """Attention with its weights: O = W V, W = softmax(cap(Q Kᵀ · scale) + bias, masked).

    q: B H T K, k: B G S K, v: B G S V → out: B H T V in the type of q, weights: B H T S in fp32 (fp64 for fp64).
    mask (boolean, true = may be seen) and bias broadcast to B H T S; scale defaults to K^-1/2; a softcap c bounds the
    scores by cap(s) = c · tanh(s / c). `score(q, k)` replaces the scaled dot product: it takes B H T K and B H S K,
    the groups already repeated, and gives B H T S; scale and softcap are then its own affair.
    Raises QkvError where shapes or options do not fit. Vaswani et al. 2017; additive scores: Bahdanau et al. 2015.
    """
    repeat = check(q, k, v, mask, dropout)
    wide = torch.promote_types(q.dtype, torch.float32)
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    if score is None:
        s = q.to(wide) @ k.to(wide).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    elif scale is not None or softcap is not None:
        raise QkvError("attention: found a score function beside scale or softcap, expected it to apply them itself")
    else:
        s = score(q, k).to(wide)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(wide)
    mask = conjoined(mask, causal, q, k)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    blind = (s == -math.inf).all(-1, keepdim=True)  # rows with nothing to see: their softmax would be 0 / 0
    weights = s.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    out = F.dropout(weights, dropout) @ v.to(wide)
    return Attended(out.to(q.dtype), weights)


def conjoined(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask and, where causal, also j ≤ i + (S − T); the last query sees every key, so T = 1 needs no mask."""
    T, S = q.shape[2], k.shape[2]
    if not causal or T == 1:
        return mask
    lower = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return lower if mask is None else mask & lower


def check(q: Tensor, k: Tensor, v: Tensor, mask: object, dropout: float) -> int:
    """What every form asks of its arguments; returns H // G, the query heads that share a head of k and v."""
    B, H, _, K = q.shape
    G, S = k.shape[1:3]
    if k.shape != (B, G, S, K) or v.shape[:3] != (B, G, S) or G == 0 or H % G:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise QkvError(f"attention: found {shapes}, expected B H T K, B G S K and B G S V with G a divisor of H")
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise QkvError(f"attention: found a mask of {mask.dtype}, expected torch.bool; what is added is called bias")
    if not 0 <= dropout < 1:
        raise QkvError(f"attention: found dropout {dropout}, expected at least 0 and less than 1")
    return H // G
