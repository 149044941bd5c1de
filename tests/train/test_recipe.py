"""Recipes: every shipped one loads, every field can be set, every fault is one sentence that names its place."""

import pytest

from qkv.data import Word
from qkv.errors import QkvError, SpecError
from qkv.models import EncoderDecoder, Sequence
from qkv.parts import RMSNorm
from qkv.recipes import find, shipped
from qkv.spec import dump, load
from qkv.train import Recipe, load_recipe, start
from qkv.train.recipe import fitted
from tests.train.small import RECIPE, recipe, small_run, write_data


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_loads_and_survives_dumping(name):
    loaded = load_recipe(find(name))
    assert load(dump(loaded), Recipe) == loaded
    fitted(loaded.model, 50, 60).build()


def test_any_field_can_be_set(tmp_path):
    changed = recipe(
        tmp_path,
        "optimizer.lr=3e-4",
        "train.precision=bf16",
        "model.encoder.depth=3",
        'model.**.post={kind="rmsnorm"}',
        "data.train=other.tsv",
        "train.minutes=1",
    )
    assert (changed.optimizer.lr, changed.train.precision, changed.train.minutes) == (3e-4, "bf16", 1.0)
    assert isinstance(changed.model, EncoderDecoder) and changed.model.encoder.depth == 3
    assert changed.model.encoder.layers[0].branches["attn"].post == RMSNorm()
    assert changed.data.train == "other.tsv"


def test_a_preset_can_be_exchanged(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[model]\npreset = "gpt-tiny"\n[data]\ntrain = "a.txt"\ntext = "text"\n'
                    '[objective]\nkind = "next-token"\n[train]\nsteps = 3\n')  # fmt: skip
    assert load_recipe(path, ["model.preset=gpt-small"]).model.stack.depth == 6
    whole = load_recipe(path)
    assert isinstance(whole.model, Sequence)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("clip = 1", "clip = 1"), None),
        (("steps = 12", "stepz = 12"), r"r.toml.train: unknown key 'stepz'; did you mean 'steps'"),
        (("steps = 12", 'steps = "12"'), r"r.toml.train.steps: expected a whole number, found '12'"),
        (("steps = 12", "steps = 0"), r"r.toml.train: steps, .* at least 1"),
        (("steps = 12\n", ""), r"r.toml.train: the key 'steps' is missing"),
        (("lr = 5e-3", "lr = -1.0"), r"r.toml.optimizer: the lr of adamw is a number above 0, not -1.0"),
        (('"adamw"', '"adam"'), r"optimizer.kind: unknown kind 'adam'; did you mean 'adamw'"),
        (('"cosine"', '"cosin"'), r"optimizer.schedule.kind: unknown kind 'cosin'; did you mean 'cosine'"),
        (("[objective]", "[objetive]"), r"unknown key 'objetive'; did you mean 'objective'"),
        (('kind = "seq2seq"', 'kind = "masked"'), r"label_smoothing"),
        (("label_smoothing = 0.1", 'kind = "next-token"'), r"is not sound TOML"),
        (("transformer-tiny", "transformer-tini"), r"no preset is called 'transformer-tini'; did you mean"),
        (('preset = "transformer-tiny"', ""), r"r.toml.model: a 'kind' is needed here"),
        (('"**.depth"', '"**.dept"'), r"no path of the spec matches '\*\*.dept'"),
        (("[model]", "[model"), r"is not sound TOML"),
        (('target = "back"', ""), r"r.toml.data: name the columns"),
        (('"error-rate"', '"loss"'), None),
    ],
)
def test_faults_of_a_recipe(tmp_path, change, words):
    before, after = change
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.replace(before, after, 1))
    if words is None:
        load_recipe(path)
        return
    with pytest.raises(QkvError, match=words) as fault:
        load_recipe(path)
    assert "\n" not in str(fault.value)


def test_faults_of_settings(tmp_path):
    with pytest.raises(QkvError, match="--set takes path=value"):
        recipe(tmp_path, "train.steps")
    with pytest.raises(QkvError, match="no path of the spec matches 'train.step'"):
        recipe(tmp_path, "train.step=3")
    with pytest.raises(QkvError, match="expected a whole number, found 'many'"):
        recipe(tmp_path, "train.steps=many")
    for setting, words in {
        "train.clip=-1.0": "clip and minutes are not negative",
        "train.patience=0": "the patience of train",
        "train.seed=-1": "the seed is a whole number from 0 up",
        "objective.label_smoothing=10": "label_smoothing is a share",
        "optimizer.schedule.warmup=-5": "a warm-up takes 0 steps or more",
        "model.**.hidden=-1": "the hidden of feedforward is a number above 0",
        "model.width=0": "the width of encoder-decoder is a number above 0",
    }.items():
        with pytest.raises(QkvError, match=words):
            recipe(tmp_path, setting)
    with pytest.raises(QkvError, match="seq2seq needs an encoder-decoder"):
        recipe(tmp_path, 'model={kind="sequence", width=8, embed={kind="tokens"}, stack={kind="stack", depth=1, '
                         'pattern={kind="block", ffn={kind="branch", f={kind="feedforward", hidden=4}}}}}')  # fmt: skip
    with pytest.raises(QkvError, match="set data.target_tokenizer and model.target together"):
        recipe(tmp_path, 'data.target_tokenizer={kind="character"}')
    with pytest.raises(QkvError, match=r"there is no recipe file .*gone.toml"):
        find(str(tmp_path / "gone.toml"))
    with pytest.raises(QkvError, match="no recipe is called 'translat'; did you mean 'translate'"):
        find("translat")


def test_heads_that_do_not_divide_the_width_are_named(tmp_path):
    run = small_run(tmp_path, "model.**.heads=5")
    with pytest.raises(QkvError, match="5 heads do not divide the width 32; change heads or give a head_width"):
        run.recipe.model.build()


def test_a_tokenizer_that_does_not_fit_the_model(tmp_path):
    with pytest.raises(QkvError, match=r"the tokenizer has 10 tokens and model.source.vocab is 9"):
        small_run(tmp_path, "model.source.vocab=9")
    assert small_run(tmp_path, "model.source.vocab=64").recipe.model.source.vocab == 64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "train.tsv does not exist"),
        (b"", "train.tsv is empty"),
        (b"word\tback\n\xff\tb\n", r"train.tsv line 2: byte 1 \(0xff\) is not UTF-8"),
        (b"word\tback\na\tb\tc\n", r"train.tsv line 2"),
        (b"word\tother\na\tb\n", r"'back'"),
        (b"word\tback\n" + b"a" * 50 + b"\tb\n", "none of the 1 training examples has at most max_tokens = 40"),
    ],
)
def test_bad_data_is_one_sentence(tmp_path, content, words):
    from qkv.train import Trainer

    made = recipe(tmp_path)
    (tmp_path / "train.tsv").unlink()
    if content is not None:
        (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(QkvError, match=words) as fault:
        Trainer(start(made, tmp_path / "run", tmp_path)).train()
    assert "\n" not in str(fault.value)
    write_data(tmp_path)


def test_examples_longer_than_the_model_takes_are_refused_at_the_start(tmp_path):
    from qkv.train import Trainer

    learned = 'model.source.position={kind="learned", size=12}'
    with pytest.raises(QkvError, match=r"data.max_tokens is 40 and the model has 12 positions"):
        Trainer(small_run(tmp_path, learned, name="a"))
    settings = (learned, "data.max_tokens=12")
    Trainer(small_run(tmp_path, *settings, name="b"))
    with (tmp_path / "valid.tsv").open("a") as file:
        file.write("a" * 20 + "\tb\n")
    with pytest.raises(QkvError, match=r"valid.tsv has an example of 21 tokens and the model 12 positions"):
        Trainer(start(recipe_of(tmp_path, *settings), tmp_path / "c", tmp_path))


def recipe_of(folder, *settings):
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return load_recipe(folder / "recipe.toml", settings)


def test_changes_that_only_fit_together_are_made_together(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    both = ['data.target_tokenizer={kind="character"}', 'model.target={kind="tokens"}']
    assert load_recipe(path, both) == load_recipe(path, both[::-1])
    with pytest.raises(SpecError, match="set data.target_tokenizer and model.target together"):
        load_recipe(path, both[:1])
    assert load_recipe(find("write"), ["model.preset=bert-tiny", "objective=masked"]).objective.kind == "masked"


def test_a_kind_may_be_set_by_itself_and_a_mistake_names_what_was_typed(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.encode())
    assert load_recipe(path, ["data.tokenizer.kind=word"]).data.tokenizer == Word()
    with pytest.raises(SpecError, match=r"^optimizer\.lr: expected a number, found 'fast'"):
        load_recipe(path, ["optimizer.lr=fast"])
    with pytest.raises(SpecError, match=r"^optimizer\.lr: the lr of adamw is a number above 0"):
        load_recipe(path, ["optimizer.lr=-1.0"])
