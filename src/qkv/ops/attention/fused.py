"""Attention through torch's scaled_dot_product_attention."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkv.ops.attention.naive import check, conjoined


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in one fast call: O = softmax(Q Kᵀ · scale + bias, masked) V.

    q: B H T K, k: B G S K, v: B G S V → B H T V; mask (boolean, true = may be seen) and bias broadcast to B H T S.
    A query with nothing to see gives zeros (torch sees to that). torch's flash path takes no dropout, no V ≠ K and no
    gradient of the bias: with those it stores T × S weights, and beyond some hundred tokens `tiled` is the better
    choice. Raises QkvError where shapes do not fit. Dao et al. 2022.
    """
    check(q, k, v, mask, dropout)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # On a CPU the bfloat16 backward of short sequences takes more than twice as long as this, casts included.
        options: dict[str, Any] = {"mask": mask, "bias": bias, "causal": causal, "scale": scale, "dropout": dropout}
        with torch.autocast("cpu", enabled=False):
            return fused(q.float(), k.float(), v.float(), **options).to(q.dtype)
    # torch's own causal flag is aligned to the first key and excludes a mask; ours is aligned to the last key.
    aligned = causal and mask is None and bias is None and q.shape[2] == k.shape[2]
    mask = conjoined(mask, causal and not aligned, q, k)
    if bias is not None:
        added = bias if bias.dtype == torch.float32 and q.dtype != torch.float64 else bias.to(q.dtype)
        mask = added if mask is None else added.masked_fill(~mask, -math.inf)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)  # the flash path knows 2 and 4 dimensions only
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, aligned, scale=scale, enable_gqa=grouped)
