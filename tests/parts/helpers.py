"""What the tests of parts share."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qkv.context import Context, Recording, Tap
from qkv.masks import Full, Mask
from qkv.parts.mixers import Body


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wild(module: nn.Module, std: float = 0.5) -> nn.Module:
    """The module in fp64, every parameter and running mean random: fresh zeros and ones hide mistakes."""
    source = seeded(7)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=std, generator=source)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=std, generator=source)
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0, generator=source)
    return module


def run(
    body: Body, x: Tensor, mask: Mask | None = None, lengths: Tensor | None = None, tap: Tap | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """One body by itself on rows that are packed left, as a stack would call it."""
    recording = None if tap is None else Recording(tap, None)
    context = Context(
        torch.arange(x.shape[1])[None], mask or Full(), 0, lengths, given=given or {}, recording=recording, path="f"
    )
    body.view, context.views = 0, [body.prepare(context, None, x.shape[1])]
    return body(x, context)
