"""The demo from start to end, on a small dictionary."""

import io

from qkv.cli import demo
from qkv.train import Run

SPELT = {"a": "AE", "e": "EH", "i": "IH", "o": "AA", "b": "B", "d": "D", "k": "K", "n": "N", "s": "S", "t": "T"}


def small_dictionary(folder):
    words = {a + b + c + d for a in "bdknst" for b in "aeio" for c in "bdknst" for d in "aeio"}
    lines = [f"{word} {' '.join(SPELT[letter] for letter in word)}\n" for word in sorted(words)]
    (folder / "cmudict.dict").write_text("".join(lines))
    return folder


def test_the_demo_trains_scores_speaks_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr("qkv.checkpoints.pull.pull", lambda name: small_dictionary(tmp_path))
    out = io.StringIO()
    settings = ["train.steps=4", "train.evaluate_every=2", "model.width=16", "train.tokens_per_batch=512"]
    for _ in range(2):  # a second demo takes the place of the first
        demo.run(tmp_path / "demo", settings, out)
    told = out.getvalue()
    assert "wholly right" in told and all(name in told for name in demo.NAMES)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert all(f"{word} →" in page for word in demo.SHOWN)
    assert Run(tmp_path / "demo" / "run").recipe.train.steps == 4


def test_the_names_are_in_no_dictionary():
    """The real one, fetched as the demo fetches it."""
    from qkv.checkpoints.pull import pull

    known = {line.split()[0] for line in (pull("cmudict") / "cmudict.dict").read_text(encoding="utf-8").splitlines()}
    assert known.isdisjoint(demo.NAMES) and known > set(demo.SHOWN)
