"""Product, softmax and both gradients in one pass over blocks of tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qkv.ops.blocks.packed import Packed, refuse
from qkv.ops.precision import wide

BLOCK = 512
"""Tokens at a time: enough for an efficient product, few enough that the logits stay near the processor."""


def fused(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """As `naive`, in the precision of autocast where it is on; the softmax in fp32 or better.

    The gradient of the logits is known as soon as they are: softmax(z) − t. So the gradients of x, W and b are made in
    the forward pass, block by block, and the N×V logits are never held.
    """
    refuse(isinstance(weight, Packed) and weight.requires_grad and torch.is_grad_enabled())
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    return _Fused.apply(x, weight, labels, bias, smoothing)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, smoothing: float) -> Tensor:
        needs = ctx.needs_input_grad
        precise = wide(x)
        dx = torch.empty_like(x) if needs[0] else None
        dw = torch.zeros_like(weight, dtype=precise) if needs[1] else None
        db = torch.zeros_like(bias, dtype=precise) if bias is not None and needs[3] else None
        total = torch.zeros((), dtype=precise, device=x.device)
        logits = torch.empty(min(BLOCK, len(x)), len(weight), dtype=precise, device=x.device)
        for start in range(0, len(x), BLOCK):
            xs, ys = x[start : start + BLOCK], labels[start : start + BLOCK, None]
            z = logits[: len(xs)]
            if isinstance(weight, Packed):
                z.copy_(F.linear(xs, weight))
            elif x.dtype == precise:
                torch.mm(xs, weight.t(), out=z)
            else:
                z.copy_(torch.mm(xs, weight.t()))
            if bias is not None:
                z += bias
            right, mean, most = z.gather(1, ys), z.mean(1, keepdim=True), z.amax(1, keepdim=True)
            p = z.sub_(most).exp_()  # from here on the logits' own memory holds what is made of them
            mass = p.sum(1, keepdim=True)
            total += (most + mass.log() - (1 - smoothing) * right - smoothing * mean).sum()
            if dx is None and dw is None and db is None:
                continue
            dz = p.div_(mass)
            if smoothing:
                dz -= smoothing / dz.shape[1]
            dz.scatter_add_(1, ys, torch.full_like(right, smoothing - 1))
            if db is not None:
                db += dz.sum(0)
            dz = dz.to(x.dtype)
            if dx is not None:
                torch.mm(dz, weight, out=dx[start : start + BLOCK])
            if dw is not None:
                dw.addmm_(dz.t(), xs) if dw.dtype == xs.dtype else dw.add_(torch.mm(dz.t(), xs))
        ctx.save_for_backward(dx, dw, db)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = (None if saved is None else saved * gradient[0] for saved in ctx.saved_tensors)
        return dx, dw, None, db, None
