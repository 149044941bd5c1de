"""From one form of a model to another."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qkv.adapt.quantise import check_kind, quantise
from qkv.checkpoints.directory import CONFIG, read_table
from qkv.checkpoints.export import Saves, save_packed, save_pretrained
from qkv.checkpoints.gguf import is_gguf
from qkv.checkpoints.gguf_export import save_gguf
from qkv.checkpoints.load import Source, load_published
from qkv.checkpoints.names import shown
from qkv.checkpoints.opening import opened
from qkv.checkpoints.pickled import Pickled
from qkv.checkpoints.weights import save_model
from qkv.checkpoints.whole import refuse_filled, whole_folder, write_text
from qkv.errors import QkvError
from qkv.models import Module
from qkv.ops.blocks.packed import Packed
from qkv.use.fidelity import compared, read
from qkv.use.published import bare, task_of, tokenizer_of
from qkv.use.task import Task

FILES = (".bin", ".pt", ".pth", ".safetensors", ".json", ".onnx", ".ggml")
"""Suffixes of files that are not written."""


def convert(
    source: Path, target: Path, *, kind: str = "F16", dtype: torch.dtype | None = None, bits: str | None = None,
    allow_pickle: bool = False, settings: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Write a published checkpoint as a directory, or as a GGUF file with matrices of type `kind` → what it did.

    `bits` quantises the weights of a directory, to "int8" say, for qkv alone. `settings` are `key=value` for keys
    that its config.json lacks. `allow_pickle` reads the weights of a .bin file.
    """
    refuse(target, bits)
    packed = bits is not None and is_gguf(source)  # what has as few bits already is not rounded again
    checkpoint: Source = (
        Pickled(source) if allow_pickle and not is_safe(source) else opened(source, dtype, packed=packed)
    )
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise QkvError(f"--set takes a key of config.json and its value, such as model_type=bert, not {setting!r}")
        if key in checkpoint.config:
            raise QkvError(
                f"{checkpoint.path} says {key} = {checkpoint.config[key]!r} itself; --set adds what it lacks"
            )
        checkpoint.config[key] = plain(value)
    model = load_published(checkpoint, dtype)
    if is_gguf(target):
        done = save_gguf(model, target, type=kind)
        said = [f"{target}: " + ", ".join(f"{count} tensors of type {name}" for name, count in done.types.items())]
        if done.instead:
            names = Counter(done.instead.values())
            said.append(
                "  their rows are no multiple of a block: " + ", ".join(f"{n} are {t}" for t, n in names.items())
            )
        if not done.tokenizer:
            said.append(f"  the file has no tokenizer: {done.lack or 'there is none beside the weights'}")
        return said
    none = bare(checkpoint)
    tokenizer = None if none or checkpoint.path.is_dir() else tokenizer_of(checkpoint)
    if bits is not None:
        return quantised(
            model, target, bits, tokenizer, lambda: task_of(checkpoint, tokenizer or tokenizer_of(checkpoint), model)
        )
    save_pretrained(model, target, tokenizer)
    return [told(model, target), *(["  it has no tokenizer, as the file has none"] if none else [])]


def convert_trained(task: Task, target: Path, *, kind: str = "F16", bits: str | None = None) -> list[str]:
    """The same for a model that qkv trained; a directory of one that no published family describes is in qkv's form."""
    refuse(target, bits)
    if bits is not None:
        return quantised(task.model, target, bits, task.tokenizers, lambda: task)
    if is_gguf(target):
        with TemporaryDirectory() as folder:
            published = Path(folder) / target.stem
            save_pretrained(task.model, published, Beside(task))
            return convert(published, target, kind=kind)
    refuse_filled(target)
    try:
        save_pretrained(task.model, target, Beside(task))
        return [told(task.model, target)]
    except QkvError as fault:
        with whole_folder(target) as part:
            save_model(task.model, part)
            task.tokenizers.save(part)
        return [f"{told(task.model, target)}, in qkv's own form", f"  {fault}"]


def quantised(model: Module, target: Path, bits: str, tokenizer: Saves | None, opened: Callable[[], Task]) -> list[str]:
    """Write a directory of packed weights → what it is, and how far the model is from what it was."""
    refuse_filled(target)
    try:
        task = opened()
        before = read(task)
    except QkvError as fault:
        task, told = None, f"the error was not measured: {fault}"
    done = quantise(model, bits)
    kinds = Counter(weight.format for weight in model.parameters() if isinstance(weight, Packed))
    if not kinds:
        raise QkvError(f"{target} would hold nothing packed: no row of the model's weights is a multiple of 32 long")
    save_packed(model, target, tokenizer)
    if task is not None:
        told = compared(task, before, read(task, before.texts))
    made = ", ".join(f"{count} in {name}" for name, count in kinds.most_common())
    size, old = (f"{n / 1e6:,.1f} MB" for n in (done.after, done.before))
    said = [
        f"{target}: {model.count():,} parameters in {size}, before in {old}",
        f"  matrices: {made}; only qkv loads them, and `qkv convert {target} NEW` writes plain ones",
        f"  {told}",
    ]
    if done.unfit:
        said.append(f"  as they were, with rows that are no multiple of 32: {shown(list(done.unfit))}")
    return said


class Beside:
    """What stands beside published weights: the tokenizer, and what begins an answer to a text."""

    def __init__(self, task: Task) -> None:
        if not task.tokenizers.joint:
            raise QkvError(
                "no published family has such a tokenizer for each side, so other tools cannot load the model"
            )
        before, after = task.frame
        self.tokenizer = task.source.framed(bool(before), bool(after))
        forced = {"forced_bos_token_id": None, "forced_eos_token_id": None}  # whatever the family's preset says
        self.start = {"decoder_start_token_id": task.begin[0], **forced} if task.pairs else {}

    def save(self, path: Path) -> None:
        self.tokenizer.save(path)
        file = path / "generation_config.json"
        write_text(file, json.dumps(read_table(file) | self.start, indent=2))


def refuse(target: Path, bits: str | None = None) -> None:
    """Refuse a path that is of neither kind, or taken, and bits that there are not."""
    if bits is not None:
        check_kind(bits)
        if is_gguf(target):
            raise QkvError(f"{target}: --quantize writes a directory for qkv; for a .gguf file there is --type Q4_1")
    if target.suffix in FILES:
        raise QkvError(f"{target} is neither a directory, which has no such suffix, nor a file that ends in .gguf")
    if target.exists() and (is_gguf(target) or not target.is_dir()):
        raise QkvError(f"{target} exists: name a new one")


def told(model: Module, target: Path) -> str:
    return f"{target}: {model.count():,} parameters, {str(next(model.parameters()).dtype).removeprefix('torch.')}"


def is_safe(path: Path) -> bool:
    """Whether there is something other than a pickle to read."""
    return not path.is_dir() or any(path.glob("*.safetensors")) or not (path / CONFIG).is_file()


def plain(text: str) -> object:
    """A JSON value; anything that is none is taken as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
