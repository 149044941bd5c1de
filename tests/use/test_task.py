"""Texts in, texts out, for each of the three kinds of model."""

import pytest

from qkv.decode import Beam, Greedy
from qkv.errors import QkvError
from qkv.train import Run, Task, Trainer, load_recipe, start
from tests.train.small import small_run

TEXT = "the cat sat on the mat. the dog sat on the log. " * 40


def trained(folder, model, objective, tokenizer, steps, more=""):
    (folder / "text.txt").write_text(TEXT)
    (folder / "r.toml").write_text(
        f'[model]\npreset = "{model}"\n"**.depth" = 1\nwidth = 32\n{more}\n'
        f'[data]\ntrain = "text.txt"\ntext = "text"\ntokenizer = {tokenizer}\ncontext = 32\n'
        f'[objective]\nkind = "{objective}"\n[optimizer]\nkind = "adamw"\nlr = 1e-2\n'
        f"[train]\nsteps = {steps}\ntokens_per_batch = 256\n"
    )
    run = start(load_recipe(folder / "r.toml"), folder / "run", folder)
    Trainer(run).train()
    return Task(Run(run.folder).model(), run.tokenizers)


def test_a_decoder_continues(tmp_path):
    task = trained(tmp_path, "gpt-tiny", "next-token", '{ kind = "character" }', 60)
    answer = task.predict(["the cat sat on the "], Greedy(), tokens=4)[0][0]
    assert answer.text in ("mat.", "log.") and len(answer.ids) == 4
    both = task.predict(["the cat", "the dog sat on the log. the"], Greedy(), tokens=5)
    assert [row[0].ids for row in both] == [
        task.predict([text], Greedy(), tokens=5)[0][0].ids for text in ("the cat", "the dog sat on the log. the")
    ]
    with pytest.raises(QkvError, match="text 2 has 101 tokens and the model takes 64: shorten or split it"):
        task.predict(["a", "the " * 25], Greedy())


def test_an_encoder_fills(tmp_path):
    head = 'head = { kind = "head", tied = true, bias = true }'  # without BERT's last layer it learns faster
    task = trained(tmp_path, "bert-tiny", "masked", '{ kind = "word" }', 120, head)
    assert task.predict(["the cat <mask> on the mat."], Greedy())[0][0].text == "the cat sat on the mat."
    with pytest.raises(QkvError, match="there is no <mask> to fill in 'the cat'"):
        task.predict(["the cat"], Greedy())


def test_an_encoder_decoder_answers_in_order(tmp_path):
    run = small_run(tmp_path, "train.steps=30")
    Trainer(run).train()
    task = Task(Run(run.folder).model(), run.tokenizers)
    texts = ["abcde", "a", "bcd", "edcba", "ee"]
    many = task.predict(texts, Beam(size=3, n_best=2), batch=2)
    assert [[answer.ids for answer in row] for row in many] == [
        [answer.ids for answer in task.predict([text], Beam(size=3, n_best=2))[0]] for text in texts
    ]
    assert all(len(row) == 2 and row[0].score >= row[1].score for row in many)
