"""From dense to sparse: the new model computes what the old one did, is saved, learns, and is exported."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qkv.adapt import add_lora, quantise, upcycle
from qkv.checkpoints.export import save_pretrained
from qkv.checkpoints.weights import load_model, save_model
from qkv.errors import QkvError
from qkv.masks import Window
from qkv.models import EncoderDecoderModel, Module
from qkv.objectives import Balance, NextToken
from qkv.parts import BiasedTopK, Experts, Gated, Learned, NoisyTopK, PlainExperts, Router, TopK
from qkv.spec import edit
from tests.contracts.specs import ROOM, VOCAB, decoder, rough, shrunk
from tests.objectives.test_objectives import WORDS, batch, seeded

IDS = torch.randint(VOCAB, (3, 9), generator=seeded(1))
ROUTERS = [
    TopK(2), TopK(1, normalise=False), TopK(2, normalise=False), NoisyTopK(2), BiasedTopK(2, scale=2.5),
    BiasedTopK(3, normalise=False), BiasedTopK(1, score="softmax", normalise=False),
]  # fmt: skip


@torch.no_grad()
def scores(model: Module) -> Tensor:
    memory = model.encode(IDS.flip(1)) if isinstance(model, EncoderDecoderModel) else {}
    return model(IDS, **memory)


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2", "transformer-tiny", "bert-tiny"])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_it_computes_what_the_dense_model_does(name, router):
    dense = rough(shrunk(name)).float()
    made, before = upcycle(dense, count=4, router=router), scores(dense)
    assert (scores(made) - before).abs().max() <= 1e-6 * before.abs().max()
    kind = Experts if name == "smollm2-135m" else PlainExperts
    layers = [module for module in made.modules() if isinstance(getattr(module, "spec", None), kind)]
    assert len(layers) == (4 if name == "transformer-tiny" else 2)
    assert made.count() > dense.count() and not made.training


@pytest.mark.parametrize("router", [TopK(2), NoisyTopK(2), BiasedTopK(2)], ids=str)
def test_in_training_too_with_noise_and_dropped_nothing(router):
    dense = rough(decoder(at=Learned(ROOM))).train()
    torch.testing.assert_close(scores(upcycle(dense, count=4, router=router)), scores(dense), rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS[:2], ids=str)
def test_its_experts_part_company_as_they_learn(router):
    model = upcycle(rough(decoder(at=Learned(ROOM))).train(), count=4, router=router).float()
    objective = NextToken(auxiliary=(Balance(0.1),))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(5):
        loss = objective.loss(model, objective.example(batch(), WORDS, seeded()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    up = model.stack.layer(0).ffn.f.up
    assert losses[-1] < losses[0] and any(not torch.equal(up[0], other) for other in up[1:])


def test_only_the_layers_that_match():
    dense = rough(edit(decoder(at=Learned(ROOM)), "**.ffn.f", Gated(8))).bfloat16()
    made = upcycle(dense, "stack.1.ffn.f", count=3)
    assert [type(layer.branches["ffn"].f) for layer in made.spec.stack.layers] == [Gated, Experts, Gated]
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert made.stack.layer(0).ffn.f.up.weight is not dense.stack.layer(0).ffn.f.up.weight  # nothing is shared
    assert torch.equal(made.stack.layer(1).ffn.f.up[2], dense.stack.layer(1).ffn.f.up.weight)


def test_noise_makes_experts_differ_by_what_it_says():
    dense = rough(edit(decoder(at=Learned(ROOM)), "**.ffn.f", Gated(200)))
    made = upcycle(dense, count=4, noise=0.1)
    old, new = dense.stack.layer(0).ffn.f.up.weight, made.stack.layer(0).ffn.f.up
    assert not torch.equal(new[0], new[1])
    assert abs(float(((new - old).std() / old.std()).detach()) - 0.1) < 0.005


def test_a_checkpoint_of_it_is_a_checkpoint(tmp_path):
    made = upcycle(rough(decoder(at=Learned(ROOM))), count=4, router=BiasedTopK())
    save_model(made, tmp_path)
    again = load_model(tmp_path)
    assert again.spec == made.spec
    assert again.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in made.state_dict().items())
    torch.testing.assert_close(scores(again), scores(made))


@pytest.mark.parametrize("window", [None, 5])
def test_a_llama_becomes_a_mixtral_for_the_transformers_package(tmp_path, window):
    spec = edit(shrunk("mistral-7b"), "**.attn.f.mask", Window(window)) if window else shrunk("smollm2-135m")
    made = upcycle(rough(spec).float(), count=4, noise=0.1)
    save_pretrained(made, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert theirs.config.model_type == "mixtral" and theirs.config.num_local_experts == 4
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert (scores(made) - expected).abs().max() <= 1e-5 * expected.abs().max()


class Uneven(Router):
    """Gates whose sum depends on the token whatever the weights are."""

    kind, k = "uneven", 1

    def build(self, width, count):
        class Module(torch.nn.Module):
            def forward(self, x, context):
                routed = TopK(1).build(width, count).to(x)(x, context)
                object.__setattr__(routed, "gates", x[..., :1])
                return routed

        return Module()


@pytest.mark.parametrize(
    ("prepare", "given", "words"),
    [
        (lambda model: None, {"pattern": "**.attn.f"}, r"stack.0.attn.f is Attention\(4\): a feed-forward is expected"),
        (lambda model: None, {"pattern": "**.mlp.f"}, "no path of the spec matches"),
        (lambda model: add_lora(model, "a", rank=2, alpha=2, targets="**.q"), {}, "merge it into the weights"),
        (lambda model: quantise(model, "bf16"), {}, "the weights are packed"),
        (lambda model: None, {"router": Uneven()}, "sum to another number for each token"),
        (lambda model: None, {"router": TopK(5)}, "cannot go to 5 of 4 experts"),
    ],
)
def test_what_cannot_be_is_refused(prepare, given, words):
    model = rough(decoder(at=Learned(ROOM))).float()
    prepare(model)
    with pytest.raises(QkvError, match=words):
        upcycle(model, count=4, **given)


def test_gated_biases_have_no_place():
    model = rough(edit(decoder(at=Learned(ROOM)), "**.ffn.f", Gated(8, bias=True)))
    with pytest.raises(QkvError, match="or a gated one without biases"):
        upcycle(model, count=4)
