"""What every family of encoder-decoders must show against the transformers package; `parity` has what all share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qkv.checkpoints.export import save_pretrained
from qkv.models import EncoderDecoderModel, Module
from qkv.spec import edit
from tests.zoo.parity import T, answer, check_state, loaded, published, relative, texts


@torch.no_grad()
def check_pairs(theirs: PreTrainedModel, folder: Path) -> EncoderDecoderModel:
    """Equal to transformers with ragged sources and targets, padded on any side; a state changes nothing."""
    ours = loaded(theirs, folder)
    assert isinstance(ours, EncoderDecoderModel)
    source, valid = texts()
    target, written = texts(seed=2)
    source, target = source.where(valid, 0), target.where(written, 0)
    whole = paired(theirs, source, target, valid)
    right = answer(ours, target, **ours.encode(source, valid=valid))
    assert relative(right[written], whole[written]) < 1e-5
    left = answer(ours, target, **ours.encode(source.flip(1), valid=valid.flip(1)))  # the tokens mirrored
    for row, length in enumerate(valid.sum(1).tolist()):
        alone = answer(ours, target[row : row + 1], **ours.encode(source[row : row + 1, :length].flip(1)))
        assert relative(left[row], alone[0]) < 1e-4
    back = answer(ours, target.flip(1), valid=written.flip(1), **ours.encode(source, valid=valid))
    mirrored = paired(theirs, source, turned(target, written), valid)
    assert relative(turned(back.flip(1), written)[written], mirrored[written]) < 1e-5
    if ours.head is not None:
        check_state(ours, target, **ours.encode(source.flip(1), valid=valid.flip(1)))
    return ours


def paired(theirs: PreTrainedModel, source: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    return published(theirs(source, attention_mask=valid.long(), decoder_input_ids=target))


def turned(x: Tensor, valid: Tensor) -> Tensor:
    """Each row's real tokens, which stand on the left, the other way round."""
    at = torch.arange(T)
    order = torch.where(valid, valid.sum(1, keepdim=True) - 1 - at, at)
    return x[torch.arange(len(x))[:, None], order]


@torch.no_grad()
def check_edited(theirs: PreTrainedModel, ours: Module, folder: Path, *inputs: Tensor, **sizes: Any) -> None:
    """A model built from the edited spec is saved, and transformers computes the same from it."""
    spec = ours.spec
    for pattern, value in sizes.items():
        spec = edit(spec, pattern, value)
    other = spec.build().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.normal_(std=0.3, generator=generator)
    other.origin = ours.origin
    save_pretrained(other, folder)
    back = type(theirs).from_pretrained(folder).eval()
    if isinstance(other, EncoderDecoderModel):
        source, target = inputs
        found = other(target, **other.encode(source))
        assert relative(found, paired(back, source, target, torch.ones_like(source))) < 1e-5
    else:
        assert relative(other(*inputs), published(back(*inputs))) < 1e-5
