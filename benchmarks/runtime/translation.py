"""A Transformer as large as the base model of 2017, with random weights: 30 tokens out by a beam of 4."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from benchmarks.runtime import ours
from benchmarks.runtime.turns import Form, Measured, Ready, Settings, Work, in_process

VOCABULARY, SOURCE, OUT, BEAM = 32_000, 20, 30, 4
END, BLANK = 0, VOCABULARY
"""Marian's answers begin with a row of zeros after the vocabulary."""
Rows = list[list[int]]


def works(settings: Settings) -> Iterator[Work]:
    folder = settings.folder / "marian"
    in_process(make, folder)
    for batch, mark in ((1, "2.5 × CTranslate2"), (settings.size(32, 4), "1.5 × CTranslate2")):
        rows = sources(batch)
        forms = [
            *(Form(f"qkv {kind}", "qkv", qkv, (folder, kind, rows)) for kind in ("fp32", "bf16", "Q8_0")),
            *(Form(f"ctranslate2 {kind}", "ctranslate2", ctranslate2, (folder, kind, rows))
              for kind in ("int8", "float32")),
            *(Form(f"transformers {kind}", "transformers", transformers, (folder, kind, rows))
              for kind in ("fp32", "bf16")),
        ]  # fmt: skip
        name = f"Transformer base, {batch} × {SOURCE} tokens in, {OUT} out, beam {BEAM}"
        yield Work(name, forms, mark, alike, "transformers fp32")


def sources(batch: int) -> Rows:
    draw = np.random.default_rng(0)
    return [[*draw.integers(2, VOCABULARY, SOURCE - 1).tolist(), END] for _ in range(batch)]


def alike(answers: Rows, truth: Rows) -> str:
    """Random weights hardly prefer one token to another: answers part at the first rounding that tells."""
    same = [next((n for n, pair in enumerate(zip(*rows, strict=True)) if pair[0] != pair[1]), OUT)
            for rows in zip(answers, truth, strict=True)]  # fmt: skip
    return f"first {min(same)} to {max(same)} of {OUT} tokens as in fp32"


def timed(translate: Callable[[], Rows], batch: int) -> Ready:
    answers: Rows = []

    def measure() -> Measured:
        began = time.perf_counter()
        answers[:] = translate()
        seconds = time.perf_counter() - began
        if any(len(row) != OUT for row in answers):
            raise RuntimeError(f"answers of {sorted({len(row) for row in answers})} tokens, not of {OUT}")
        return {"tokens/s": batch * OUT / seconds}

    return Ready(measure, lambda: answers)


# --- the forms ---


def qkv(threads: int, folder: Path, kind: str, rows: Rows) -> Ready:
    """fp32, bf16, or 8 bits in blocks."""
    import torch

    from qkv.decode import Beam, decode
    from qkv.models import EncoderDecoderModel
    from qkv.train.run import load

    torch.set_num_threads(threads)
    model = load(folder / "model", "bf16" if kind == "bf16" else "fp32")
    assert isinstance(model, EncoderDecoderModel)
    ours.native(ours.packed(model, kind) if kind.startswith("Q") else model, threads)
    source = torch.tensor(rows)

    @torch.inference_mode()
    def translate() -> Rows:
        found = decode(
            model, [[BLANK]] * len(rows), Beam(BEAM), limits=[OUT] * len(rows), ends=None, memory=model.encode(source)
        )
        return [row[0].ids for row in found]

    return timed(translate, len(rows))


def transformers(threads: int, folder: Path, kind: str, rows: Rows) -> Ready:
    import torch
    from transformers import MarianMTModel

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    model, source = MarianMTModel.from_pretrained(folder / "model", dtype=dtype).eval(), torch.tensor(rows)

    @torch.inference_mode()
    def translate() -> Rows:
        made = model.generate(
            input_ids=source, attention_mask=torch.ones_like(source), num_beams=BEAM, do_sample=False,
            min_new_tokens=OUT, max_new_tokens=OUT,
        )  # fmt: skip
        return made[:, 1:].tolist()

    return timed(translate, len(rows))


def ctranslate2(threads: int, folder: Path, kind: str, rows: Rows) -> Ready:
    import ctranslate2 as ct

    if not (folder / "ctranslate2").exists():
        convert(folder)
    model = ct.Translator(
        str(folder / "ctranslate2"), device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1
    )
    source = [[word(token) for token in row] for row in rows]

    def translate() -> Rows:
        made = model.translate_batch(
            source, beam_size=BEAM, min_decoding_length=OUT, max_decoding_length=OUT, max_batch_size=len(rows)
        )
        return [[WORDS[one] for one in answer.hypotheses[0]] for answer in made]

    return timed(translate, len(rows))


# --- the model ---


def word(token: int) -> str:
    """A random model has no words: they are its numbers."""
    return "</s>" if token == END else "<unk>" if token == 1 else f"w{token}"


WORDS = {word(token): token for token in range(VOCABULARY)}


def make(folder: Path) -> None:
    """Weights at random, so that answers vary."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=VOCABULARY + 1, decoder_vocab_size=VOCABULARY + 1, d_model=512, encoder_layers=6, decoder_layers=6,
        encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
        activation_function="relu", max_position_embeddings=512, scale_embedding=True, static_position_embeddings=True,
        pad_token_id=BLANK, eos_token_id=END, decoder_start_token_id=BLANK, forced_eos_token_id=None,
        share_encoder_decoder_embeddings=True, tie_word_embeddings=True, normalize_before=False,
        normalize_embedding=False, architectures=["MarianMTModel"],
    )  # fmt: skip
    model = MarianMTModel(config).eval()
    with torch.no_grad():
        model.model.shared.weight[BLANK] = 0
        model.model.shared.weight *= 4  # with weights as drawn an answer is one token again and again
        for name, weight in model.named_parameters():
            if name.endswith(("fc1.weight", "fc2.weight")):
                weight *= 5
    model.generation_config.forced_eos_token_id = None
    model.save_pretrained(folder / "model")


def convert(folder: Path) -> None:
    """By CTranslate2's own loader of such models, with a vocabulary of numbers."""
    from ctranslate2.converters.transformers import MarianMTLoader
    from transformers import MarianMTModel

    spec = MarianMTLoader().get_model_spec(MarianMTModel.from_pretrained(folder / "model"))
    spec.register_source_vocabulary(list(WORDS))
    spec.register_target_vocabulary(list(WORDS))
    spec.config.bos_token = spec.config.eos_token = spec.config.decoder_start_token = word(END)
    spec.config.unk_token, spec.config.add_source_eos = word(1), False
    spec.validate()
    spec.optimize()
    (folder / "ctranslate2").mkdir()
    spec.save(str(folder / "ctranslate2"))
