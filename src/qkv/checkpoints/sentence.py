"""The files that the sentence-transformers package keeps beside a model: how its vectors are pooled."""

from pathlib import Path

from qkv.checkpoints.directory import is_plain, read_sound, read_table
from qkv.checkpoints.names import shown
from qkv.errors import QkvError
from qkv.parts.head import Pool, Vector

MODULES = "modules.json"
POOLS = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def vector_head(folder: Path) -> Vector | None:
    """The head that makes a text's vector, where a modules.json describes one; it has no weights."""
    if not (folder / MODULES).is_file():
        return None
    modules = read_sound(folder / MODULES)
    try:
        names, paths = [module["type"].rpartition(".")[2] for module in modules], [module["path"] for module in modules]
        outside = [path for path in paths if path != "" and not is_plain(path)]
    except (TypeError, KeyError, AttributeError):
        raise QkvError(f"{folder / MODULES} is no list of modules with a type and a path") from None
    if outside:
        raise QkvError(f"{folder / MODULES} names folders outside of its own")
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        chain = shown(names) or "nothing"
        raise QkvError(f"{folder / MODULES} is a chain of {chain}; Transformer, Pooling, Normalize can be run")
    where = folder / paths[1] / "config.json"
    config = read_table(where)
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode") and value is True]
    mode = config.get("pooling_mode")
    pools = [POOLS[key] for key in chosen if key in POOLS]
    if isinstance(mode, str):
        pools = [{"cls": "first", "lasttoken": "last"}.get(mode, mode)]
    if len(pools) != 1 or len(chosen) > 1 or pools[0] not in POOLS.values():
        found = shown(chosen or [str(mode)])
        raise QkvError(f"{where} pools by {found}; one of {', '.join(POOLS)} can be run")
    return Vector(Pool(pools[0]), unit="Normalize" in names)
