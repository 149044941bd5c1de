"""Small checkpoints as others publish them: a folder with random weights and a tokenizer trained on English."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
import transformers as tf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.zoo.parity import rough

LINES = [line for name in sorted(topics)[:20] for line in topics[name].split("\n") if line.strip()][:400]
SENTENCES = ["The value of a name is looked up.", "If it is false, the loop ends", "x = y + 1", "Objects have a type!"]

WIDTHS: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 96,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@cache
def byte_pairs(frame: str = "$A", *more: str) -> str:
    """Pairs of bytes, as GPT-2, BART and Llama 3 have them: <s> 0, <pad> 1, </s> 2."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", *more]
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )  # fmt: skip
    return framed(made, frame, {"<s>": 0, "</s>": 2})


@cache
def word_pieces() -> str:
    """Pieces of words, as BERT has them: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return framed(made, "[CLS] $A [SEP]", {"[CLS]": 2, "[SEP]": 3}, "[CLS] $A [SEP] $B:1 [SEP]:1")


@cache
def unigrams() -> str:
    """Likeliest pieces, as T5 has them: <pad> 0, </s> 1, <unk> 2."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(
        LINES,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return framed(made, "$A </s>", {"</s>": 1}, "$A </s> $B </s>")


def framed(made: tokenizers.Tokenizer, single: str, special: Mapping[str, int], pair: str | None = None) -> str:
    used = [(token, i) for token, i in special.items() if token in single]
    if used:
        made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)
    return str(made.to_str())


def tokenizer(made: str, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(made), **special)


BYTES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def speaker(frame: str, chat: bool) -> PreTrainedTokenizerFast:
    """A decoder's; of one that chats each turn ends in <|end|>."""
    own = tokenizer(byte_pairs(frame, *(TURNS if chat else ())), **BYTES)
    if chat:
        own.chat_template, own.eos_token = CHAT, "<|end|>"
    return own


def sized(own: PreTrainedTokenizerFast, **sizes: Any) -> dict[str, Any]:
    return {"vocab_size": len(own), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": own.eos_token_id, **sizes}


def llama(folder: Path, *, chat: bool = False, **changes: Any) -> PreTrainedModel:
    """A decoder; its texts begin with <s>, and its positions turn, so that they have no bound."""
    own = speaker("<s> $A", chat)
    config = tf.LlamaConfig(**sized(own, **WIDTHS, num_key_value_heads=2) | changes)
    return written(folder, tf.LlamaForCausalLM(config), own)


def gpt2(folder: Path, *, chat: bool = False, room: int = 64) -> PreTrainedModel:
    """A decoder of few positions, whose texts begin with nothing."""
    own = speaker("$A", chat)
    config = tf.GPT2Config(**sized(own, n_embd=24, n_layer=2, n_head=4, n_positions=room))
    return written(folder, tf.GPT2LMHeadModel(config), own)


def mamba(folder: Path, *, chat: bool = False) -> PreTrainedModel:
    own = speaker("$A", chat)
    config = tf.MambaConfig(**sized(own, hidden_size=24, state_size=5, num_hidden_layers=2))
    return written(folder, tf.MambaForCausalLM(config), own)


def bert(folder: Path, head: str = "ForMaskedLM", **changes: Any) -> PreTrainedModel:
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    own = tokenizer(word_pieces(), **special)
    config = tf.BertConfig(vocab_size=len(own), **{**WIDTHS, **changes})
    return written(folder, getattr(tf, f"Bert{head}")(config), own)


def roberta(folder: Path, head: str) -> PreTrainedModel:
    """Two texts are one segment, with two tokens between them."""
    made = tokenizers.Tokenizer.from_str(byte_pairs("$A"))
    made.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    own = tokenizer(made.to_str(), **BYTES)
    config = tf.RobertaConfig(vocab_size=len(own), pad_token_id=1, type_vocab_size=1, **WIDTHS)
    return written(folder, getattr(tf, f"Roberta{head}")(config), own)


def t5(folder: Path, head: str = "ForConditionalGeneration", **changes: Any) -> PreTrainedModel:
    own = tokenizer(unigrams(), eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    sizes = {
        "vocab_size": len(own) + 7, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0, **changes,
    }  # fmt: skip
    return written(folder, getattr(tf, f"T5{head}")(tf.T5Config(**sizes)), own)


def bart(folder: Path, head: str = "ForConditionalGeneration", **changes: Any) -> PreTrainedModel:
    own = tokenizer(byte_pairs("<s> $A </s>"), **BYTES)
    sizes = {
        "vocab_size": len(own), "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
        "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": None, **changes,
    }  # fmt: skip
    return written(folder, getattr(tf, f"Bart{head}")(tf.BartConfig(**sizes)), own)


def written(folder: Path, model: PreTrainedModel, own: PreTrainedTokenizerFast) -> PreTrainedModel:
    model = rough(model)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return model
