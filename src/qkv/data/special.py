"""Special tokens, as tokenizer_config.json and the files beside it name them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from qkv.data.foreign import read_object
from qkv.errors import QkvError

# The keys of tokenizer_config.json for a role, the first that is set counts; then how it is spelt where no key stands.
KEYS = {
    "pad": ("pad_token",), "unknown": ("unk_token",), "begin": ("bos_token", "cls_token"),
    "end": ("eos_token", "sep_token"), "mask": ("mask_token",),
}  # fmt: skip
USUAL = {
    "pad": ("<pad>", "[PAD]"), "unknown": ("<unk>", "[UNK]"), "begin": ("<s>", "[CLS]", "<bos>", "<|endoftext|>"),
    "end": ("</s>", "[SEP]", "<eos>", "<|endoftext|>"), "mask": ("<mask>", "[MASK]"),
}  # fmt: skip


def token_of(value: Any, key: str) -> AddedToken:
    """A token as a configuration spells it: a string, or a table with the string and how it is matched."""
    table = {"content": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("content"), str):
        raise QkvError(f"tokenizer_config.json: {key} is {str(value)[:80]!r}, a token is expected")
    flags = {name: table.get(name) is True for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(table["content"], special=table.get("special") is not False, **flags)


def add_tokens(library: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Tokens that stand beside the vocabulary get the ids that the files give them, and what they are matched as."""
    special = [key for keys in KEYS.values() for key in keys if config.get(key) is not None]
    named = [token_of(config[key], key) for key in special]
    more = config.get("additional_special_tokens")
    named += [token_of(value, "additional_special_tokens") for value in more] if isinstance(more, list) else []
    known = {token.content for token in named}
    placed = [
        (i, AddedToken(text, special=text in known)) for text, i in read_object(folder / "added_tokens.json").items()
    ]
    table = config.get("added_tokens_decoder")
    for key, value in table.items() if isinstance(table, dict) else ():
        placed.append((int(key) if key.isdecimal() else key, token_of(value, f"added_tokens_decoder.{key}")))
    already = set(added_to(library).values())
    for i, token in sorted(placed, key=lambda each: str(each[0]).zfill(20)):
        if token.content not in already:
            library.add_tokens([token])
        found = library.token_to_id(token.content)
        if found != i:
            raise QkvError(f"the added token {token.content!r} is said to have the id {i!r}, and it has {found}")
    # One that the vocabulary lacks has no id that a model could know.
    known = {token for token in known if library.token_to_id(token) is not None}
    library.add_special_tokens([token for token in named if token.content in known - set(added_to(library).values())])


def added_to(library: tokenizers.Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in library.get_added_tokens_decoder().items()}


def roles_of(library: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, int]:
    roles: dict[str, int] = {}
    for role, keys in KEYS.items():
        spelt = [token_of(config[key], key).content for key in keys if config.get(key) is not None]
        if not any(key in config for key in keys):
            spelt = list(USUAL[role])
        found = [i for text in spelt if (i := library.token_to_id(text)) is not None]
        if found:
            roles[role] = found[0]
    return roles
