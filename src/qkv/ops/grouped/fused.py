"""All groups in one call."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.ops.grouped.naive import naive

ALIGNED = 16  # bytes, of which torch's kernel wants every row to be a multiple
HAS_KERNEL = torch.__version__ >= "2.11"  # compares as versions; 2.10 wants tensors, too, to begin at such multiples


def fused(x: Tensor, weight: Tensor, loads: Sequence[int]) -> Tensor:
    """N C, E O C → N O, as `naive` gives it."""
    if not HAS_KERNEL or x.is_meta:
        return naive(x, weight, loads)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    unknown = torch.compiler.is_compiling() and dtype != torch.bfloat16  # to the kernel's stand-in of the compiler
    if unknown or not fits(weight, dtype):
        return naive(x, weight, loads)
    ends = torch.tensor(loads, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(x.device)
    return F.grouped_mm(x.to(dtype), weight.to(dtype).transpose(1, 2), offs=ends)


def fits(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes these weights; its gradients have rows of both lengths."""
    plain = type(weight) in (Tensor, nn.Parameter) and dtype.is_floating_point and dtype.itemsize <= 4
    return plain and not any(size * dtype.itemsize % ALIGNED for size in weight.shape[1:])
