"""A conversation: what the model reads, what is computed again, and what is remembered."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qkv.decode import Sample
from qkv.errors import QkvError
from qkv.use import Chat, Task, open_published
from tests.use import small

TOLD = ["What is a name?", "And a value?", "Who looks them up?", "Why?"]


@pytest.fixture(params=["llama", "gpt2", "mamba"])
def folder(request, tmp_path) -> Path:
    getattr(small, request.param)(tmp_path, chat=True, **({"room": 500} if request.param == "gpt2" else {}))
    return tmp_path


def watch(chat: Chat) -> tuple[list[list[int]], list[int]]:
    """The texts that the session holds from now on, one for each step, and the tokens that the model is fed."""
    texts, inner, hidden = [], chat.session.fed, chat.task.model.hidden
    fed: list[int] = []

    def read(ids):
        texts.append([*chat.session.ids, *ids])
        return inner(ids)

    def counted(ids, **given):
        fed.append(ids.shape[1])
        return hidden(ids, **given)

    chat.session.fed, chat.task.model.hidden = read, counted
    return texts, fed


def alone(task: Task, ids: list[int], tokens: int) -> str:
    return "".join(task.stream(ids, tokens=tokens))


def test_the_history_stands_in_the_template_and_answers_are_those_of_a_fresh_run(folder):
    own = AutoTokenizer.from_pretrained(folder)
    chat, other = Chat(open_published(folder), "Be short."), open_published(folder)
    texts, fed = watch(chat)
    messages = [{"role": "system", "content": "Be short."}]
    for told in TOLD:
        texts.clear(), fed.clear()
        answer = "".join(chat.say(told, tokens=15))
        messages.append({"role": "user", "content": told})
        read = own.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert texts[0] == read
        assert answer == alone(other, read, 15)
        messages.append({"role": "assistant", "content": answer})
        assert chat.messages == messages


def test_only_what_is_new_is_computed(tmp_path):
    small.llama(tmp_path, chat=True)
    chat = Chat(open_published(tmp_path))
    texts, fed = watch(chat)
    known, start = list[int](), 0
    for told in TOLD:
        texts.clear(), fed.clear()
        "".join(chat.say(told, tokens=15))
        read = texts[0]
        same = next((n for n, (a, b) in enumerate(zip(known, read, strict=False)) if a != b), len(known))
        assert fed[0] == len(read) - same and fed[1:] == [1] * (len(texts) - 1)
        assert same >= start
        start, known = len(read), texts[-1]  # an answer may be cut into other tokens when it is read again


def test_an_answer_that_is_stopped_does_not_join_the_history(folder):
    chat, other = (Chat(open_published(folder), search=Sample(seed=1)) for _ in range(2))
    chat.task.target.ends = other.task.target.ends = frozenset()
    "".join(chat.say(TOLD[0], tokens=9)), "".join(other.say(TOLD[0], tokens=9))
    before = list(chat.messages)
    said = chat.say("Tell me all.", tokens=30)
    next(said), next(said)
    said.close()
    assert chat.messages == before and len(before) == 2
    assert "".join(chat.say(TOLD[1], tokens=9)) == "".join(other.say(TOLD[1], tokens=9))
    assert chat.messages == other.messages


def test_an_answer_ends_before_a_stop_string_and_at_an_end_token(tmp_path):
    small.llama(tmp_path, chat=True)
    task = open_published(tmp_path)
    whole = "".join(Chat(task).say(TOLD[0], tokens=20))
    assert "".join(Chat(task).say(TOLD[0], tokens=20, stop=[whole[5:8]])) == whole[: whole.index(whole[5:8])]
    ids = []
    inner = task.target.stream

    def stream():
        made = inner()
        push = made.push
        made.push = lambda i: (ids.append(i), push(i))[1]
        return made

    task.target.stream = stream
    "".join(Chat(task).say(TOLD[0], tokens=20))
    assert len(ids) == 20
    task.target.stream, task.target.ends = inner, frozenset({ids[6]})
    early = "".join(Chat(task).say(TOLD[0], tokens=20))
    assert whole.startswith(early) and early == task.target.decode(ids[: ids.index(ids[6])])


def test_a_seed_makes_an_answer_again(tmp_path):
    small.llama(tmp_path, chat=True)
    task = open_published(tmp_path)

    def said(search: int, row: int) -> str:
        return "".join(Chat(task, search=Sample(seed=search)).say(TOLD[0], tokens=12, seed=row))

    assert said(1, 0) == said(1, 0) and len({said(1, 0), said(2, 0), said(1, 1)}) == 3


def test_a_conversation_that_is_too_long_says_so_and_goes_on_with_less(tmp_path):
    small.gpt2(tmp_path, chat=True, room=60)
    chat = Chat(open_published(tmp_path))
    first = "".join(chat.say("Hi", tokens=10))
    with pytest.raises(QkvError, match=r"the conversation has \d\d\d tokens and the model takes 60: begin a new one"):
        "".join(chat.say("name " * 60))
    assert [one["content"] for one in chat.messages] == ["Hi", first]
    read = len(chat.task.target.parse(chat.template.render([*chat.messages, {"role": "user", "content": "Why?"}])))
    chat.task.target.ends = frozenset()
    texts, _ = watch(chat)
    "".join(chat.say("Why?"))
    assert len(texts[0]) == read and len(texts[-1]) == 60  # to the last position
    with pytest.raises(QkvError, match="begin a new one"):
        "".join(chat.say("Why?"))


def test_what_cannot_chat_says_so(tmp_path):
    small.llama(tmp_path / "plain")
    with pytest.raises(
        QkvError, match=r"no chat template 'default' came with the tokenizer \(none did\): a chat model"
    ):
        Chat(open_published(tmp_path / "plain"))
    small.llama(tmp_path / "strict", chat=True)
    config = json.loads((tmp_path / "strict" / "tokenizer_config.json").read_text())
    (tmp_path / "strict" / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    assert "eos_token" in config
    chat = Chat(open_published(tmp_path / "strict"), "Be short.")
    with pytest.raises(QkvError, match="no system"):
        "".join(chat.say("x"))
    assert len(chat.messages) == 1


def test_a_long_conversation_outgrows_its_room(tmp_path, monkeypatch):
    monkeypatch.setattr("qkv.use.chat.RESERVED", 16)
    small.llama(tmp_path, chat=True)
    chat, other = Chat(open_published(tmp_path)), open_published(tmp_path)
    with torch.inference_mode():
        for told in TOLD:
            read = other.ids(chat.template.render([*chat.messages, {"role": "user", "content": told}]), parse=True)
            assert "".join(chat.say(told, tokens=9)) == alone(other, read, 9)
    assert chat.session.room > 100
