"""The parallel form: what each token makes of each value, as attention's weights."""

import torch
from torch import Tensor

from qkv.ops.precision import wide
from qkv.ops.recall.chunked import chunked


def weights(q: Tensor, k: Tensor, g: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
    """W (B H T T) with o = W v, for a memory that held nothing before; all of it is one chunk.

    Every token writes a unit vector of its own, so that what is read says whose values it consists of. Without gates
    and erasure W is tril(q kᵀ). For pictures: T² numbers a head.
    """
    B, H, T = q.shape[:3]
    for given, dim in ((g, 0 if g is not None and g.dim() == 1 else 1), (beta, 1)):
        H = H if given is None else given.shape[dim]
    own = torch.eye(T, dtype=wide(q), device=q.device)
    return chunked(q, k, own.expand(B, H, T, T), g, beta, chunk=1 << (T - 1).bit_length()).out
