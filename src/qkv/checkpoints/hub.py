"""Models of the Hugging Face Hub: `hf:owner/name`, through huggingface_hub with its own cache, token and switches."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from qkv.errors import QkvError
from qkv.spec import nearest

FORM = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[^@\s]+\.gguf))?(@(?P<revision>\S+))?", re.ASCII)

# What a text model needs besides its weights; no code.
BESIDES = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.spm",
    "*.model",
    "chat_template.*",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]


@dataclass(frozen=True)
class Asked:
    """A name taken apart: `file` is the one .gguf file asked for, if any."""

    repo: str
    file: str | None
    revision: str | None


def is_name(name: str) -> bool:
    """Whether a name means a model of the Hub, rightly written or not."""
    return name.startswith("hf:")


def pull(name: str, say: Callable[[str], None]) -> Path:
    """The folder of `hf:owner/name[@revision]`, or the file of `hf:owner/name/file.gguf[@revision]`.

    Only what a text model needs is fetched, never code; what the Hub's cache holds is enough where there is no
    network. `say` is told the size and the model card's licence before the files are fetched. Raises QkvError for a
    bad name, a model that is not there or not open to the user, one without weights to read, and for no network.
    """
    asked = parse(name)
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HFValidationError, HTTPError
    except ImportError:
        raise QkvError('models of the Hub need huggingface_hub: pip install "qkv[hub]"') from None
    try:
        info = HfApi(library_name="qkv").model_info(asked.repo, revision=asked.revision, files_metadata=True)
    except HFValidationError:
        raise _misnamed(name) from None
    except (OSError, HTTPError) as fault:
        return _cached(asked, fault, say)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    files = wanted(asked, list(sizes))
    say(f"{name}: {len(files)} files, {sum(sizes[file] for file in files) / 1e6:.1f} MB; {_licence(info.card_data)}")
    patterns = [escape(file) for file in files]
    try:
        folder = snapshot_download(
            asked.repo, revision=asked.revision, allow_patterns=patterns, library_name="qkv", tqdm_class=_bar()
        )
    except KeyboardInterrupt:
        say(f"{name}: cut off; what came is kept and pulling again goes on from there")
        raise
    except (OSError, HTTPError) as fault:
        raise QkvError(_reason(asked, fault)) from None
    return _opened(asked, Path(folder), files, say)


def parse(name: str) -> Asked:
    """A name's parts; QkvError if it has another form."""
    match = FORM.fullmatch(name)
    if match is None:
        raise _misnamed(name)
    return Asked(match["repo"], match["file"], match["revision"])


def _bar() -> type:
    """The Hub's own progress bar, on a terminal alone."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": not sys.stderr.isatty()})

    return Bar


def _misnamed(name: str) -> QkvError:
    return QkvError(
        f"{name!r} names no model of the Hub; the form is hf:owner/name or, for one file, hf:owner/name/file.gguf, "
        "either followed by @revision if another than the newest is meant"
    )


def wanted(asked: Asked, files: list[str]) -> list[str]:
    """The files to fetch of those that the model has."""
    ggufs = [file for file in files if file.endswith(".gguf")]
    if asked.file is not None:
        if asked.file not in files:
            raise QkvError(f"{asked.repo} has no file {asked.file}{nearest(asked.file, ggufs)}")
        return [file for file in files if file == asked.file or _is_text_about(file)]
    weights = weights_of(files)
    if not weights and ggufs:
        raise QkvError(
            f"{asked.repo} holds GGUF files alone, of which one has to be named: "
            + ", ".join(f"hf:{asked.repo}/{file}" for file in ggufs)
        )
    if not weights:
        raise QkvError(f"{asked.repo} holds no weights that qkv reads: no safetensors, no pytorch_model.bin, no GGUF")
    return [file for file in files if file in weights or any(_matches(file, pattern) for pattern in BESIDES)]


def weights_of(files: list[str]) -> list[str]:
    """The files of the weights: safetensors, whole or in shards with their index; pickles only where there is none."""
    for end, stems in (
        (".safetensors", ("model", "packed", "adapter_model")),
        (".bin", ("pytorch_model", "adapter_model")),
    ):
        for stem in stems:
            if stem + end in files:
                return [stem + end]
            shards = [file for file in files if _matches(file, f"{stem}-*-of-*{end}")]
            if shards:
                return [*shards, *(file for file in files if file == f"{stem}{end}.index.json")]
    return []


def _matches(file: str, pattern: str) -> bool:
    """fnmatch, but a star does not reach into folders, where other frameworks' copies lie."""
    return file.count("/") == pattern.count("/") and fnmatch(file, pattern)


def _is_text_about(file: str) -> bool:
    return any(_matches(file, pattern) for pattern in ("README.md", "LICENSE*", "NOTICE*"))


def _cached(asked: Asked, fault: Exception, say: Callable[[str], None]) -> Path:
    """What the Hub's cache holds of it; the reason why that is asked, if it does not hold the whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    first = [escape(asked.file)] if asked.file else ["config.json", "adapter_config.json"]
    try:
        found = snapshot_download(
            asked.repo, revision=asked.revision, allow_patterns=first, local_files_only=True, library_name="qkv"
        )
    except LocalEntryNotFoundError:
        raise QkvError(_reason(asked, fault)) from None
    folder = Path(found)
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    weights = [asked.file] if asked.file in files else weights_of(files)
    shards = [int(match[1]) for match in (re.search(r"-of-(\d+)\.", file) for file in weights) if match]
    if not weights or any(count != len(shards) for count in shards):
        raise QkvError(_reason(asked, fault))
    return _opened(asked, folder, weights, say)


def _opened(asked: Asked, folder: Path, files: list[str], say: Callable[[str], None]) -> Path:
    if asked.file is not None:
        return folder / asked.file
    if any(file.endswith(".bin") for file in files):
        say(
            f"{asked.repo} has its weights as a pickle alone, which qkv does not open: `qkv convert --allow-pickle` "
            "reads one with torch's loader for weights, which runs no code, and writes safetensors"
        )
    return folder


def _licence(card: object) -> str:
    """The licence of a model card's metadata, with its own name where it is none of the Hub's list."""
    licence = getattr(card, "license", None)
    names = licence if isinstance(licence, list) else [licence]
    if names == ["other"]:
        names = [getattr(card, "license_name", None) or "other", getattr(card, "license_link", None)]
    told = ", ".join(str(name) for name in names if name)
    return f"licence: {told}" if told else "its model card names no licence"


def _reason(asked: Asked, fault: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(fault, errors.GatedRepoError):
        return f"{asked.repo} is gated: accept its terms on its page of the Hub, then set HF_TOKEN to a token of yours"
    if isinstance(fault, errors.RepositoryNotFoundError):
        return f"the Hub has no model {asked.repo}, or it is private and HF_TOKEN holds no token that may read it"
    if isinstance(fault, errors.RevisionNotFoundError):
        return f"{asked.repo} has no revision {asked.revision}"
    if constants.HF_HUB_OFFLINE:
        return f"{asked.repo} is not in the Hub's cache on this machine, and HF_HUB_OFFLINE forbids fetching it"
    said = str(fault).strip().splitlines()
    return (
        f"{asked.repo} could not be fetched from the Hub ({said[0] if said else type(fault).__name__}); what came "
        "before is kept, and with a network the same command goes on from there"
    )
