"""Every model that has a program, fed in every way, against torch's own passes in fp64."""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qkv import adapt
from qkv.context import Tap
from qkv.decode import Beam, Greedy, decode
from qkv.errors import QkvError
from qkv.masks import Causal, Full, Same, Window
from qkv.models import EncoderDecoder, Module, Sequence
from qkv.models.model import Model
from qkv.native import fast, slow
from qkv.ops.blocks import quantise
from qkv.ops.blocks.packed import Packed
from qkv.parts import (
    Attention,
    Block,
    Branch,
    Classifier,
    Experts,
    Gated,
    Head,
    RMSNorm,
    Rotary,
    Stack,
    Tokens,
    TopK,
)
from qkv.parts.linear import Linear
from qkv.spec import edit
from qkv.zoo import PRESETS
from tests.contracts.specs import VOCAB, WIDTH, decoder, decoders, pairs, rough, shrunk


def different(specs: Mapping[str, Model]) -> dict[str, Model]:
    """Each of them once: presets of several sizes are one, made small."""
    found: dict[str, Model] = {}
    for name, spec in specs.items():
        if spec not in found.values():
            found[name] = spec
    return found


PAIRS = different(pairs())
ENCODERS = different({name: shrunk(name) for name in PRESETS})
ENCODERS = {name: spec for name, spec in ENCODERS.items() if isinstance(spec, Sequence) and not spec.mask.causal} | {
    "a window": edit(decoder(), "mask", Window(4)),
    "classes": edit(edit(decoder(), "mask", Full()), "head", Classifier(labels=("a", "b", "c"))),
}
TORCH = {
    "embedding one-hot": "the position OneHot(40)",
    "score additive": "the score Additive()",
    "router biased-top-k": "the router BiasedTopK()",
    "router noisy-top-k": "the router NoisyTopK()",
    "window and sinks": "the mask Any((Window(3), Global(2)))",
    "mixer gru": "the mixer GRU",
    "mixer lstm": "the mixer LSTM",
    "mixer plain-experts": "the mixer PlainExperts",
    "mixer rnn": "the mixer RNN",
    **dict.fromkeys(["rnn-search", "rnn-search-tiny"], "the mixer Bidirectional"),
}
"""What has no kernel."""
EVERY = {**different(decoders()), **ENCODERS, **PAIRS}
DECODERS = [name for name in different(decoders()) if name not in TORCH]
PROGRAMMED = [name for name in PAIRS if name not in TORCH]


@cache
def both(name: str) -> tuple[Any, Any]:
    """A model with a program, and the same in fp64 with none."""
    model = rough(EVERY[name]).float()
    double = copy.deepcopy(model).double()
    said: list[str] = []
    fast(model, say=said.append)
    assert bool(said) == (name in TORCH) and len(said) < 2
    return model, double


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * (expected if scale is None else scale).abs().max()


def feed(model: Module, ids: Tensor, cuts: list[int], state: Any) -> Tensor:
    return torch.cat([model(chunk, state=state) for chunk in ids.split(cuts, 1)], 1)


# --- what is computed ---


@torch.no_grad()
@pytest.mark.parametrize("name", [*DECODERS, *(name for name in TORCH if name not in PAIRS), *ENCODERS])
def test_it_is_what_torch_computes(name: str, ids: Tensor) -> None:
    model, double = both(name)
    close(model(ids), double(ids))
    close(model.hidden(ids), double.hidden(ids))


@torch.no_grad()
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_on_any_side_changes_nothing(name: str, side: str, ids: Tensor) -> None:
    (model, double), valid = both(name), torch.ones(3, 17, dtype=torch.bool)
    valid[1, {"left": slice(0, 5), "right": slice(12, 17), "between": slice(3, 8)}[side]] = False
    pooled = model(ids).dim() == 2
    out, expected = model(ids, valid=valid), double(ids, valid=valid)
    rows = torch.ones(3, dtype=torch.bool) if pooled else valid
    close(out[rows], expected[rows])
    if pooled:  # by torch, in another order for another batch
        close(out[1:2], model(ids[1:2, valid[1]]))
    else:
        assert torch.equal(out[1:2, valid[1]], model(ids[1:2, valid[1]]))
    other = torch.where(valid, ids, (ids + 5) % VOCAB)
    assert torch.equal(model(other, valid=valid)[rows], out[rows])


@torch.no_grad()
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_row_of_padding_and_no_rows_and_no_tokens(name: str, ids: Tensor) -> None:
    (model, double), valid = both(name), torch.ones(3, 17, dtype=torch.bool)
    valid[1] = False
    out = model(ids, valid=valid)
    assert out.isfinite().all()
    close(out[[0, 2]], double(ids[[0, 2]]))
    assert model.hidden(ids[:0]).shape == (0, 17, WIDTH) == double.hidden(ids[:0]).shape
    assert model.hidden(ids[:, :0]).shape == (3, 0, WIDTH)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_chunks_are_the_whole_bit_for_bit(name: str, ids: Tensor) -> None:
    model, _ = both(name)
    whole = model(ids)
    for cuts in ([6, *[1] * 11], [1, 5, 2, 9], [17]):
        assert torch.equal(feed(model, ids, cuts, model.new_state(3, 20)), whole)
    assert feed(model, ids[:0], [6, 11], model.new_state(0, 20)).shape == whole[:0].shape
    state = model.new_state(3, 20)
    model(ids[:, :0], state=state)
    assert torch.equal(model(ids, state=state), whole)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_step_select_and_rewind_bit_for_bit(name: str, side: str, ids: Tensor) -> None:
    model, _ = both(name)
    whole, lengths, rows = model(ids), torch.tensor([6, 3, 5]), torch.arange(3)
    padded, valid = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.bool)
    for row, n in enumerate(lengths.tolist()):
        place = slice(6 - n, 6) if side == "left" else slice(0, n)
        padded[row, place], valid[row, place] = ids[row, :n], True
    state = model.new_state(3, 30)
    out = model(padded, valid=valid, state=state)
    for row, n in enumerate(lengths.tolist()):
        assert torch.equal(out[row, valid[row]], whole[row, :n])
    at = lengths.clone()
    for _ in range(4):
        assert torch.equal(model(ids[rows, at][:, None], state=state)[:, 0], whole[rows, at])
        at += 1
    mark = state.mark()
    draft = torch.stack([ids[row, n : n + 5] for row, n in enumerate(at.tolist())])
    wrong = draft.clone()
    wrong[:, 2:] = (wrong[:, 2:] + 7) % VOCAB
    model(wrong, state=state)
    again = state.rewind(mark, keep=2)
    if again:
        model(draft[:, 2 - again : 2], state=state)
    assert torch.equal(model(draft[:, 2:3], state=state)[:, 0], whole[rows, at + 2])
    chosen, at = torch.tensor([2, 0, 0]), at + 3
    state.select(chosen)
    tokens = ids[chosen, at[chosen]]
    tokens[2] = (tokens[2] + 1) % VOCAB  # what was one row goes on in two ways
    out = model(tokens[:, None], state=state)[:, 0]
    assert torch.equal(out[:2], whole[chosen, at[chosen]][:2]) and not torch.equal(out[2], out[1])
    assert state.lengths.tolist() == (at[chosen] + 1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", PROGRAMMED)
def test_an_encoder_decoder(name: str, ids: Tensor) -> None:
    (model, double), source, valid = both(name), random(3, 9), torch.ones(3, 9, dtype=torch.bool)
    valid[1, :4] = valid[2, 7:] = False
    memory, expected = model.encode(source, valid=valid), double.encode(source, valid=valid)
    for row, n in enumerate(valid.sum(1)):
        close(memory["memory"][row, :n], expected["memory"][row, :n], expected["memory"])
    whole, oracle = model(ids, **memory), double(ids, **expected)
    close(whole, oracle)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(whole[one], model(ids[one], **model.encode(source[one, valid[row]])))
    assert torch.equal(feed(model, ids, [4, 1, 1, 11], model.new_state(3, 20, **memory)), whole)
    state, chosen = model.new_state(3, 20, **memory), torch.tensor([0, 0, 1, 1, 2, 2])
    state.select(chosen).select(torch.tensor([1, 1, 2, 3, 5, 4]))
    assert torch.equal(feed(model, ids[chosen, :3], [2, 1], state), whole[chosen, :3])
    state.select(turn := torch.tensor([5, 0, 1]))
    assert torch.equal(model(ids[chosen[turn], 3:4], state=state)[:, 0], whole[chosen[turn], 3])
    left, at = torch.ones(3, 17, dtype=torch.bool), ids.clone()
    left[1, :5] = False
    close(model(at, valid=left, **memory)[left], double(at, valid=left, **expected)[left])
    with pytest.raises(QkvError, match="'memory'"):
        model.new_state(3, 20)
    with pytest.raises(QkvError, match="'memory'"):
        model(ids)


@torch.no_grad()
def test_a_memory_may_be_empty_and_rows_may_be_none(ids: Tensor) -> None:
    model, double = both("t5-small")
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1] = False
    memory = model.encode(random(3, 9), valid=valid)
    close(model(ids, **memory), double(ids, **double.encode(random(3, 9), valid=valid)))
    none = model.encode(random(3, 9)[:0])
    assert model(ids[:0], **none).shape == (0, 17, VOCAB)
    assert feed(model, ids[:0], [6, 11], model.new_state(0, 20, **none)).shape == (0, 17, VOCAB)


@torch.no_grad()
@pytest.mark.parametrize("name", ["smollm2-135m", "mixtral-8x7b", "mamba2-130m", "t5-small", "bert-tiny"])
def test_threads_change_no_bit(name: str) -> None:
    one, two = (fast(rough(EVERY[name]).float(), threads) for threads in (1, 2))
    ids = random(5, 37)
    more = [model.encode(ids) if isinstance(EVERY[name], EncoderDecoder) else {} for model in (one, two)]
    assert torch.equal(one(ids, **more[0]), two(ids, **more[1]))


@torch.no_grad()
def test_long_texts_are_cut_and_tables_grow() -> None:
    """More rows than one call takes, more positions than the first tables have, and a batch that fills two calls."""
    for name in ("smollm2-135m", "position alibi", "mamba-130m", "t5-small"):
        model = fast(rough(EVERY[name]).float())
        ids, more = random(2, 700), {}
        double = slow(copy.deepcopy(model)).double()
        if isinstance(EVERY[name], EncoderDecoder):
            memory, more = double.encode(ids[:, :300]), model.encode(ids[:, :300])
            close(more["memory"], memory["memory"])
            expected = double(ids, **memory)
        else:
            expected = double(ids)
        whole = model(ids, **more)
        close(whole, expected)
        state = model.new_state(2, 700, **more)
        assert torch.equal(feed(model, ids, [250, 7, 443], state), whole)


@torch.no_grad()
def test_segments_go_with_their_tokens() -> None:
    name = next(name for name, spec in ENCODERS.items() if isinstance(spec, Sequence) and spec.embed.segments)
    (model, double), ids, valid = both(name), random(3, 17), torch.ones(3, 17, dtype=torch.bool)
    valid[1, :5] = False
    segments = torch.randint(2, (3, 17), generator=torch.Generator().manual_seed(5))
    for given in (segments, segments[:1]):
        close(model(ids, segments=given), double(ids, segments=given))
        close(model(ids, valid=valid, segments=given)[valid], double(ids, valid=valid, segments=given)[valid])
    with pytest.raises(QkvError, match="segments lie between 0 and 1; found 0 and 2"):
        model(ids, segments=segments * 2)


# --- what is kept packed, or in halves ---


def llama(width: int = 64, hidden: int = 96) -> Sequence:
    norm = RMSNorm()
    attn = Branch(Attention(4, kv_heads=2, position=Rotary()), pre=norm)
    stack = Stack(Block(attn=attn, ffn=Branch(Gated(hidden), pre=norm)), depth=2)
    return Sequence(width, embed=Tokens(vocab=VOCAB), stack=stack, norm=norm, head=Head(tied=True))


def packed(format: str) -> Module:
    """A model whose matrices are blocks."""
    model = rough(llama()).float()
    for module in model.modules():
        if isinstance(module, Linear | torch.nn.Embedding):
            blocks = quantise(format, module.weight.detach())
            kept = Packed(format, blocks.view(len(module.weight), -1))
            module.weight = torch.nn.Parameter(kept, requires_grad=False)
    return model


@torch.no_grad()
@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "Q4_1", "BF16"])
def test_packed_models_are_near_and_equal_themselves(format: str, ids: Tensor) -> None:
    model = packed(format)
    expected = model(ids)
    fast(model)
    whole = model(ids)
    near = 0.01 if format == "BF16" else 0.1
    assert 0 < (whole - expected).abs().max() <= near * expected.abs().max()
    for cuts in ([6, *[1] * 11], [1, 5, 2, 9]):
        assert torch.equal(feed(model, ids, cuts, model.new_state(3, 20)), whole)
    assert torch.equal(whole[1:2], model(ids[1:2]))
    slow(model)
    assert torch.equal(model(ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["classes", "bert-tiny", "smollm2-135m", "transformer-base"])
def test_a_model_in_bfloats(name: str, ids: Tensor) -> None:
    model = rough(EVERY[name]).bfloat16()
    double = copy.deepcopy(model).double()
    fast(model)
    memory = model.encode(ids) if isinstance(EVERY[name], EncoderDecoder) else {}
    known = double.encode(ids) if memory else {}
    found, expected = model(ids, **memory), double(ids, **known)
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_tokens_are_scored_in_bfloats_too(tied: bool, softcap: float | None, ids: Tensor) -> None:
    model = rough(edit(EVERY["smollm2-135m"], "head", Head(tied=tied, softcap=softcap))).bfloat16()
    double = copy.deepcopy(model).double()
    fast(model)
    found, expected = (one.loss(one.hidden(ids).flatten(0, 1), ids.flatten()) for one in (model, double))
    assert (found - expected).abs() <= 0.02 * expected


# --- searches ---


@pytest.mark.parametrize("name", [*PROGRAMMED, "smollm2-135m", "gpt2", "gemma-3-270m", "mixtral-8x7b", "mamba2-130m"])
@pytest.mark.parametrize("how", [Beam(4), Greedy()], ids=["beam", "greedy"])
def test_searches_find_the_same(name: str, how: Any) -> None:
    model, double = both(name)
    prompts, found = [[5, 3, 8], [2], [7, 7, 1, 4, 9]], []
    for one in (model, double):
        memory: Any = None
        if isinstance(EVERY[name], EncoderDecoder):
            memory = one.encode(random(3, 9), lengths=torch.tensor([9, 4, 1]))
        found.append(decode(one, prompts, how, limits=[20, 9, 14], ends=0, memory=memory))
    for ours, expected in zip(*found, strict=True):
        assert [one.ids for one in ours] == [one.ids for one in expected]
        assert ours[0].log_p == pytest.approx(expected[0].log_p, rel=1e-4)


def test_states_live_in_and_out_of_inference_mode(ids: Tensor) -> None:
    model = fast(rough(EVERY["smollm2-135m"]).float())
    decode(model, [[1, 2], [3]], Beam(4), limits=[9, 9], ends=None)
    with torch.no_grad():
        state = model.new_state(3, 20)
        model(ids[:, :5], state=state)
        state.select(torch.tensor([0, 0, 1, 1, 2, 2]))
        out = model(ids[:, 5:6].repeat_interleave(2, 0), state=state)
        assert torch.equal(out[::2, 0], model(ids)[:, 5])


# --- who computes ---


@torch.no_grad()
@pytest.mark.parametrize("name", TORCH)
def test_what_has_no_kernel_is_said_once_and_computed_by_torch(name: str, ids: Tensor) -> None:
    model, said = rough(EVERY[name]).float(), []
    memory = model.encode(random(3, 9)) if isinstance(EVERY[name], EncoderDecoder) else {}
    expected = model(ids, **memory)
    assert fast(model, say=said.append) is model
    (line,) = said
    assert line == f"no native kernel for {TORCH[name]}: this model stays with torch"
    assert not model.programs and model.scores is None and torch.equal(model(ids, **memory), expected)


@pytest.mark.parametrize("name", ["mamba-130m", "mamba2-130m"])
def test_documents_in_one_row_stay_with_torch(name: str) -> None:
    said: list[str] = []
    fast(rough(edit(EVERY[name], "mask", Causal() & Same())).float(), say=said.append)
    assert said == ["no native kernel for the mask Same(): this model stays with torch"]


@torch.no_grad()
def test_what_is_beside_weights_or_mixed_stays_with_torch(ids: Tensor) -> None:
    model, said = rough(EVERY["gpt2"]).float(), []
    model.stack.layer(1).ffn.f.down.adapters["learned"] = Linear(24, WIDTH)
    expected = model(ids)
    assert torch.equal(fast(model, say=said.append)(ids), expected)
    assert said == ["no native kernel for an adapter: merge it first: this model stays with torch"]
    mixed = packed("Q8_0")
    gate = mixed.stack.layer(0).ffn.f.gate
    gate.weight = torch.nn.Parameter(gate.weight.dequantise())
    fast(mixed, say=said.append)
    assert said[1:] == [
        "no native kernel for a gate and what it multiplies are kept in different ways: this model stays with torch"
    ]


@torch.no_grad()
def test_slow_gives_the_passes_back(ids: Tensor) -> None:
    model = rough(EVERY["gpt2"]).float()
    expected = model(ids)
    assert fast(model) is model and model.programs and not torch.equal(model(ids), expected)
    tap = Tap("**.weights")
    with pytest.raises(QkvError, match=r"cannot be looked into: qkv.slow\(model\) gives its passes back to torch"):
        model(ids, tap=tap)
    assert slow(model) is model and torch.equal(model(ids), expected)
    model(ids, tap=tap)
    assert len(tap) == 2


def test_training_is_torchs(ids: Tensor) -> None:
    model = rough(EVERY["gpt2"]).float()
    plain = copy.deepcopy(model).train()
    fast(model).train()
    loss = []
    for one in (model, plain):
        torch.manual_seed(0)  # dropout draws the same in both
        loss.append(one(ids).square().mean())
    assert torch.equal(*loss) and loss[0].requires_grad
    loss[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_new_weights_are_seen_by_a_new_program(ids: Tensor) -> None:
    model = fast(rough(EVERY["gpt2"]).float())
    before = model(ids)
    next(model.stack.parameters()).mul_(3)
    assert torch.equal(model(ids), before)
    double = slow(copy.deepcopy(model)).double()
    close(fast(model)(ids), double(ids))


@torch.no_grad()
def test_a_copy_has_no_program(ids: Tensor) -> None:
    """Programs hold addresses, which two owners would both give back."""
    model = fast(rough(EVERY["smollm2-135m"]).float())
    before = model(ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.programs and other.scores is None
        assert torch.equal(other(ids), slow(copy.deepcopy(model))(ids))
        assert torch.equal(fast(other)(ids), before)
    del other
    assert torch.equal(model(ids), before)


@torch.no_grad()
@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**32 + 1])
def test_ids_out_of_range_are_refused(wrong: int, ids: Tensor) -> None:
    for name in ("gpt2", "bert-tiny", "t5-small"):
        model, _ = both(name)
        bad = ids.clone()
        bad[1, 4] = wrong
        with pytest.raises(QkvError, match=f"ids lie between 0 and {VOCAB - 1}; found .*{wrong}"):
            model.encode(bad) if hasattr(model, "encode") else model(bad)


@torch.no_grad()
def test_ids_may_be_narrow_and_padding_anything(ids: Tensor) -> None:
    model, lengths = both("gpt2")[0], torch.tensor([17, 5, 9])
    whole, padded = model(ids, lengths=lengths), ids.where(torch.arange(17) < lengths[:, None], -100)
    assert torch.equal(model(padded, lengths=lengths), whole)
    assert torch.equal(model(ids.int()), model(ids))


@torch.no_grad()
def test_what_cannot_be_is_refused_in_a_sentence(ids: Tensor) -> None:
    model, _ = both("gpt2")
    with pytest.raises(QkvError, match="room for 5 tokens and 17 were fed"):
        model(ids, state=model.new_state(3, 5))
    with pytest.raises(QkvError, match="41 tokens are too many: the model has 40 positions"):
        model(random(1, 41))
    with pytest.raises(QkvError, match="keeps no state"):
        both("bert-tiny")[0].new_state(1, 5)
    with pytest.raises(QkvError, match="on 1 thread or more, not on -1"):
        fast(rough(EVERY["gpt2"]), -1)


@torch.no_grad()
def test_rows_that_do_not_fit_are_refused(ids: Tensor) -> None:
    for one in both("gpt2"):
        with pytest.raises(QkvError, match="the state is of 3 rows, and the ids are of 1"):
            one(ids[:1, :1], state=one.new_state(3, 20))
    with pytest.raises(QkvError, match=f"hidden vectors are {WIDTH} wide, not {WIDTH + 1}"):
        both("gpt2")[0].logits(torch.zeros(2, WIDTH + 1))
    model = both("t5-small")[0]
    one = model.encode(ids[:1])
    for refused in (
        lambda: model.new_state(3, 20, **one),
        lambda: model(ids, **one),
        lambda: model(ids[:1], memory=one["memory"][..., 1:]),
        lambda: decode(model, [[1]] * 3, Greedy(), limits=[5] * 3, ends=None, memory=one),
    ):
        with pytest.raises(QkvError, match="the memory of . rows has the shape"):
            refused()


@torch.no_grad()
def test_a_state_belongs_to_those_who_made_it(ids: Tensor) -> None:
    model = rough(EVERY["gpt2"]).float()
    torchs, other = model.new_state(3, 20), {"memory": torch.zeros(3, 4, WIDTH)}
    earlier = fast(model).new_state(3, 20)
    fast(model)
    own = model.new_state(3, 20)
    for one in (torchs, fast(rough(EVERY["t5-small"]).float()).new_state(3, 20, **other), earlier):
        with pytest.raises(QkvError, match="this state is of other passes: make another with new_state"):
            model(ids, state=one)
    model(ids, state=own)
    with pytest.raises(QkvError, match="this state is of other passes"):
        slow(model)(ids, state=own)


def test_it_ends_with_its_process() -> None:
    """Threads that sleep do not keep a process from its end, nor break it."""
    code = (
        "import torch; from tests.contracts.specs import decoder, rough; from qkv.native import fast\n"
        "model = fast(rough(decoder()).float(), 2); print(model(torch.zeros(2, 3, dtype=torch.long)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([2, 3, 23])\n", "")


@torch.no_grad()
def test_experts_in_blocks():
    """All experts are chosen, so that no rounding of activations sends a token elsewhere."""
    experts = Experts(hidden=64, count=3, router=TopK(k=3))
    spec = Sequence(width=32, embed=Tokens(VOCAB), stack=Stack(Block(ffn=Branch(experts, pre=RMSNorm())), depth=2))
    model = spec.build().eval()
    assert adapt.quantise(model, "int8").formats.keys() >= {"stack.0.ffn.f.gate", "stack.1.ffn.f.down"}
    ids = torch.arange(40).remainder(VOCAB).view(2, 20)
    expected = model.hidden(ids)
    assert fast(model, 2).programs
    error = (model.hidden(ids) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.02  # of activations in 8 bits


def test_a_thread_waits_for_tables_that_another_makes() -> None:
    """Else it would run with the records of before, and read behind the end of their tables."""
    model = rough(decoders()["smollm2-135m"]).float()
    ids = torch.randint(VOCAB, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model.hidden(ids)
    (program,) = fast(model, 1).programs.values()
    model.new_state(1, 1)
    op, name = next((op, name) for op in program.build.ops for name, value in op.items() if callable(value))
    begun, go, make, found = threading.Event(), threading.Event(), op[name], list[Tensor]()

    def slowly(positions: int) -> Tensor:
        begun.set()
        go.wait()
        return make(positions)

    @torch.inference_mode()
    def read() -> None:
        found.append(model.hidden(ids))

    op[name] = slowly
    threads = threading.Thread(target=lambda: model.new_state(1, 1000)), threading.Thread(target=read)
    threads[0].start()
    begun.wait()
    threads[1].start()
    threads[1].join(0.2)
    early = list(found)
    go.set()
    for thread in threads:
        thread.join()
    assert not early
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-3)
