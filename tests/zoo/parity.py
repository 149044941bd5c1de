"""What every family must show against the transformers package, from random weights of standard deviation 0.3."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qkv.checkpoints.export import save_pretrained
from qkv.checkpoints.load import load_directory
from qkv.decode import Beam, Greedy, decode
from qkv.models import EncoderDecoderModel, Module
from qkv.spec import dump, load

VOCAB, END, ROWS, T = 61, 2, 5, 17

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 3,
    "num_attention_heads": 6, "max_position_embeddings": 97,
}  # fmt: skip
"""Odd sizes under the usual keys."""


def rough(model: Any, std: float = 0.3, seed: int = 0) -> Any:
    """Large random weights (at 0.02 almost anything passes), norms about 1; in evaluation mode, fp32."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if parameter.dim() == 1 and "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + middle)
        model.tie_weights()
    return model.float().eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference against the largest value."""
    assert ours.shape == theirs.shape, (tuple(ours.shape), tuple(theirs.shape))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def loaded(theirs: PreTrainedModel, folder: Path) -> Module:
    """The model as qkv loads what transformers saved, its spec a value that survives JSON."""
    theirs.save_pretrained(folder)
    ours = load_directory(folder)
    assert load(dump(ours.spec)) == ours.spec
    return ours


def texts(rows: int = ROWS, longest: int = T, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random ids without special ones, and which of them are real: ragged, packed left, the first row full."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, longest), generator=generator)
    lengths = torch.randint(2, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    return ids, torch.arange(longest) < lengths[:, None]


def answer(model: Module, ids: Tensor, **given: Any) -> Tensor:
    return model(ids, **given) if model.head is not None else model.hidden(ids, **given)


def published(output: Any) -> Tensor:
    """The first result of a transformers model; of one that answers questions, starts and ends side by side."""
    return torch.stack((output.start_logits, output.end_logits), -1) if "start_logits" in output else output[0]


@torch.no_grad()
def check_values(theirs: PreTrainedModel, folder: Path, *, segments: bool = False, causal: bool = False) -> Module:
    """Plain, padded on the right and on the left: equal to transformers, and to each row by itself."""
    ours = loaded(theirs, folder)
    ids, valid = texts()
    given = {"segments": (torch.arange(T) > 6).long().expand(ROWS, T)} if segments else {}
    named = {"token_type_ids": given["segments"]} if segments else {}
    assert relative(answer(ours, ids, **given), published(theirs(ids, **named))) < 1e-5
    ids = ids.where(valid, 0)
    whole = published(theirs(ids, attention_mask=valid.long(), **named))
    per_token = whole.dim() == 3
    right = answer(ours, ids, valid=valid, **given)
    assert relative(*((right[valid], whole[valid]) if per_token else (right, whole))) < 1e-5
    flipped, back = ids.flip(1), valid.flip(1)  # padding on the left, the tokens mirrored
    left = answer(ours, flipped, valid=back, **({"segments": given["segments"].flip(1)} if segments else {}))
    for row, length in enumerate(valid.sum(1).tolist()):
        some = {name: value[row : row + 1].flip(1)[:, T - length :] for name, value in given.items()}
        alone = answer(ours, flipped[row : row + 1, T - length :], **some)[0]
        assert relative(left[row, T - length :] if per_token else left[row], alone) < 1e-4
    if causal:
        check_state(ours, ids)
    return ours


@torch.no_grad()
def check_state(ours: Module, ids: Tensor, **memory: Tensor) -> None:
    """Whole = uneven chunks = one token at a time."""
    whole = ours(ids, **memory)
    for cuts in ([1] * T, [6, 1, 1, 4, 5], [T]):
        state = ours.new_state(len(ids), T, **memory)
        pieces = [ours(piece, state=state) for piece in ids.split(cuts, 1)]
        assert relative(torch.cat(pieces, 1), whole) < 1e-4


def check_export(theirs: PreTrainedModel, ours: Module, folder: Path) -> None:
    """What is saved again has the same tensors, and transformers computes the same from it."""
    save_pretrained(ours, folder)
    back = type(theirs).from_pretrained(folder).eval()
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def check_search(
    theirs: PreTrainedModel, ours: Module, *, begin: int | None = None, beams: Sequence[int] = (1, 4)
) -> None:
    """Greedy and beam search find the same ids, one row at a time and five together."""
    ids, _ = texts(longest=7)
    for rows in (1, ROWS):
        for size in beams:
            settings = GenerationConfig(
                num_beams=size, do_sample=False, max_new_tokens=12, length_penalty=1.0, early_stopping=False,
                pad_token_id=0, eos_token_id=END, bos_token_id=1, decoder_start_token_id=begin, use_cache=True,
            )  # fmt: skip
            some, search = ids[:rows], Beam(size) if size > 1 else Greedy()
            theirs.generation_config = settings
            found = theirs.generate(some, attention_mask=torch.ones_like(some), generation_config=settings)
            if begin is None:
                prompts, memory, found = some.tolist(), None, found[:, some.shape[1] :]
            else:
                assert isinstance(ours, EncoderDecoderModel)
                prompts, found = [[begin]] * rows, found[:, 1:]
                with torch.no_grad():
                    memory = ours.encode(some)
            mine = decode(ours, prompts, search, limits=[12] * rows, ends=END, memory=memory)
            wanted = [row[: row.index(END)] if END in row else row for row in found.tolist()]
            assert [best[0].ids for best in mine] == wanted, (rows, size)
