"""Where the caller's precision is left aside."""

import contextlib

import torch
from torch import Tensor


def as_given(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast on the device of x: products keep the types of their factors; meta tensors have none to turn off."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def wide(x: Tensor) -> torch.dtype:
    """fp32, or wider if x is: for decays and states, which bf16 would put off by a hundredth of themselves."""
    return torch.promote_types(x.dtype, torch.float32)
