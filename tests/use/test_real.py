"""Published weights, fetched as a user fetches them: the figures that others have found with them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qkv.checkpoints.load import load_directory
from qkv.checkpoints.pull import pull, resolve
from qkv.decode import Greedy, stream
from qkv.models import Module
from qkv.parts import Classifier
from qkv.use import Chat, Task, embed, open_published
from qkv.use.convert import convert
from tests.zoo.parity import relative

REACTION = "CC(=O)O.OCCBr.[Na+].[OH-]>>CC(=O)OCCBr"


def test_minilm_finds_what_sentences_share() -> None:
    """The example that the sentence-transformers package begins its manual with."""
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = embed(open_published(pull("all-minilm-l6-v2")), texts)
    found = [round(float(vectors[a] @ vectors[b]), 4) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found == [0.6660, 0.1046, 0.1411]
    assert vectors.shape == (3, 384) and torch.allclose(vectors.norm(dim=1), torch.ones(3))


# --- SmolLM2 ---


@pytest.fixture(scope="module")
def smol() -> Task:
    return open_published(resolve("smollm2-135m-instruct"))


def test_smollm2_knows_a_capital(smol: Task) -> None:
    chat = Chat(smol)
    first = "".join(chat.say("What is the capital of France?", tokens=40))
    assert "Paris" in first
    fed, hidden = [], smol.model.hidden
    smol.model.hidden = lambda ids, **given: (fed.append(ids.shape[1]), hidden(ids, **given))[1]
    try:
        second = "".join(chat.say("And which river flows through it?", tokens=40))
    finally:
        del smol.model.hidden
    assert second and fed[0] < 30  # the history is not read again
    assert [one["role"] for one in chat.messages] == ["user", "assistant"] * 2


@torch.inference_mode()
def test_smollm2_continues_as_in_transformers(smol: Task) -> None:
    """From the same dequantised weights, 64 tokens; transformers takes half a minute to read the file."""
    path = resolve("smollm2-135m-instruct")
    theirs = tf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # past the end too
    ids = smol.encode("The capital of France is")
    found = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    assert list(stream(smol.model, ids, Greedy(), limit=64)) == found
    assert relative(smol.model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits) < 1e-4


# --- reactions ---


def reaction_ids(folder: Path) -> torch.Tensor:
    """Atoms and bonds as the models read them."""
    known = {token: i for i, token in enumerate((folder / "vocab.txt").read_text().splitlines())}
    pieces = re.findall(r"\[[^\]]+\]|Br|Cl|>>|.", REACTION)
    return torch.tensor([[known["[CLS]"], *(known[piece] for piece in pieces), known["[SEP]"]]])


def both(name: str, folder: Path, theirs: Any) -> tuple[Module, Any]:
    """The converted model, and transformers' of the same pickle."""
    source = pull("rxn-" + name.partition("/")[0]) / name.partition("/")[2]
    convert(source, folder, allow_pickle=True)
    config = theirs.config_class.from_dict(json.loads((source / "config.json").read_text()))
    model = theirs(config).eval()
    weights = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    left = model.load_state_dict(weights, strict=False)
    assert all(key.endswith(("position_ids", "pooler.weight", "pooler.bias")) for key in left.unexpected_keys)
    assert not [key for key in left.missing_keys if not key.endswith(("position_ids", "token_type_ids"))]
    return load_directory(folder), model


@torch.inference_mode()
def test_a_pickled_albert_is_converted(tmp_path: Path) -> None:
    ours, theirs = both("albert", tmp_path / "new", tf.AlbertForMaskedLM)
    ids = reaction_ids(pull("rxn-albert"))
    assert relative(ours(ids), theirs(ids).logits) < 1e-5
    masked = ids.clone()
    masked[0, 3] = (pull("rxn-albert") / "vocab.txt").read_text().splitlines().index("[MASK]")
    assert relative(ours(masked), theirs(masked).logits) < 1e-5


@torch.inference_mode()
def test_a_pickled_bert_tells_50_kinds_of_reaction(tmp_path: Path) -> None:
    ours, theirs = both("bert/bert_ft_10k_25s", tmp_path / "new", tf.BertForSequenceClassification)
    assert isinstance(ours.spec.head, Classifier) and len(ours.spec.head.labels) == 50
    ids = reaction_ids(pull("rxn-bert") / "bert_ft_10k_25s")
    found = ours(ids)
    assert found.shape == (1, 50) and relative(found, theirs(ids).logits) < 1e-5
