"""The options that give a search its rules."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qkv.cli import main
from qkv.decode import Beam, Greedy, NoRepeat, RepetitionPenalty
from qkv.use import Chat, open_published
from tests.use import small
from tests.use.small import SENTENCES


@pytest.fixture
def qkv(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        monkeypatch.setattr(sys, "argv", ["qkv", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        sys.stdout.flush()
        return int(left.value.code or 0), *capfd.readouterr()

    return run


def test_generate_chat_and_predict_take_rules(qkv: Any, tmp_path: Path) -> None:
    small.llama(tmp_path, chat=True)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 3, "repetition_penalty": 1.2}))
    task, text = open_published(tmp_path), SENTENCES[0]
    rules = (NoRepeat(1), RepetitionPenalty(1.7))
    options = ["--tokens", 20, "--no-repeat", 1, "--repetition-penalty", 1.7]

    wanted = "".join(task.stream(task.encode(text), Greedy(rules=rules), tokens=20))
    assert qkv("generate", tmp_path, text, *options)[:2] == (0, wanted + "\n")
    assert wanted != "".join(task.stream(task.encode(text), tokens=20))
    assert len({*task.source.encode(wanted)}) > 5

    answer = "".join(Chat(task, search=Greedy(rules=rules)).say("Hi", tokens=20))
    assert qkv("chat", tmp_path, *options, stdin="Hi\n")[:2] == (0, answer + "\n")

    [[best, *_]] = task.predict([text], Beam(3, rules=rules), tokens=20)  # the checkpoint's own search
    assert qkv("predict", tmp_path, text, *options)[1] == best.text + "\n"
    [[best, *_]] = task.predict([text], Beam(2, rules=rules[:1]), tokens=20)
    assert qkv("predict", tmp_path, text, "--beam", 2, *options[:4])[1] == best.text + "\n"


@pytest.mark.parametrize("command", ["generate", "chat", "predict"])
def test_rules_that_cannot_be_are_refused_before_a_model_is_opened(qkv: Any, command: str) -> None:
    arguments = ["gone", "x"] if command != "chat" else ["gone"]
    for options, words in (
        (["--repetition-penalty", "0"], "a repetition penalty is above 0, and 1 does nothing; found 0.0"),
        (["--no-repeat", "-2"], "0 for none; found -2"),
    ):
        code, out, err = qkv(command, *arguments, *options)
        assert (code, out) == (2, "") and words in err
