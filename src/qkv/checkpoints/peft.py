"""The directory of a LoRA as the peft package writes it: adapter_config.json and adapter_model.safetensors."""

import dataclasses as dc
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from qkv.checkpoints.directory import read_table
from qkv.checkpoints.weights import load_tensors, save_tensors
from qkv.checkpoints.whole import refuse_filled, whole_folder
from qkv.errors import QkvError
from qkv.zoo.config import Config

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEY = re.compile(r"base_model\.model\.(?P<module>.{1,200})\.lora_(?P<matrix>[AB])(?:\.[^.]+)?\.weight")
V = TypeVar("V", int, float)


@dc.dataclass(frozen=True)
class Factors:
    """A (r C) and B (O r) of one matrix of a published model, which is applied as W + s B A (W: O C)."""

    A: Tensor
    B: Tensor
    alpha: float


@dc.dataclass(frozen=True)
class Adapter:
    """A LoRA by the paths of modules in the transformers package's model; s = α / r, or α / √r if `stabilised`."""

    factors: dict[str, Factors]
    dropout: float = 0.0
    stabilised: bool = False


def read_peft(folder: Path) -> Adapter:
    """Read a directory; every key of its configuration and every tensor is accounted for, else `QkvError`."""
    if not folder.is_dir():
        raise QkvError(f"{folder} is no directory; one that peft wrote is expected, with {CONFIG}")
    c = config(folder / CONFIG)
    rank, alpha = c.integer("r"), c.number("lora_alpha")
    ranks, alphas = c.table("rank_pattern"), c.table("alpha_pattern")
    rank_of = {expression(key, ranks): ranks.integer(key) for key in ranks.values}
    alpha_of = {expression(key, alphas): alphas.number(key) for key in alphas.values}
    dropout, stabilised = c.number("lora_dropout", 0.0), c.flag("use_rslora", False)
    if not 0 <= dropout < 1:
        raise QkvError(f"{c.where}: lora_dropout is {dropout}; a number in [0, 1) is expected")
    targets = c.values.get("target_modules")
    named = c.list("target_modules", str) if isinstance(targets, list) else None
    c.ignore("target_modules")  # an expression, or all: the tensors say which they were
    c.close()
    factors: dict[str, Factors] = {}
    for module, (A, B) in pairs(folder).items():
        wanted = first_of(rank_of, module, rank)
        if A.dim() != 2 or B.dim() != 2 or len(A) != wanted or B.shape[1] != wanted:
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise QkvError(
                f"{folder / WEIGHTS}: A and B of {module} are {shapes}, and by {CONFIG} the rank is {wanted}"
            )
        if named is not None and not any(f".{module}".endswith(f".{name}") for name in named):
            raise QkvError(f"{folder / WEIGHTS} adapts {module}, which target_modules of {CONFIG} does not name")
        factors[module] = Factors(A, B, first_of(alpha_of, module, alpha))
    return Adapter(factors, dropout, stabilised)


def config(path: Path) -> Config:
    """The keys of adapter_config.json, those that say what the numbers are still to be taken."""
    c = Config(read_table(path), where=str(path))
    c.used = set()
    c.only("peft_type", "LORA")
    c.only("bias", "none")
    c.only("use_dora", False)
    c.only("use_qalora", False)
    c.only("lora_bias", False)
    c.only("init_lora_weights", True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights too
    c.only("modules_to_save", [])
    c.only("target_parameters", [])
    c.only("loftq_config", {})
    for key in (
        "alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "layer_replication",
        "lora_ga_config", "megatron_config", "monteclora_config", "trainable_token_indices", "use_bdlora",
        "velora_config",
    ):  # fmt: skip
        c.only(key)
    c.ignore("fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern")  # the tensors show these
    c.ignore("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version")
    c.ignore("ensure_weight_tying", "eva_config", "megatron_core", "qalora_group_size", "runtime_config")
    return c


def expression(key: str, c: Config) -> re.Pattern[str]:
    """A key of a pattern table: the end of a module's path, as a regular expression that cannot take for ever."""
    plain = re.fullmatch(r"[\w.\\^$*+|()\[\]-]{1,200}", key) and not re.search(r"\)[*+]", key)
    if plain and key.count("*") + key.count("+") <= 2:
        try:
            return re.compile(rf"(?:.*\.)?(?:{key})$")
        except re.error:
            pass
    raise QkvError(
        f"{c.where} has the key {key[:60]!r}; the end of a module's path is expected, "
        "with at most two * or +, and none behind a group"
    )


def first_of(patterns: Mapping[re.Pattern[str], V], module: str, default: V) -> V:
    return next((value for pattern, value in patterns.items() if pattern.match(module)), default)


def pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module."""
    path, found = folder / WEIGHTS, dict[str, dict[str, Tensor]]()
    if not path.is_file() and (folder / PICKLE).is_file():
        raise QkvError(
            f"{folder / PICKLE} is a pickle, which can run code when it is opened: "
            f"have peft save the adapter again, which gives {WEIGHTS}"
        )
    for key, tensor in load_tensors(path).items():
        match = KEY.fullmatch(key)
        if match is None or match["matrix"] in found.get(match["module"], {}) or not tensor.is_floating_point():
            raise QkvError(
                f"{path} holds {key[:200]!r}, which is neither A nor B of a LoRA beside a linear layer "
                "(the vocabulary's table and head take none here)"
            )
        found.setdefault(match["module"], {})[match["matrix"]] = tensor
    for module, matrices in found.items():
        if len(matrices) < 2:
            raise QkvError(f"{path} holds only one of the two matrices of {module}: copy it again")
    if not found:
        raise QkvError(f"{path} holds no tensors: copy it again")
    return {module: (matrices["A"], matrices["B"]) for module, matrices in found.items()}


def write_peft(
    adapter: Adapter, folder: Path, modules: Collection[str], transposed: bool, base: str, task: str | None
) -> None:
    """Write a directory that peft loads on the model `base`, which has these modules, `transposed` ones as Conv1D."""
    refuse_filled(folder)
    rank_of = {module: len(factors.A) for module, factors in adapter.factors.items()}
    alpha_of = {module: whole(factors.alpha) for module, factors in adapter.factors.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (rank_of, alpha_of))
    values: dict[str, Any] = {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": adapter.dropout, "use_rslora": adapter.stabilised,
        "rank_pattern": {module: value for module, value in rank_of.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alpha_of.items() if value != alpha},
        "target_modules": endings(adapter.factors, modules), "fan_in_fan_out": transposed, "bias": "none",
        "modules_to_save": None, "use_dora": False,
    }  # fmt: skip
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": matrix
        for module, factors in adapter.factors.items()
        for letter, matrix in (("A", factors.A), ("B", factors.B))
    }
    with whole_folder(folder) as part:
        (part / CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
        save_tensors(tensors, part / WEIGHTS, {"format": "pt"})


def whole(alpha: float) -> int | float:
    return int(alpha) if math.isfinite(alpha) and alpha == int(alpha) else alpha


def endings(chosen: Collection[str], modules: Collection[str]) -> list[str]:
    """The shortest ends of paths that name all that is chosen and nothing else."""

    def ends(module: str) -> list[str]:
        words = module.split(".")
        return [".".join(words[n:]) for n in reversed(range(len(words)))]

    everywhere = Counter(end for module in {*modules, *chosen} for end in ends(module))
    here = Counter(end for module in chosen for end in ends(module))
    return sorted({next(end for end in ends(module) if here[end] == everywhere[end]) for module in chosen})
