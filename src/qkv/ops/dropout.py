"""Dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability p and divide the others by 1 − p (Srivastava 2014).

    On a CPU torch draws a number for each element, one after the other, which takes as long as a matrix product; here
    one draw of 64 bits serves four elements. So p is a multiple of 2⁻¹⁶ there, and what is kept is scaled for that p.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(round(p * 65536), 65535)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = (bits[: x.numel()] >= dropped - 32768).view(x.shape)
    return x * kept.to(x.dtype).mul_(65536 / (65536 - dropped))
