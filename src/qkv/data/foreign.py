"""The files of a published tokenizer, which nobody has checked: read up to a bound, or one sentence about the fault."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkv.errors import QkvError

# What no sound file reaches. The longest known: tokenizer.json of 35 MB, other vocabularies of 5, the rest of 0.4.
LONGEST_JSON, LONGEST, LONGEST_CONFIG = 64_000_000, 16_000_000, 4_000_000


def read_bytes(path: Path, longest: int) -> bytes:
    if path.stat().st_size > longest:
        raise QkvError(f"{path} is {path.stat().st_size:,} bytes long, at most {longest:,} are read")
    return path.read_bytes()


def read_text(path: Path, longest: int = LONGEST) -> str:
    try:
        return read_bytes(path, longest).decode()
    except UnicodeDecodeError:
        raise QkvError(f"{path} is not UTF-8") from None


def read_object(path: Path, longest: int = LONGEST_CONFIG) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    text = read_text(path, longest)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise QkvError(f"{path} is no JSON ({fault})") from None
    if not isinstance(found, dict):
        raise QkvError(f"{path} holds no JSON object")
    return found


def ends_of(folder: Path) -> list[int]:
    ends = read_object(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int for i in ends):
        raise QkvError(f"generation_config.json says eos_token_id = {str(ends)[:80]}, which are no ids")
    return ends


def templates_of(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; the file of their own counts more than the key."""
    given = config.get("chat_template")
    if isinstance(given, list) and all(isinstance(each, dict) for each in given):
        named = {each.get("name"): each.get("template") for each in given}
    else:
        named = {} if given is None else {"default": given}
    if (folder / "chat_template.jinja").is_file():
        named["default"] = read_text(folder / "chat_template.jinja", LONGEST_CONFIG)
    if not all(isinstance(text, str) for text in [*named, *named.values()]):
        raise QkvError(f"{folder / 'tokenizer_config.json'}: chat_template is neither text nor a list of named texts")
    return {str(name): str(text) for name, text in named.items()}
