"""One stack over one sequence: head, taps, and what cannot be."""

import pytest
import torch
from torch.nn import functional as F

from qkv.context import Tap
from qkv.decode import Greedy, decode, stream
from qkv.errors import QkvError
from qkv.masks import Full, Same, Window
from qkv.models import Module
from qkv.parts import Attention, BatchNorm, Head, Learned
from qkv.spec import edit
from tests.contracts.specs import ROOM, VOCAB, WIDTH, decoder, rough

T = 7
IDS = torch.randint(VOCAB, (3, T), generator=torch.Generator().manual_seed(1))
VALID = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0, 0]]).bool()
SPEC = decoder(at=Learned(ROOM))
CLOSE = {"rtol": 0.0, "atol": 1e-10}


def encoder() -> Module:
    return rough(edit(SPEC, "mask", Full()))


# --- the head ---


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_head_is_the_table_and_the_table_learns_from_both(bias):
    tied, free = (rough(edit(SPEC, "head", Head(tied=tied, bias=bias))) for tied in (True, False))
    assert tied.head.weight is None and free.count() - tied.count() == VOCAB * WIDTH
    weights = dict(tied.state_dict())
    free.load_state_dict({**weights, "head.weight": weights["embed.tokens.weight"]})
    for model in (tied, free):
        logits = model(IDS)
        expected = model.hidden(IDS) @ tied.embed.table.T + (model.head.bias if bias else 0)
        torch.testing.assert_close(logits, expected, **CLOSE)
        F.cross_entropy(logits.flatten(0, 1), IDS.flatten()).backward()
    torch.testing.assert_close(tied.embed.table.grad, free.embed.table.grad + free.head.weight.grad)


def test_the_heads_loss_is_that_of_its_logits():
    model = rough(edit(SPEC, "head.bias", True))
    x = model.hidden(IDS).flatten(0, 1)
    loss = model.head.loss(x, model.embed.table, IDS.flatten(), 0.1)
    expected = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten(), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softcap_leaves_the_loss_its_digits(dtype):
    model = rough(edit(SPEC, "head.softcap", 2.0)).to(dtype)
    loss = model.loss(model.hidden(IDS).flatten(0, 1), IDS.flatten())
    expected = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten(), reduction="sum")
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected)


def test_lengths_fit_the_rows():
    model = rough(SPEC)
    for wrong in ([T], [T, 2, T + 1]):
        with pytest.raises(QkvError, match="lengths are how many of the 7 ids of each of 3 rows are real"):
            model(IDS, lengths=torch.tensor(wrong))


def test_what_is_recomputed_counts_a_batch_once():
    found = []
    for on in (False, True):
        model = rough(edit(SPEC, "**.pre", BatchNorm())).train().recompute(on)
        loss = model(IDS).sum()
        for _ in range(2):  # which runs it again each time
            loss.backward(retain_graph=True)
        found.append(dict(model.named_buffers()))
    assert len(found[0]) and all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_a_model_without_a_head_gives_its_hidden_vectors():
    model = rough(edit(SPEC, "head", None))
    assert model.hidden(IDS).shape == (3, T, WIDTH)
    with pytest.raises(QkvError, match="has no head"):
        model(IDS)


# --- looking inside ---


def test_a_tap_hears_what_its_patterns_name():
    model, tap = rough(SPEC), Tap("**")
    model(IDS, tap=tap)
    layers = [(f"stack.{n}.attn.weights", f"stack.{n}.out") for n in range(3)]
    assert list(tap) == [path for pair in layers for path in pair] and len(tap) == 6
    assert tap["stack.1.attn.weights"].shape == (3, 4, T, T) and tap["stack.2.out"].shape == (3, T, WIDTH)
    torch.testing.assert_close(model.norm(tap["stack.2.out"]), model.hidden(IDS), **CLOSE)
    only = Tap("stack.1.**", "stack.*.attn.weights")
    torch.testing.assert_close(model(IDS, tap=only), model(IDS), **CLOSE)
    assert list(only) == ["stack.0.attn.weights", "stack.1.attn.weights", "stack.1.out", "stack.2.attn.weights"]
    assert list(only.find("**.out")) == ["stack.1.out"]
    with pytest.raises(QkvError, match=r"holds nothing at 'stack.0.out'; it holds: stack.0.attn.weights"):
        only["stack.0.out"]


@pytest.mark.parametrize("causal", [True, False])
def test_a_tap_of_padded_rows_has_the_callers_places(causal):
    model, tap = (rough(SPEC) if causal else encoder()), Tap("**")
    out = model(IDS, valid=VALID, tap=tap)
    for row in range(3):
        real, alone = VALID[row], Tap("**")
        torch.testing.assert_close(out[row, real], model(IDS[row : row + 1, real], tap=alone)[0], **CLOSE)
        for n in range(3):
            torch.testing.assert_close(tap[f"stack.{n}.out"][row, real], alone[f"stack.{n}.out"][0], **CLOSE)
            weights = tap[f"stack.{n}.attn.weights"][row][:, real]
            torch.testing.assert_close(weights[..., real], alone[f"stack.{n}.attn.weights"][0], **CLOSE)
            assert not weights[..., ~real].any()


def test_a_tap_follows_a_state():
    model, whole = rough(SPEC), Tap("**.weights")
    model(IDS, tap=whole)
    state = model.new_state(3, T)
    for cut in (slice(0, 4), slice(4, 5), slice(5, 7)):
        tap = Tap("**.weights")
        model(IDS[:, cut], state=state, tap=tap)
        seen = whole["stack.2.attn.weights"][:, :, cut, : cut.stop]
        torch.testing.assert_close(tap["stack.2.attn.weights"], seen, **CLOSE)


@pytest.mark.parametrize("pattern", ["**.out", "**.weights"])
def test_a_tap_is_sealed_before_anything_is_recomputed(pattern):
    model = rough(SPEC).train()
    model(IDS).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.recompute().zero_grad()
    tap = Tap(pattern)
    out = model(IDS, tap=tap)
    kept = dict(tap.values)
    out.square().mean().backward()
    assert len(kept) == 3 and all(tap[path] is value for path, value in kept.items())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **CLOSE)


# --- what is given ---


def test_lengths_say_what_right_padding_says():
    model, lengths = encoder(), torch.tensor([7, 3, 5])
    valid = torch.arange(T) < lengths[:, None]
    torch.testing.assert_close(model(IDS, lengths=lengths)[valid], model(IDS, valid=valid)[valid], **CLOSE)


def test_documents_in_a_row_are_as_documents_apart():
    model = rough(decoder(Attention(4, mask=Same())))  # no positions: each document begins anew
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    whole = model(IDS[:1], segments=segments)
    for part in (slice(0, 3), slice(3, 7)):
        torch.testing.assert_close(whole[:, part], model(IDS[:1, part], segments=segments[:, part]), **CLOSE)
    with pytest.raises(QkvError, match="pass segments=…"):
        model(IDS[:1])


def test_a_layers_own_documents_cannot_be_cached_either():
    model, segments = rough(decoder(Attention(4, mask=Same()))), torch.zeros(3, T, dtype=torch.long)
    with pytest.raises(QkvError):
        state = model.new_state(3, 2 * T)
        for _ in range(2):
            model(IDS, state=state, segments=segments)


def test_what_cannot_be_is_refused():
    model = rough(SPEC)
    with pytest.raises(QkvError, match="give either valid"):
        model(IDS, valid=VALID, lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(QkvError, match=r"of the shape \(3, 7\)"):
        model(IDS, valid=VALID[:, :4])
    with pytest.raises(QkvError, match="the model has 40 positions"):
        model.new_state(1, ROOM + 1)


def test_device_and_count():
    model = rough(SPEC)
    assert model.device == torch.device("cpu") and model.to("meta").device == torch.device("meta")
    assert model.count() == sum(tensor.numel() for tensor in model.state_dict().values())


def test_ids_and_lengths_are_checked():
    model = rough(SPEC)
    for wrong in (VOCAB, -1):
        with pytest.raises(QkvError, match=f"ids lie between 0 and {VOCAB - 1}; found .*{wrong}"):
            model(torch.tensor([[1, wrong]]))
    assert model(IDS[:, :0]).shape == (3, 0, VOCAB)
    for lengths in ([-1, 1, 1], [1, 1, T + 1]):
        with pytest.raises(QkvError, match="lengths are how many"):
            model(IDS, lengths=torch.tensor(lengths))


def test_evaluation_leaves_each_part_as_it_was():
    model = rough(SPEC).train()
    model.embed.eval()
    before = [module.training for module in model.modules()]
    with model.evaluating():
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    decode(model, [[1], [2, 3]], Greedy(), limits=[2, 2], ends=None)
    list(stream(model, [1], Greedy(), limit=2))
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("mask", [Full(), Window(3)])
def test_a_cache_takes_what_autocast_makes(mask):
    model = rough(edit(SPEC, "**.attn.f.mask", mask)).float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        state, lengths = model.new_state(3, T + 1), torch.tensor([T, 2, 4])
        model(IDS, state=state, lengths=lengths)
        step = model(IDS[:, :1], state=state)
        for row, length in enumerate(lengths.tolist()):
            alone = model(torch.cat((IDS[row : row + 1, :length], IDS[row : row + 1, :1]), 1))[0, -1]
            assert float((step[row, 0] - alone).abs().max()) < 0.05 * float(alone.abs().max())
