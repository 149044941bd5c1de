"""Specs are values: frozen dataclasses that nest, compare, print as Python, load, dump, diff and edit.

A part registers itself under a kind with one decorator; a third party's part does the same, or names its module as an
entry point of the group `qkv.parts` (this package's own parts are found that way too), and then works everywhere.

This is our own code because the union of parts is open: msgspec wants every member of a tagged union named when the
decoder is made, and cattrs can be taught an open one only by replacing its structuring and its error paths, which is
all that is left of the work. Imports no torch.
"""

import dataclasses as dc
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Self, TypeVar

from qkv.errors import QkvError, SpecError

KINDS: dict[str, "type[Spec]"] = {}


@dc.dataclass(frozen=True, repr=False, eq=False)
class Spec:
    """A value that describes a part; concrete specs are made with `@part(kind)`."""

    kind: ClassVar[str]
    open_field: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field, hint in _fields(type(self)).items():
            object.__setattr__(self, field, fit(getattr(self, field), hint, f"{name}.{field}"))
        self.check()

    def check(self) -> None:
        """Raise `QkvError` for values that each have the right type and yet cannot work."""

    def children(self) -> dict[str, Any]:
        """Path segment → value, for paths, edits and diffs; an open field's entries stand beside the other fields."""
        values = {name: getattr(self, name) for name in _fields(type(self))}
        entries = values.pop(self.open_field) if self.open_field else {}
        return {**values, **entries}

    def with_children(self, children: Mapping[str, Any]) -> Self:
        """The same kind of part with these children."""
        return type(self)(**children)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and type(self) is type(other) and _frozen(self) == _frozen(other)

    def __hash__(self) -> int:
        return hash(_frozen(self))

    def __repr__(self) -> str:
        return _python(self, width=None)

    def __str__(self) -> str:
        return _python(self)


S = TypeVar("S", bound=Spec)
V = TypeVar("V")


@typing.dataclass_transform(frozen_default=True)
def part(kind: str, *, open: str | None = None) -> Callable[[type[S]], type[S]]:
    """Register a class as the part `kind` and make it a frozen dataclass.

    Its first field may be given by position, the others by keyword only. `open` names a field of type
    `dict[str, …]` that takes every further keyword, in order: `Block(attn=…, ffn=…)`.
    """

    def register(cls: type[S]) -> type[S]:
        if kind in KINDS:
            raise QkvError(f"the kind {kind!r} is taken by {KINDS[kind].__module__}.{KINDS[kind].__qualname__}")
        inherited = sum(not field.kw_only for field in dc.fields(cls))
        fields = [name for name, hint in cls.__annotations__.items() if not _of_class(hint)]
        for position, name in enumerate(fields, inherited):
            value = cls.__dict__.get(name, dc.MISSING)
            field = value if isinstance(value, dc.Field) else dc.field(default=value)
            field.kw_only = position > 0 or open is not None
            setattr(cls, name, field)
        made = dc.dataclass(frozen=True, repr=False, eq=False)(cls)
        made.kind, made.open_field = kind, open
        if open is not None:
            _spread(made, open)
        KINDS[kind] = made
        return made

    return register


def _of_class(hint: Any) -> bool:
    """Whether an annotation, a string where annotations are not evaluated, is of a variable of the class."""
    return (hint if isinstance(hint, str) else str(hint)).partition("[")[0].rpartition(".")[2] == "ClassVar"


def _spread(cls: type[Spec], open: str) -> None:
    """Let the constructor take the entries of the open field as keywords, or all of them by the field's name."""
    construct = cls.__init__
    named = {field.name for field in dc.fields(cls) if field.name != open}

    def spread(self: Spec, /, **values: Any) -> None:
        entries = dict(values.pop(open)) if isinstance(values.get(open), Mapping) else {}
        entries |= {key: values.pop(key) for key in list(values) if key not in named}
        construct(self, **values, **{open: entries})

    setattr(cls, "__init__", spread)  # noqa: B010 - a plain assignment is refused by type checkers


def _fields(cls: type[Spec]) -> dict[str, Any]:
    """Field name → resolved type hint."""
    if cls not in _FIELDS:
        hints = typing.get_type_hints(cls)
        _FIELDS[cls] = {field.name: hints[field.name] for field in dc.fields(cls)}
    return _FIELDS[cls]


_FIELDS: dict[type, dict[str, Any]] = {}


def _frozen(value: Any) -> Any:
    """A hashable image; unlike a dict's own equality it keeps the order of entries."""
    if isinstance(value, Spec):
        return type(value), tuple(_frozen(getattr(value, name)) for name in _fields(type(value)))
    if isinstance(value, Mapping):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, tuple) else value


# --- strict loading ---------------------------------------------------------------------------------------------


def load(data: Any, hint: Any = Spec, path: str = "spec") -> Any:
    """Build a spec from plain data (parsed TOML or JSON); `SpecError` names the path of the first fault."""
    return fit(data, hint, path)


def fit(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint`: tables become parts, lists tuples, whole numbers floats; all else must match."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, args, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SpecError(path, f"expected a list, found {_show(value)}")
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise SpecError(path, f"expected {len(args)} values, found {len(value)}")
        each = (args[0] if args[-1] is Ellipsis else args[i] for i in range(len(value)))
        return tuple(fit(item, arg, f"{path}.{i}") for i, (item, arg) in enumerate(zip(value, each, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise SpecError(path, f"expected a table, found {_show(value)}")
        return {key: fit(item, args[1], f"{path}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Spec):
        return value if isinstance(value, hint) else _fit_part(value, hint, path)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint or value != value:  # what is no number equals nothing, nor itself
        raise SpecError(path, f"expected {_name(hint)}, found {_show(value)}")
    return value


def _fit_union(value: Any, options: tuple[Any, ...], path: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    faults: list[SpecError] = []
    tables: list[SpecError] = []
    for option in options:
        if option is not types.NoneType:
            try:
                return fit(value, option, path)
            except SpecError as fault:
                faults.append(fault)
                if isinstance(option, type) and issubclass(option, Spec):
                    tables.append(fault)
    if isinstance(value, Mapping) and len(tables) == 1:  # the only kind that a table can be meant for
        raise tables[0]
    deepest = max(faults, key=lambda fault: len(fault.path))
    if len(faults) == 1 or len(deepest.path) > len(path):
        raise deepest
    raise SpecError(path, f"expected {' or '.join(map(_name, options))}, found {_show(value)}")


def _fit_part(value: Any, hint: type[Spec], path: str) -> Spec:
    if not isinstance(value, Mapping):
        meant = difflib.get_close_matches(value, kinds(hint), 1) if isinstance(value, str) else []
        guess = f"; did you mean {{kind={meant[0]!r}}}?" if meant else ""
        raise SpecError(path, f"expected {_name(hint)}, found {_show(value)}{guess}")
    kind = value.get("kind", getattr(hint, "kind", None))
    if not isinstance(kind, str):
        raise SpecError(path, f"a 'kind' is needed here; one of: {', '.join(kinds(hint))}")
    if kind not in KINDS:
        raise SpecError(f"{path}.kind", f"unknown kind {kind!r}{nearest(kind, kinds(hint))}")
    cls = KINDS[kind]
    if not issubclass(cls, hint):
        raise SpecError(path, f"{kind!r} is no {hint.__name__}; one of: {', '.join(kinds(hint))}")
    hints, arguments = _fields(cls), {}
    entry = typing.get_args(hints[cls.open_field])[1] if cls.open_field else None
    for key, item in value.items():
        if key == "kind":
            continue
        if entry is None and key not in hints:
            raise SpecError(path, f"unknown key {key!r}{nearest(key, hints)}")
        arguments[key] = fit(item, hints.get(key, entry), f"{path}.{key}")
    for field in dc.fields(cls):
        if field.name not in arguments and field.name != cls.open_field and _default(field) is dc.MISSING:
            raise SpecError(path, f"the key {field.name!r} is missing")
    try:
        return cls(**arguments)
    except SpecError:
        raise
    except QkvError as fault:
        raise SpecError(path, str(fault)) from None


def positive(spec: Spec, *names: str) -> None:
    """Refuse fields (or numbers of a field) that are given and not finite numbers above 0."""
    for name in names:
        value = getattr(spec, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not 0 < number < math.inf:
                raise QkvError(f"the {name} of {spec.kind} is a number above 0, not {number}")


def share(spec: Spec, *names: str) -> None:
    """Refuse fields that are no share of a whole, from 0 to below 1, as dropout is."""
    for name in names:
        if not 0 <= getattr(spec, name) < 1:
            raise QkvError(f"the {name} of {spec.kind} lies in [0, 1), not at {getattr(spec, name)}")


def kinds(hint: type[Spec] = Spec) -> list[str]:
    """The registered kinds that fit a slot of type `hint`, entry points included."""
    discover()
    return sorted(kind for kind, cls in KINDS.items() if issubclass(cls, hint))


@cache
def discover() -> None:
    """Import every module that the entry points of the group `qkv.parts` name."""
    for entry in entry_points(group="qkv.parts"):
        entry.load()


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """The end of an error sentence: a guess at what was meant, or what there is."""
    known = list(known)
    guess = difflib.get_close_matches(word, known, 1)
    if guess:
        return f"; did you mean {guess[0]!r}?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"; there are: {', '.join(known[:20]) or 'none'}{more}"


def _name(hint: Any) -> str:
    if hint is types.NoneType:
        return "nothing"
    if typing.get_origin(hint) is tuple:
        return "a list"
    if isinstance(hint, type) and issubclass(hint, Spec):
        return f"a table that describes a {hint.__name__}"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- dumping and printing ---------------------------------------------------------------------------------------


def dump(value: Any) -> Any:
    """Plain data from which `load` makes an equal spec; fields at their default are left out."""
    if isinstance(value, Spec):
        if KINDS.get(value.kind) is not type(value):
            raise QkvError(f"{type(value).__name__} has no kind of its own, by which it is loaded: give it @part(…)")
        given = _given(value)
        entries = given.pop(value.open_field, {}) if value.open_field else {}
        return {"kind": value.kind, **{key: dump(item) for key, item in {**given, **entries}.items()}}
    if isinstance(value, Mapping):
        return {key: dump(item) for key, item in value.items()}
    return [dump(item) for item in value] if isinstance(value, tuple) else value


def _given(spec: Spec) -> dict[str, Any]:
    """The fields that differ from their default."""
    values = {field.name: (getattr(spec, field.name), _default(field)) for field in dc.fields(spec)}
    return {name: value for name, (value, default) in values.items() if _frozen(value) != _frozen(default)}


def _default(field: dc.Field[Any]) -> Any:
    """MISSING where there is none."""
    return field.default if field.default_factory is dc.MISSING else field.default_factory()


def _essential(cls: type[Spec]) -> str | None:
    """The field that is written without its name: the first, where it has no default."""
    first = next((field for field in dc.fields(cls) if not field.kw_only), None)
    return first.name if first is not None and _default(first) is dc.MISSING else None


def _python(value: Any, indent: int = 0, width: int | None = 100) -> str:
    """Python that rebuilds the value, broken over lines where it is wider than `width`."""
    if isinstance(value, Spec):
        given, first = _given(value), _essential(type(value))
        entries = given.pop(value.open_field, {}) if value.open_field else {}
        brackets = f"{type(value).__name__}(", ")"
        items = [("" if key == first else f"{key}=", item) for key, item in given.items()]
        items += [(f"{key}=", item) for key, item in entries.items()]
    elif isinstance(value, Mapping):
        brackets, items = ("{", "}"), [(f"{key!r}: ", item) for key, item in value.items()]
    elif isinstance(value, tuple):
        brackets, items = ("(", ",)" if len(value) == 1 else ")"), [("", item) for item in value]
    else:
        return f"float({str(value)!r})" if value in (math.inf, -math.inf) else repr(value)
    flat = ", ".join(label + _python(item, width=None) for label, item in items)
    if width is None or indent + len(flat) + len(brackets[0]) <= width:
        return brackets[0] + flat + brackets[1]
    pad = " " * (indent + 4)
    lines = "".join(f"{pad}{label}{_python(item, indent + 4, width - len(label))},\n" for label, item in items)
    return f"{brackets[0]}\n{lines}{' ' * indent}{brackets[1].lstrip(',')}"


# --- editing and comparing --------------------------------------------------------------------------------------


def _parts_of(value: Any) -> dict[str, Any]:
    if isinstance(value, Spec):
        return value.children()
    if isinstance(value, Mapping):
        return dict(value)
    return {str(i): item for i, item in enumerate(value)} if isinstance(value, tuple) else {}


def _rebuilt(value: Any, children: dict[str, Any]) -> Any:
    if isinstance(value, Spec):
        return value.with_children(children)
    return children if isinstance(value, Mapping) else tuple(children.values())


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path of a spec with its value, outermost first."""
    for key, item in _parts_of(value).items():
        below = f"{path}.{key}" if path else key
        yield below, item
        yield from walk(item, below)


def matches(pattern: str, path: str) -> bool:
    """Glob on dotted paths: `*` is one segment, `**` any number, also none."""

    def match(want: list[str], have: list[str]) -> bool:
        if not want:
            return not have
        if want[0] == "**":
            return any(match(want[1:], have[i:]) for i in range(len(have) + 1))
        return bool(have) and want[0] in ("*", have[0]) and match(want[1:], have[1:])

    return match(pattern.split("."), path.split("."))


def edit(spec: V, pattern: str, change: Any) -> V:
    """Replace every value whose path matches; `change` is the new value (a part, plain data) or a function of the old.

    >>> edit(spec, "**.attn.f", lambda attention: Retention(heads=attention.heads))
    """
    hits = 0

    def visit(value: Any, path: str) -> Any:
        nonlocal hits
        if path and matches(pattern, path):
            hits += 1
            return change(value) if callable(change) else change
        children = _parts_of(value)
        edited = {key: visit(item, f"{path}.{key}" if path else key) for key, item in children.items()}
        same = all(edited[key] is children[key] for key in children)
        return value if same else _rebuilt(value, edited)

    edited = visit(spec, "")
    if not hits:
        raise SpecError("", f"no path of the spec matches {pattern!r}{nearest(pattern, (p for p, _ in walk(spec)))}")
    return typing.cast(V, edited)


@dc.dataclass(frozen=True)
class Change:
    """One difference between two specs."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.before!r} → {self.after!r}"


class _Absent:
    def __repr__(self) -> str:
        return "absent"


def diff(before: Any, after: Any, path: str = "") -> list[Change]:
    """The smallest set of paths at which two specs differ, in the order of the first."""
    if type(before) is type(after) and isinstance(before, Spec | Mapping | tuple):
        old, new = _parts_of(before), _parts_of(after)
        keys = [*old, *(key for key in new if key not in old)]
        below = {key: f"{path}.{key}" if path else key for key in keys}
        if before != after and old.keys() == new.keys() and list(old) != list(new):  # branches in another order
            return [Change(path, before, after)]
        found = [c for key in keys for c in diff(old.get(key, _Absent()), new.get(key, _Absent()), below[key])]
        return found if found or before == after else [Change(path, before, after)]  # alike in all that has a path
    return [] if _frozen(before) == _frozen(after) and type(before) is type(after) else [Change(path, before, after)]
