"""The recurrence of a memory, written to be read; the chunked form is checked against it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.ops.precision import as_given


@dataclass(frozen=True, eq=False)
class Recalled:
    """What was read, `out` (B H T V), and the memory after the last token, `state` (B H K V)."""

    out: Tensor
    state: Tensor


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
) -> Recalled:
    """One token after the other; q, k: B G T K, v: B H T V, g: H | B H T | B H T K, beta: B H T, state: B H K V.

    The output has the type of v, the state fp32 (fp64 for fp64). Raises QkvError where shapes do not fit.
    """
    x = arrange(q, k, v, g, beta, state)
    S, out = x.state, []
    betas = [None] * v.shape[2] if x.beta is None else x.beta.unbind(3)
    with as_given(v):
        # unbind: the gradient of an index has the size of the whole tensor, which would make the loop quadratic
        for token in zip(x.q.unbind(3), x.k.unbind(3), x.v.unbind(3), x.g.unbind(3), betas, strict=True):
            now = step(*token, S)
            S = now.state
            out.append(now.out)
    return Recalled(torch.stack(out, 3).flatten(1, 2).to(v.dtype), S.flatten(1, 2))


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor) -> Recalled:
    """One token; q, k: … K, v: … V, g: … K or … 1, beta: … 1, state: … K V; what stands before broadcasts."""
    S = g.exp()[..., None] * state
    if beta is not None:
        v = beta * (v - read(S, k))
    S = S + k[..., None] * v[..., None, :]
    return Recalled(read(S, q), S)


def read(S: Tensor, q: Tensor) -> Tensor:
    """Sᵀ q; S: … K V, q: … K → … V."""
    return (q[..., None, :] @ S)[..., 0, :]


@dataclass(frozen=True, eq=False)
class Arranged:
    """The arguments in one type and with one set of dimensions: R = H // G heads read each of the G groups."""

    q: Tensor
    """B G 1 T K."""
    k: Tensor
    """B G 1 T K."""
    v: Tensor
    """B G R T V."""
    g: Tensor
    """B G R T K, or B G R T 1."""
    beta: Tensor | None
    """B G R T 1."""
    state: Tensor
    """B G R K V."""


def arrange(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None
) -> Arranged:  # fmt: skip
    """Check the shapes, spread heads over groups, and fill in what is left out."""
    (B, G, T, K), (H, V) = q.shape, v.shape[1::2]
    gates = [(), (H,), (B, H, T), (B, H, T, K)]
    if k.shape != q.shape or v.shape != (B, H, T, V) or G == 0 or H % G:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise QkvError(f"recall: found {shapes}, expected B G T K twice and B H T V with G a divisor of H")
    if (g is not None and g.shape not in gates[1:]) or (beta is not None and beta.shape != (B, H, T)):
        shapes = f"g {None if g is None else tuple(g.shape)} and beta {None if beta is None else tuple(beta.shape)}"
        raise QkvError(f"recall: found {shapes}, expected {gates[1]}, {gates[2]} or {gates[3]}, and {gates[2]}")
    if state is not None and state.shape != (B, H, K, V):
        raise QkvError(f"recall: found a state {tuple(state.shape)}, expected {(B, H, K, V)}")
    wide = torch.promote_types(v.dtype, torch.float32)
    if g is None:
        g = v.new_zeros(H)
    if g.dim() == 1:
        g = g[:, None].expand(B, H, T)
    if g.dim() == 3:
        g = g[..., None]
    if state is None:
        state = v.new_zeros(B, H, K, V, dtype=wide)

    def heads(x: Tensor) -> Tensor:
        return x.to(wide).unflatten(1, (G, -1))

    beta = None if beta is None else heads(beta)[..., None]
    return Arranged(heads(q), heads(k), heads(v), heads(g), beta, heads(state))
