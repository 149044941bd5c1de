"""From a spec back to a configuration, with no second copy of what a family knows.

A family says what spec a configuration describes. The way back is a search: begin at a configuration of the family and
set keys to the values that the spec has where the two differ, as long as that brings them nearer.
"""

import dataclasses as dc
from collections.abc import Iterator, Mapping
from itertools import chain, combinations
from typing import Any

from qkv.errors import QkvError
from qkv.models import Model
from qkv.spec import Change, diff
from qkv.zoo.config import ACTIVATIONS, INERT, Config
from qkv.zoo.registry import family_of, spec_from

TASKS = (
    "CausalLM", "MaskedLM", "ConditionalGeneration", "SequenceClassification", "TokenClassification",
    "QuestionAnswering", "PreTraining",
)  # fmt: skip


def configuration(spec: Model, base: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, near `base`, that describes exactly this spec; `QkvError` says what it cannot express."""
    named, values = labels(spec), dict(base)
    if named != labels(spec_from(base)):
        values.pop("num_labels", None)
        values |= named
    left = diff(spec_from(values), spec)
    while left:
        for keys in chain(candidates(values, left), together(values, left)):
            tried = {**values, **keys}
            try:
                after = diff(spec_from(tried), spec)
            except QkvError:
                continue
            if len(after) < len(left):
                values, left = tried, after
                break
        else:
            raise QkvError(f"no {base.get('model_type')} configuration says {left[0]}")
    return values


def fields(value: Any) -> Iterator[Any]:
    """What a part holds: of a window its size."""
    return (getattr(value, field.name) for field in dc.fields(value)) if dc.is_dataclass(value) else iter(())


def labels(spec: Model) -> dict[str, Any]:
    """The names of classes, where the model has a head that scores them."""
    names = getattr(getattr(spec, "head", None), "labels", None)
    if names is None:
        return {}
    ids = {name: n for n, name in enumerate(names)}
    return {"id2label": {str(n): name for n, name in enumerate(names)}, "label2id": ids}


def candidates(values: Mapping[str, Any], left: list[Change]) -> Iterator[dict[str, Any]]:
    """Keys and values to try: what the spec has, at keys that hold such a value now, or none."""
    wanted = [value for change in left for value in (change.after, *fields(change.after))]
    found = {(type(value), value) for value in wanted if isinstance(value, int | float)}
    for key, value in {**values, **unsaid(values)}.items():
        if isinstance(value, str) and value in ACTIVATIONS:
            yield from ({key: name} for name in ACTIVATIONS)
        for kind, after in found:
            if value is None or type(value) is kind:
                yield {key: after, **resized(values, value, after)}
    classes = values.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""
    stem = name.partition("For")[0].removesuffix("LMHeadModel").removesuffix("Model")
    yield from ({"architectures": [f"{stem}For{task}"]} for task in TASKS)
    yield from ({"architectures": [f"{stem}{bare}"]} for bare in ("Model", "LMHeadModel"))


def unsaid(values: Mapping[str, Any]) -> dict[str, None]:
    """The keys that the family asks for and the configuration leaves out."""
    config = Config(values)
    family_of(values).spec(config)
    return dict.fromkeys(sorted(config.used - values.keys() - set(INERT.split())))


def together(values: Mapping[str, Any], left: list[Change]) -> Iterator[dict[str, Any]]:
    """Two or three keys at once, for those that must agree: each holds what the spec had, and gets what it has."""
    plain = int | float | str
    moves = {(c.before, c.after) for c in left if isinstance(c.before, plain) and isinstance(c.after, plain)}
    steps: list[dict[str, Any]] = []
    for key, value in values.items():
        for before, after in moves:
            if type(value) is type(after) and value == before:
                steps.append({key: after, **resized(values, value, after)})
            elif isinstance(value, str) and ACTIVATIONS.get(value) == before:
                steps += [{key: name} for name, ours in ACTIVATIONS.items() if ours == after]
    if len(moves) <= 3:  # else it is another model altogether
        for some in chain(combinations(steps, 2), combinations(steps, 3)):
            yield {key: value for step in some for key, value in step.items()}


def resized(values: Mapping[str, Any], before: Any, after: Any) -> dict[str, Any]:
    """Lists with an entry for each layer, for another number of layers: cut off, or begun again."""
    if type(before) is not int or type(after) is not int:
        return {}
    lists = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == before}
    return {key: [value[n % before] for n in range(after)] for key, value in lists.items() if before and after > 0}
