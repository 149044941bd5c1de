"""The Transformer of 2017 computes what two other libraries compute from the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from qkv.decode import Beam, Greedy, decode
from qkv.models import EncoderDecoder, EncoderDecoderModel
from qkv.parts import LayerNorm, Sinusoidal
from qkv.spec import edit
from qkv.zoo import spec_of
from tests.contracts.specs import rough

VOCAB, WIDTH, HEADS, HIDDEN, DEEP, SHALLOW = 41, 30, 5, 37, 3, 2
PAD, BEGIN, END = 0, 2, 3


def small(**fields: object) -> EncoderDecoder:
    """transformer-tiny in odd sizes."""
    sizes = {"width": WIDTH, "**.vocab": VOCAB, "**.heads": HEADS, "**.hidden": HIDDEN, "**.dropout": 0.0}
    spec = spec_of("transformer-tiny")
    for path, value in (sizes | {"encoder.depth": DEEP, "decoder.depth": SHALLOW} | fields).items():
        spec = edit(spec, path, value)
    assert isinstance(spec, EncoderDecoder)
    return spec


def texts(rows: int, longest: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids in ragged rows, packed left and padded, and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(END + 1, VOCAB, (rows, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    return ids.where(torch.arange(longest) < lengths[:, None], PAD), lengths


def renamed(model: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """The weights under the names of another library."""
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = value
    return weights


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# --- transformers -------------------------------------------------------------------------------------------------

MARIAN = {
    "source.tokens": "model.shared", "encoder.": "model.encoder.layers.", "decoder.": "model.decoder.layers.",
    ".attn.f.": ".self_attn.", ".attn.post": ".self_attn_layer_norm",
    ".cross.f.": ".encoder_attn.", ".cross.post": ".encoder_attn_layer_norm",
    ".q.": ".q_proj.", ".k.": ".k_proj.", ".v.": ".v_proj.", ".o.": ".out_proj.",
    ".ffn.f.up": ".fc1", ".ffn.f.down": ".fc2", ".ffn.post": ".final_layer_norm",
}  # fmt: skip


def marian(ours: nn.Module) -> MarianMTModel:
    """The same model in transformers, fp64."""
    config = MarianConfig(
        vocab_size=VOCAB, d_model=WIDTH, encoder_layers=DEEP, decoder_layers=SHALLOW, max_position_embeddings=64,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN,
        activation_function="relu", scale_embedding=True, forced_eos_token_id=None,
        pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END, decoder_start_token_id=BEGIN,
    )  # fmt: skip
    theirs = MarianMTModel(config).double().eval()
    missing, unexpected = theirs.load_state_dict(renamed(ours, MARIAN), strict=False)
    made = ("embed_positions.weight", "embed_tokens.weight", "lm_head.weight", "final_logits_bias")  # computed or tied
    assert not unexpected and all(name.endswith(made) for name in missing)
    return theirs


@torch.no_grad()
def test_logits_are_those_of_transformers():
    ours = rough(small(**{"source.position": Sinusoidal(interleaved=False)}))
    source, lengths = texts(5, 11, seed=0)
    target, _ = texts(5, 9, seed=1)
    logits = ours(target, **ours.encode(source, lengths=lengths))
    assert_close(logits, marian(ours)(source, attention_mask=source != PAD, decoder_input_ids=target).logits)


@pytest.fixture(scope="module")
def copyists() -> tuple[EncoderDecoderModel, MarianMTModel]:
    """A model that has half learned to copy, so that beams differ and are not nearly tied, in both libraries."""
    torch.manual_seed(0)
    ours = small(**{"source.position": Sinusoidal(interleaved=False)}).build()
    optimizer = torch.optim.Adam(ours.parameters(), lr=3e-3)
    for step in range(120):
        source, lengths = texts(32, 11, seed=step)
        target = torch.full((32, 13), PAD)
        target[:, 0], target[:, 1:12], target[torch.arange(32), lengths + 1] = BEGIN, source, END
        logits = ours(target[:, :-1], **ours.encode(source, lengths=lengths))
        F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ours.double().eval(), marian(ours)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("rows", [1, 5])
def test_searches_find_what_those_of_transformers_find(copyists, beams: int, rows: int):
    ours, theirs = copyists
    source, lengths = texts(rows, 11, seed=1000)
    settings = GenerationConfig(
        num_beams=beams, do_sample=False, max_new_tokens=20, length_penalty=1.0, early_stopping=False,
        pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=BEGIN,
    )  # fmt: skip
    ids = theirs.generate(source, attention_mask=source != PAD, generation_config=settings)[:, 1:].tolist()
    search, memory = Beam(beams) if beams > 1 else Greedy(), ours.encode(source, lengths=lengths)
    found = decode(ours, [[BEGIN]] * rows, search, limits=[20] * rows, ends=END, memory=memory)
    assert [best[0].ids for best in found] == [row[: row.index(END)] if END in row else row for row in ids]


# --- torch.nn.Transformer -----------------------------------------------------------------------------------------

TORCH = {
    "encoder_norm": "encoder.norm", "decoder_norm": "decoder.norm",
    ".attn.f.": ".self_attn.", ".cross.f.": ".multihead_attn.", ".o.": ".out_proj.",
    ".ffn.f.up": ".linear1", ".ffn.f.down": ".linear2", ".attn.post": ".norm1", ".cross.post": ".norm2",
}  # fmt: skip


def of_torch(ours: nn.Module) -> nn.Transformer:
    """The same stacks in torch, which normalises what each stack gives once more; fp64."""
    weights = renamed(ours, TORCH)
    for name in [name for name in weights if ".q." in name]:
        stem, kind = name.split(".q.")
        weights[f"{stem}.in_proj_{kind}"] = torch.cat([weights.pop(f"{stem}.{part}.{kind}") for part in "qkv"])
    for name in [name for name in weights if name.startswith(("encoder.", "decoder."))]:
        side, _, rest = name.partition(".")
        rest = rest.replace("ffn.post", "norm2" if side == "encoder" else "norm3")
        weights[f"{side}.{rest}" if rest.startswith("norm.") else f"{side}.layers.{rest}"] = weights.pop(name)
    del weights["source.tokens.weight"]
    theirs = nn.Transformer(WIDTH, HEADS, DEEP, SHALLOW, HIDDEN, dropout=0.0, batch_first=True).double()
    theirs.load_state_dict(weights)
    return theirs


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # torch warns of what it will not do
def test_logits_are_those_of_torch():
    ours = rough(small(encoder_norm=LayerNorm(), decoder_norm=LayerNorm()))
    source, lengths = texts(5, 11, seed=0)
    target, _ = texts(5, 9, seed=1)
    table, theirs = ours.source.tokens.weight, of_torch(ours)

    def embedded(ids: Tensor) -> Tensor:
        waves = [
            [(math.cos if i % 2 else math.sin)(t / 10000 ** ((i - i % 2) / WIDTH)) for i in range(WIDTH)]
            for t in range(ids.shape[1])
        ]
        return table[ids] * math.sqrt(WIDTH) + torch.tensor(waves, dtype=table.dtype)

    hidden = theirs(
        embedded(source), embedded(target),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(9, dtype=table.dtype),
        src_key_padding_mask=source == PAD, memory_key_padding_mask=source == PAD,
    )  # fmt: skip
    assert_close(ours(target, **ours.encode(source, lengths=lengths)), hidden @ table.T)
