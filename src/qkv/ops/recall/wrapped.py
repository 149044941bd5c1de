"""What some mixers put around a memory: neither changes the recurrence, and any form of it serves them."""

import torch
from torch import Tensor

from qkv.ops.recall.chunked import chunked
from qkv.ops.recall.naive import Recalled, read


def running_max(f: Tensor, i: Tensor, m: Tensor) -> Tensor:
    """m_t = max(f_t + m_{t−1}, i_t); f, i: B H T, the first m: B H → B H T (mLSTM's stabiliser, Beck 2024).

    With the gates g_t = f_t + m_{t−1} − m_t and keys e^{i_t − m_t} k_t a memory holds e^{−m_t} times what it would
    hold with the gates f_t and keys e^{i_t} k_t, and no exponent is positive. What is read from it, divided by what is
    read of a column of ones, does not depend on m, which therefore gets no gradient. Found by doubling: the maximum
    over the last 1, 2, 4, … tokens, each with the sum of the gates after it, so that −∞ stays −∞.
    """
    f, i, m = f.detach(), i.detach(), m.detach()
    top = torch.cat((torch.maximum(i[..., :1], f[..., :1] + m[..., None]), i[..., 1:]), -1)
    d = 1
    while d < f.shape[-1]:
        top = torch.cat((top[..., :d], torch.maximum(top[..., d:], top[..., :-d] + f[..., d:])), -1)
        f = torch.cat((f[..., :d], f[..., d:] + f[..., :-d]), -1)
        d *= 2
    return top


def bonus(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    first: Tensor | None = None,
) -> Recalled:
    """o_t = S_{t−1}ᵀ q_t + (q_t · (u ⊙ k_t)) v_t: read before this token writes, which counts u times (RWKV).

    q, k: B H T K, v: B H T V, g: B H T K, u: H K, state: B H K V. `first` (B T) marks the first token of each document,
    where g is −∞ and the past says nothing. A memory is read last, so each token writes and the next one's query reads.
    """
    past = q if first is None else q.masked_fill(first[:, None, :, None], 0)
    after = torch.cat((past[:, :, 1:], torch.zeros_like(q[:, :, :1])), 2)
    found = chunked(after, k, v, g, state=state)
    before = torch.zeros_like(v[:, :, 0]) if state is None else read(state, past[:, :, 0].to(state.dtype)).to(v.dtype)
    now = (q * u[:, None] * k).sum(-1, keepdim=True) * v
    return Recalled(torch.cat((before[:, :, None], found.out[:, :, :-1]), 2) + now, found.state)
