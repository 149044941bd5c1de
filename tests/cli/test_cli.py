"""The program as a user runs it: what it prints, where, and its exit status."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qkv.train import Run, Trainer
from qkv.zoo import PRESETS
from tests.train.small import RECIPE, small_run, write_data


def qkv(*arguments: object, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-c", "from qkv.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, input=stdin)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    made = small_run(folder, "train.steps=60", "train.evaluate_every=30")
    Trainer(made).train()
    return made.folder


def test_help_and_recipes_import_no_torch():
    for arguments in (["--help"], ["recipes"], ["recipes", "demo"], ["--version"]):
        code = f"import sys; sys.argv = ['qkv', *{arguments}]\nfrom qkv.cli import main\n"
        code += "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stderr.endswith("False\n") and done.stdout


def test_train_prints_the_run_and_resume_continues(tmp_path):
    write_data(tmp_path)
    (tmp_path / "small.toml").write_text(RECIPE)
    done = qkv("train", "small.toml", "--set", "data.max_tokens=40", "--set", "train.steps=4", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/small\n")
    assert "step 4" in done.stderr
    again = qkv("train", "small.toml", "--set", "data.max_tokens=40", cwd=tmp_path)
    assert again.returncode == 2 and "holds a run already" in again.stderr
    assert qkv("train", "--resume", "runs/small", cwd=tmp_path).returncode == 0


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path):
    write_data(tmp_path)
    (tmp_path / "small.toml").write_text(RECIPE)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    faults = {
        "model.**.heads=5": "5 heads do not divide",
        "train.device=abacus": "train.device='abacus' cannot be used here",
        "train.tokens_per_batch=30": "tokens_per_batch is 30, too few",
    }
    for out, (setting, words) in itertools.product(("new", "kept"), faults.items()):
        settings = ["--set", "data.max_tokens=40", "--set", setting]
        done = qkv("train", "small.toml", *settings, "--out", out, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr
    assert not (tmp_path / "new").exists() and [one.name for one in (tmp_path / "kept").iterdir()] == ["mine.txt"]


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(tmp_path):
    write_data(tmp_path, 2000)
    (tmp_path / "long.toml").write_text(RECIPE.replace("steps = 12", "steps = 100000"))
    command = [
        sys.executable,
        "-c",
        "from qkv.cli import main; main()",
        "train",
        "long.toml",
        "-s",
        "data.max_tokens=40",
    ]
    program = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "long" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    _, told = program.communicate()
    assert program.returncode == 130
    assert told.splitlines()[-1].endswith("and saved; go on with: qkv train --resume runs/long")
    assert "Traceback" not in told
    assert Run(tmp_path / "runs" / "long").last is not None


def test_predict_reads_a_text_a_file_and_standard_input(run, tmp_path):
    (tmp_path / "words.txt").write_text("abc\nde\n")
    from_file = qkv("predict", run, tmp_path / "words.txt")
    assert from_file.returncode == 0 and from_file.stderr == ""
    assert from_file.stdout.count("\n") == 2
    assert qkv("predict", run, "-", stdin="abc\nde\n").stdout == from_file.stdout
    assert qkv("predict", run, "abc").stdout == from_file.stdout.splitlines(keepends=True)[0]
    told = json.loads(qkv("predict", run, "abc", "--beam", 3, "--n-best", 2, "--json").stdout)
    assert told["source"] == "abc" and len(told["answers"]) == 2
    assert told["answers"][0]["score"] >= told["answers"][1]["score"]
    drawn = [qkv("predict", run, "abcde", "--temperature", 2, "--seed", seed).stdout for seed in (1, 1)]
    assert drawn[0] == drawn[1]


def test_evaluate_gives_scores_for_people_and_programs(run):
    done = qkv("evaluate", run, run.parent / "valid.tsv", "--json")
    scores = json.loads(done.stdout)
    assert {"loss", "perplexity", "word_error", "symbol_error", "seconds"} == set(scores)
    assert f"{scores['loss']:.3f}" in qkv("evaluate", run, run.parent / "valid.tsv").stdout


def test_look_draws(run, tmp_path):
    done = qkv("look", run, "abcd", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    files = ["encoder.png", "cross.png", "decoder.png", "curves.png", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert done.stdout.splitlines()[1:] == [str(tmp_path / name) for name in files]
    wrong = qkv("look", run, "abcd", "--layer", 7, "--out", tmp_path)
    assert wrong.returncode == 2 and "there is no layer 7: the model has layers 1 to 1" in wrong.stderr


def test_inspect_shows_runs_presets_and_recipes(run):
    assert "Attention(heads=4, bias=True, dropout=0.1)" in qkv("inspect", run).stdout
    told = json.loads(qkv("inspect", "gpt-tiny", "--vocab", 65, "--json").stdout)
    assert told["root"]["parameters"] == 4 * 197120 + 256 + 64 * 128 + 65 * 128
    assert "1 to 1" not in qkv("inspect", "speak").stdout
    assert "gpt2-medium            24 layers 1024 wide, 355 M parameters (Radford 2019)." in qkv("inspect").stdout
    assert json.loads(qkv("inspect", "--json").stdout).keys() == PRESETS.keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "speek"], "no recipe is called 'speek'; did you mean 'speak'"),
        (["train", "gone.toml"], "there is no recipe file gone.toml"),
        (["train"], "give either a recipe"),
        (["train", "translate"], "train.tsv does not exist"),
        (["predict", "gone", "x"], "'gone' is no file, no folder and no name to pull"),
        (["inspect", "gpt-tyni"], "is no run, recipe, preset, file or name to pull; did you mean 'gpt-tiny'"),
        (["pull", "cmudic"], "did you mean 'cmudict'"),
        (["recipes", "nothing"], "no recipe is called 'nothing'"),
        (["inspect", "gpt-tiny", "--length", "65"], "the model has 64 positions"),
        (["inspect", "gpt-tiny", "--length", "0"], "a sequence to inspect has at least 1 token, not 0"),
        (["inspect", "gpt-tiny", "--vocab", "-5"], "a vocabulary has at least 1 token, not -5"),
        (["inspect", "x" * 300], "is no run, recipe, preset, file or name to pull"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(tmp_path, arguments, words):
    done = qkv(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and done.stderr.startswith("qkv: ") and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_an_option_that_does_not_exist_and_a_traceback_on_demand(run):
    assert qkv("train", "--sett", "x").returncode == 2
    assert "Traceback" in qkv("--traceback", "predict", "gone", "x").stderr


def test_input_that_is_a_directory_and_a_beam_of_nothing(run, tmp_path):
    done = qkv("predict", run, tmp_path)
    assert done.returncode == 2 and "is a directory; a text, a file" in done.stderr
    done = qkv("predict", run, "abc", "--n-best", 2)
    assert done.returncode == 2 and "--n-best needs --beam" in done.stderr
    done = qkv("predict", run, "abc", "--beam", 2, "--length-penalty", 1000)
    assert done.returncode == 2 and "the length penalty lies between −10 and 10, not at 1000.0" in done.stderr
    (tmp_path / "run.json").write_text("{}")
    done = qkv("predict", tmp_path, "abc")
    assert done.returncode == 2 and "run.json does not say what a run is made of" in done.stderr
    done = qkv("predict", run, "abc", "--beam", 0)
    assert done.returncode == 2 and "a beam keeps at least 1 path, not 0" in done.stderr


def test_input_that_is_not_utf8(run, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9\n")
    done = qkv("predict", run, tmp_path / "latin.txt")
    assert done.returncode == 2 and "latin.txt is not UTF-8 (byte 3)" in done.stderr


def test_our_own_fault_is_status_1(monkeypatch, capsys):
    from qkv.cli import main as program

    def broken() -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("qkv.cli.program.app", broken)
    with pytest.raises(SystemExit) as left:
        program()
    assert left.value.code == 1
    assert "this is a defect of qkv: ZeroDivisionError: oh" in capsys.readouterr().err


PROGRAM = "from qkv.cli import main; main()"


def test_a_reader_that_leaves_is_no_error():
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, "inspect", "gpt-tiny"], stdout=-1, stderr=-1)
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 141


def test_ctrl_c_says_so_and_leaves_no_run_that_has_not_begun(tmp_path):
    (tmp_path / "input.txt").write_text("to be, or not to be\n" * 20000)
    command = [sys.executable, "-c", PROGRAM, "train", "write", "--set", "data.train=input.txt"]
    program = subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True)
    while not (tmp_path / "runs/write/run.json").exists():
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.001)
    program.send_signal(signal.SIGINT)
    _, told = program.communicate()
    assert program.returncode == 130
    begun = (tmp_path / "runs/write").exists()  # the signal may come when the first step is made, which is then saved
    assert ("go on with" in told) if begun else told.endswith("qkv: stopped\n")


def test_a_disk_that_is_full_is_not_our_defect(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM, "recipes"], stdout=full, stderr=-1, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "qkv: the output could not be written or read (No space left on device)\n",
    )
    (tmp_path / "file").write_text("to be\n" * 100)
    done = qkv("train", "write", "--set", "data.train=file.txt", "--out", "file/x", cwd=tmp_path)
    assert done.returncode == 2


def test_a_preset_is_told_from_a_checkpoint():
    done = qkv("generate", "gpt-tiny", "Once")
    assert done.returncode == 2 and "'gpt-tiny' is a preset, a model without weights: train it" in done.stderr
    assert qkv("generate", "model.gguf", "Once").stderr == "qkv: model.gguf does not exist\n"
