"""Run folders: made once, opened whole, refused when damaged."""

import json
import subprocess
import sys

import pytest

from qkv.errors import QkvError
from qkv.train import Run, Trainer, start
from qkv.train.run import discard
from tests.train.small import recipe, small_run


@pytest.fixture
def trained(tmp_path):
    run = small_run(tmp_path, "train.steps=4")
    Trainer(run).train()
    return run.folder


def test_a_run_opens_as_it_was(trained, tmp_path):
    opened = Run(trained)
    assert opened.recipe.train.steps == 4 and opened.base == tmp_path
    assert opened.recipe.model.source.vocab == opened.tokenizers.source.size
    assert opened.model().spec == opened.recipe.model
    assert not opened.model().training


def test_a_folder_without_a_run_or_with_one(trained, tmp_path):
    with pytest.raises(QkvError, match="is no run: it has no run.json"):
        Run(tmp_path)
    with pytest.raises(QkvError, match="holds a run already: `qkv train --resume"):
        small_run(tmp_path)


def cut(folder):
    path = next(folder.glob("step-*")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def lose_weights(folder):
    (next(folder.glob("step-*")) / "model.safetensors").unlink()


def lose_sizes(folder):
    (next(folder.glob("step-*")) / "sizes.json").unlink()


def lose_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def cut_run(folder):
    path = folder / "run.json"
    path.write_text(path.read_text()[:-20])


def other_weights(folder):
    checkpoint = next(folder.glob("step-*"))
    spec = json.loads((checkpoint / "spec.json").read_text())
    spec["source"]["vocab"] += 1
    (checkpoint / "spec.json").write_text(json.dumps(spec))
    sizes = json.loads((checkpoint / "sizes.json").read_text())
    sizes["spec.json"] = (checkpoint / "spec.json").stat().st_size
    (checkpoint / "sizes.json").write_text(json.dumps(sizes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, r"model.safetensors has [\d,]+ of [\d,]+ bytes: the run is incomplete, copy it again"),
        (lose_weights, r"model.safetensors is missing: the run is incomplete"),
        (lose_sizes, r"sizes.json does not exist: the folder is incomplete"),
        (lose_tokenizer, r"tokenizer.json does not exist"),
        (cut_run, r"run.json is not sound JSON"),
        (other_weights, r"'source.tokens.weight' has the shape \(10, 32\), the model's is \(11, 32\)"),
    ],
)
def test_a_half_copied_run_says_what_is_missing(trained, damage, words):
    damage(trained)
    with pytest.raises(QkvError, match=words):
        Run(trained).model()


def test_a_run_that_was_never_saved(tmp_path):
    with pytest.raises(QkvError, match="has no checkpoint yet"):
        small_run(tmp_path).model()


def test_a_line_that_a_crash_cut_off_is_left_out(trained):
    run, lines = Run(trained), Run(trained).metrics()
    with (trained / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "spl')
    assert run.metrics() == lines
    Trainer(run).train()
    assert run.metrics() == lines and (trained / "metrics.jsonl").read_text().endswith("}\n")


def test_resume_refuses_data_that_changed(trained, tmp_path):
    recipe(tmp_path)  # writes the data anew, the same
    Trainer(Run(trained))
    (tmp_path / "train.tsv").write_text("word\tback\na\tb\n", encoding="utf-8")
    with pytest.raises(QkvError, match="the training data has no batch"):
        Trainer(Run(trained))


def test_what_stands_in_a_folder_is_left_alone(tmp_path):
    made = recipe(tmp_path)
    for name in ("tokenizer.json", "metrics.jsonl", "tensorboard"):
        folder = tmp_path / name.split(".")[0]
        (folder / name).mkdir(parents=True)
        with pytest.raises(QkvError, match=f"holds {name} of something else"):
            start(made, folder, tmp_path)
        assert [one.name for one in folder.iterdir()] == [name]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    discard(start(made, tmp_path / "kept", tmp_path).folder)
    assert [one.name for one in (tmp_path / "kept").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(QkvError, match="cannot be made"):
            start(made, tmp_path / out, tmp_path)


def test_one_process_trains_a_run_at_a_time_and_tidies_up(trained):
    left = trained / ".step-00000099.123.part"
    left.mkdir()
    hold = "import sys; from pathlib import Path; from qkv.train import Run\n"
    hold += "with Run(Path(sys.argv[1])).claimed(): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", hold, trained], stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "held\n" and not left.exists()
        before = (trained / "metrics.jsonl").read_bytes()
        with pytest.raises(QkvError, match="another process trains"):
            Trainer(Run(trained)).train()
        assert (trained / "metrics.jsonl").read_bytes() == before
    finally:
        other.communicate("")
    Trainer(Run(trained)).train()


def test_a_run_that_was_killed_before_its_first_checkpoint_logs_nothing_twice(tmp_path):
    run = small_run(tmp_path, "train.save_every=100")
    run.log({"step": 2, "split": "train", "loss": 3.0})
    Trainer(run).train()
    steps = [line["step"] for line in run.metrics() if line["split"] == "train"]
    assert steps == [2, 4, 6, 8, 10, 12]
