"""An encoder and a decoder: what goes from one to the other, whatever side the padding is on."""

import pytest
import torch
from torch.nn import functional as F

from qkv.context import Tap
from qkv.errors import QkvError
from qkv.models import EncoderDecoder, Module
from qkv.parts import Head, LayerNorm, Learned, TiedTokens, Tokens
from qkv.spec import edit
from tests.contracts.specs import VOCAB, WIDTH, pairs, rough

SPEC = pairs()["transformer-tiny"]
S, T = 6, 4
SOURCE = torch.randint(VOCAB, (3, S), generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(VOCAB, (3, T), generator=torch.Generator().manual_seed(2))
VALID = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0]]).bool()
CLOSE = {"rtol": 0.0, "atol": 1e-10}


def model(**changes) -> Module:
    spec: EncoderDecoder = SPEC
    for path, change in changes.items():
        spec = edit(spec, path.replace("__", "."), change)
    return rough(spec)


def test_one_table_serves_source_target_and_output():
    tied = model()
    free = model(target=Tokens(vocab=VOCAB, position=SPEC.source.position, scaled=True), head=Head())
    assert free.count() - tied.count() == 2 * VOCAB * WIDTH
    weights = tied.state_dict()
    free.load_state_dict(
        {**weights, "target.tokens.weight": tied.source.table, "head.weight": tied.source.table}, strict=True
    )
    for one in (tied, free):
        logits = one(TARGET, **one.encode(SOURCE))
        F.cross_entropy(logits.flatten(0, 1), TARGET.flatten()).backward()
    parts = free.source.table, free.target.table, free.head.weight
    assert all(part.grad.abs().sum() > 0 for part in parts)
    torch.testing.assert_close(tied.source.table.grad, sum(part.grad for part in parts))


def test_a_target_with_a_table_of_its_own_ties_the_head_to_that():
    one = model(target=Tokens(vocab=VOCAB + 2, position=SPEC.source.position))
    x = one.hidden(TARGET, **one.encode(SOURCE))
    torch.testing.assert_close(one(TARGET, **one.encode(SOURCE)), x @ one.target.table.T)


def test_names_of_what_is_emitted():
    one, tap = model(encoder_norm=LayerNorm(), decoder_norm=LayerNorm()), Tap("**")
    memory = one.encode(SOURCE, tap=tap)
    out = one.hidden(TARGET, tap=tap, **memory)
    assert list(tap) == [
        "encoder.0.attn.weights", "encoder.0.out", "encoder.1.attn.weights", "encoder.1.out",
        "decoder.0.attn.weights", "decoder.0.cross.weights", "decoder.0.out",
        "decoder.1.attn.weights", "decoder.1.cross.weights", "decoder.1.out",
    ]  # fmt: skip
    assert tap["decoder.0.cross.weights"].shape == (3, 4, T, S)
    torch.testing.assert_close(memory["memory"], one.encoder_norm(tap["encoder.1.out"]))
    torch.testing.assert_close(out, one.decoder_norm(tap["decoder.1.out"]))
    assert "memory_lengths" not in memory


def test_padding_in_the_source_is_never_read():
    one, tap = model(), Tap("**")
    memory = one.encode(SOURCE, valid=VALID)
    assert memory["memory_lengths"].tolist() == [6, 4, 3]
    out = one(TARGET, tap=tap, **memory)
    for row in range(3):
        alone = Tap("**")
        known = one.encode(SOURCE[row : row + 1, VALID[row]])
        torch.testing.assert_close(out[row : row + 1], one(TARGET[row : row + 1], tap=alone, **known), **CLOSE)
        n = int(VALID[row].sum())
        weights = tap["decoder.1.cross.weights"][row]
        torch.testing.assert_close(weights[..., :n], alone["decoder.1.cross.weights"][0], **CLOSE)
        assert not weights[..., n:].any()
    packed = torch.stack([F.pad(ids[v], (0, S - int(v.sum()))) for ids, v in zip(SOURCE, VALID, strict=True)])
    lengths = torch.tensor([6, 4, 3])
    torch.testing.assert_close(one(TARGET, **one.encode(packed, lengths=lengths)), out, **CLOSE)


def test_an_encoders_tap_has_the_callers_places():
    one, tap, alone = model(), Tap("**"), Tap("**")
    one.encode(SOURCE, valid=VALID, tap=tap)
    one.encode(SOURCE[1:2, VALID[1]], tap=alone)
    torch.testing.assert_close(tap["encoder.1.out"][1, VALID[1]], alone["encoder.1.out"][0], **CLOSE)


def test_an_encoders_segments_are_in_the_callers_places():
    one, segments = model(source__segments=2), torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(3, -1)
    whole = one.encode(SOURCE, valid=VALID, segments=segments)["memory"]
    for row, real in enumerate(VALID):
        alone = one.encode(SOURCE[row : row + 1, real], segments=segments[row : row + 1, real])["memory"]
        torch.testing.assert_close(whole[row : row + 1, : int(real.sum())], alone, **CLOSE)


def test_cross_weights_of_beams_are_those_of_their_rows():
    one, rows, whole = model(), torch.tensor([0, 0, 1, 1, 2, 2]), Tap("**.weights")
    memory = one.encode(SOURCE, valid=VALID)
    one(TARGET, tap=whole, **memory)
    state, tap = one.new_state(3, T, **memory), Tap("**.weights")
    state.select(rows)
    one(TARGET[rows], state=state, tap=tap)
    for path, weights in tap.values.items():
        torch.testing.assert_close(weights, whole[path][rows], **CLOSE)


def test_a_tap_is_sealed_before_anything_is_recomputed():
    one = model().train().recompute()
    tap = Tap("**.out")
    out = one(TARGET, tap=tap, **one.encode(SOURCE, tap=tap))
    kept = dict(tap.values)
    out.square().mean().backward()
    assert len(kept) == 4 and all(tap[path] is value for path, value in kept.items())


def test_a_missing_memory_is_named():
    one = model()
    with pytest.raises(QkvError, match="needs the tensor 'memory'"):
        one(TARGET)
    with pytest.raises(QkvError, match="the state needs the memory 'memory'"):
        one.new_state(3, 9)
    with pytest.raises(QkvError, match=r"shape \(batch, tokens\)"):
        one.encode(SOURCE[0])


@pytest.mark.parametrize(
    "padding",
    [{"valid": VALID, "lengths": torch.tensor([6, 4, 3])}, {"valid": VALID[:, :4]}],
    ids=["both", "too short"],
)
def test_a_source_takes_valid_or_lengths(padding):
    with pytest.raises(QkvError, match="give either valid"):
        model().encode(SOURCE, **padding)


def test_a_target_may_share_only_the_table_and_a_model_may_have_no_head():
    position, norm = Learned(T), LayerNorm()
    apart = model(target=TiedTokens(position=position, norm=norm))
    free = model(target=Tokens(vocab=VOCAB, position=position, norm=norm))
    assert free.count() - apart.count() == VOCAB * WIDTH and apart.positions == T
    weights = {**apart.state_dict(), "target.tokens.weight": apart.source.table}
    free.load_state_dict(weights)
    torch.testing.assert_close(apart(TARGET, **apart.encode(SOURCE)), free(TARGET, **free.encode(SOURCE)), **CLOSE)
    bare = model(target=TiedTokens(position=position, norm=norm), head=None)
    bare.load_state_dict({name: tensor for name, tensor in weights.items() if name in bare.state_dict()})
    memory = bare.encode(SOURCE)
    torch.testing.assert_close(bare.hidden(TARGET, **memory), apart.hidden(TARGET, **memory), **CLOSE)
    with pytest.raises(QkvError, match="no head"):
        bare(TARGET, **memory)
