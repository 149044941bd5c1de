"""Marian's tokenizers, one for each side, and a whole translation, against the transformers package."""

import io
import json
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import torch
from tests.use.small import LINES, SENTENCES
from tests.zoo.parity import rough
from transformers import MarianConfig, MarianMTModel, MarianTokenizer

from qkv.checkpoints.directory import BESIDE
from qkv.data.pretrained import load_tokenizer
from qkv.errors import QkvError
from qkv.train.run import open_task

GERMAN = [
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Wir müssen heute größere Häuser bauen, heißt es.",
    "Straße, Übung und Ärger; das Wörterbuch gehört ihr nicht.",
    "Ein Name ist ein Wert 你好, und Zahlen wie 12345 sind auch Werte.",
] * 30
HARD = [
    "", " ", "   ", "Hello world!", " leading", "trailing  ", "two  spaces   three", "\ttab\nnew\n\n  line\r\n",
    "你好，世界", "🙂 emoji 👩‍👩‍👧", "ﬁ ligature ½ ①", "1234567 3.50", "naïve café", "Ａｂｃ　ｗｉｄｅ",
    "\u00a0nbsp\u200bzw", "DON'T we'LL", "x= (a+b)^2 -- ...!?", "aaaaaaa", "_a_b_", "Müller", "größer ü", "ß",
    "e\u0301 combining", *LINES[:99],
]  # fmt: skip
CODES = [">>fr<<", ">>zho_Hans<<"]


@cache
def spm(side: str) -> bytes:
    file, lines = io.BytesIO(), LINES if side == "source" else GERMAN
    size = 400 if side == "source" else 70
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, minloglevel=2, vocab_size=size, bos_id=-1
    )
    return file.getvalue()


def pieces(side: str) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_proto=spm(side))
    return [model.id_to_piece(i) for i in range(2, model.get_piece_size())]


def directory(folder: Path, apart: bool = False) -> MarianTokenizer:
    """As Helsinki-NLP publish them; of each model the table lacks every eleventh piece."""
    kept = {side: [p for n, p in enumerate(pieces(side)) if n % 11] for side in ("source", "target")}
    tables = {"vocab": CODES + sorted({*kept["source"], *kept["target"]})}
    if apart:
        tables = {"vocab": kept["source"], "target_vocab": kept["target"][::-1]}
    for name, texts in tables.items():
        table = {text: i for i, text in enumerate(["</s>", "<unk>", *texts, "<pad>"])}
        (folder / f"{name}.json").write_text(json.dumps(table))
    for side in ("source", "target"):
        (folder / f"{side}.spm").write_bytes(spm(side))
    config = {"source_lang": "en", "target_lang": "de", "separate_vocabs": apart}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return MarianTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("apart", [False, True])
def test_ids_and_texts_are_those_of_transformers(apart: bool, tmp_path: Path) -> None:
    theirs = directory(tmp_path, apart)
    source, target = load_tokenizer(tmp_path), load_tokenizer(tmp_path, "target")
    texts = [*HARD, *GERMAN[:4]]
    assert [text for text in texts if source.prompt(text).ids != theirs(text)["input_ids"]] == []
    assert [text for text in texts if target.prompt(text).ids != theirs(text_target=text)["input_ids"]] == []
    assert [source.unknown in source.encode(text) for text in texts].count(True) > 5
    assert all(source.encode(text) == source.prompt(text).ids[:-1] for text in texts)
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        # For transformers the source's table says which ids are special in the target, too.
        ids = torch.randint(target.size - apart, (12,), generator=draw).tolist()
        assert target.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for own in (source, target):
        assert (own.end, own.unknown, own.pad, own.size) == (0, 1, own.size - 1, own.size)
        assert own.ends == {0} and not own.has("begin") and not own.has("mask")
        assert own.parse("a</s>") == [*own.encode("a"), 0] and 0 not in own.encode("a</s>")


def test_a_language_begins_a_text(tmp_path: Path) -> None:
    theirs = directory(tmp_path)
    source = load_tokenizer(tmp_path)
    for text in (">>fr<< The value", ">>zho_Hans<<The value", ">>fr<<", ">>fr The value", ">> x << y"[3:]):
        assert source.prompt(text).ids == theirs(text)["input_ids"]
    assert source.encode(">>fr<< a")[0] == 2


def test_a_translation_is_that_of_transformers(tmp_path: Path) -> None:
    own = directory(tmp_path)
    size, pad = len(own.encoder), own.pad_token_id
    config = MarianConfig(
        vocab_size=size, d_model=36, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6,
        decoder_attention_heads=4, encoder_ffn_dim=50, decoder_ffn_dim=46, max_position_embeddings=64,
        pad_token_id=pad, eos_token_id=0, bos_token_id=0, decoder_start_token_id=pad, forced_eos_token_id=None,
    )  # fmt: skip
    theirs = rough(MarianMTModel(config))
    for name, module in theirs.named_modules():
        if name.endswith("embed_positions"):
            module.weight.data.copy_(module.create_weight())
    theirs.model.decoder.layers[-1].final_layer_norm.bias.data.zero_()  # else one token is every answer
    theirs.model.shared.weight.data.copy_(torch.nn.functional.normalize(theirs.model.shared.weight.data))
    theirs.save_pretrained(tmp_path)
    texts = [*SENTENCES, *GERMAN[:4], ">>fr<< Müller?", ">>zho_Hans<< a", "", "ß"]
    task, answers = open_task(tmp_path), set()
    assert not task.tokenizers.joint
    for text, [answer] in zip(texts, task.predict(texts, tokens=12), strict=True):
        read = own(text, return_tensors="pt")
        wanted = theirs.generate(**read, max_new_tokens=12, num_beams=1, do_sample=False)[0].tolist()
        assert answer.text == own.decode(wanted, skip_special_tokens=True)
        assert answer.ids == [i for i in wanted[1:] if i != 0]
        answers.add(answer.text)
    assert len(answers) > 1


@pytest.mark.parametrize("apart", [False, True])
def test_a_side_that_is_saved_is_the_same(apart: bool, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    theirs = directory(tmp_path / "theirs", apart)
    (tmp_path / "theirs" / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    texts = [*HARD, *GERMAN[:4], ">>fr<< Müller?"]
    for side in ("source", "target"):
        before = load_tokenizer(tmp_path / "theirs", side)
        before.save(tmp_path / side)
        after = load_tokenizer(tmp_path / side, side)
        assert (after.size, after.ends, after.names) == (before.size, {0, 1}, before.names)
        assert after.encode_batch(texts) == before.encode_batch(texts)
        assert [after.parse(text) for text in texts] == [before.parse(text) for text in texts]
        assert [after.decode([i]) for i in range(after.size)] == [before.decode([i]) for i in range(before.size)]
        before.save(tmp_path / "both")
        with pytest.raises(QkvError, match="source.json cannot hold a tokenizer whose ids stand in a table"):
            before.save(tmp_path / "source.json")
    assert {path.name for path in (tmp_path / "theirs").iterdir()} <= set(BESIDE)  # what a conversion takes along
    both = MarianTokenizer.from_pretrained(tmp_path / "both")
    assert both(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert both(text_target=texts)["input_ids"] == theirs(text_target=texts)["input_ids"]
    with pytest.raises(QkvError, match="has the tokenizer of the other side alone: target.spm is expected"):
        load_tokenizer(tmp_path / "source", "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "source", "target", "theirs"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("vocab.json", '{"a": 0, "b": 2}', r"vocab\.json must give the pieces the ids 0, 1, 2"),
        ("vocab.json", '{"a": "0"}', r"vocab\.json must give the pieces the ids 0, 1, 2"),
        ("vocab.json", '{"a": 0}', r"vocab\.json lacks one of the tokens <pad>, <unk>, </s>"),
        ("source.spm", "no model", r"source\.spm is no SentencePiece model"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id = .*, which are no ids"),
    ],
)
def test_files_that_are_wrong(file: str, content: str, said: str, tmp_path: Path) -> None:
    directory(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(QkvError, match=said) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
