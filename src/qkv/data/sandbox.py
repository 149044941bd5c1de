"""Jinja for programs that are not trusted: chat templates come with the weights.

Jinja's sandbox keeps a template away from this process's objects. What it may take is bounded here, in the same
process, without threads and signals:

- The language is small: the filters, tests, functions and methods listed below, each of known cost. Inheritance,
  imports, recursive loops, starred arguments and all that formats (`%`, `format`, `center`, …) are refused.
- What makes a value pays for its size, before it is made where it may be far larger than what it is made of. Payments
  are never given back, so the budget bounds the memory. What reads a value to its depths weighs it first, for lists
  that hold one another many times over are small and print large.
- Every loop's round, call, operator, filter, test, look-up and output looks at the clock; between two looks stand at
  most as many steps as the template has characters.

Imports no torch.
"""

import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from datetime import datetime
from time import thread_time
from types import TracebackType
from typing import Any, Self

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from qkv.errors import QkvError

LONGEST, MOST_NODES = 50_000, 10_000  # characters and nodes of a template; the longest known has 20,000 and 4,000
SECONDS = 0.5  # of the thread's own time, for compiling and for running; chat templates take 0.01
ROOM = 8_000_000  # characters that a template may make, beside 32 times what it was given
_ITEM, _BITS = 64, 4096  # characters that an item of a list counts for; the longest number in arithmetic


class Program:
    """A template, compiled; QkvError where it is no Jinja or more than it may be."""

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST:
            raise QkvError(f"the chat template has {len(source):,} characters; at most {LONGEST:,} are read")
        environment = _Sandbox()
        with _Budget():
            tree = environment.parse(source)
            if sum(1 for _ in tree.find_all(nodes.Node)) > MOST_NODES:
                raise QkvError(f"the chat template has more than {MOST_NODES:,} parts; no known one is that large")
            tree = _Guard().visit(tree)
            code = environment.compile(tree.set_environment(environment))
            self._template = environment.template_class.from_code(environment, code, environment.globals)

    def run(self, variables: Mapping[str, Any]) -> str:
        """What the template writes; QkvError where it refuses, fails, or takes too long or too much."""
        with _Budget() as budget:
            values = _data(variables)
            budget.left += 32 * _weight(values)
            text: str = self._template.render(values)
        return text


def _data(value: Any) -> Any:
    """The same value in nothing but JSON's types, of which the sandbox knows every method."""
    if isinstance(value, Mapping):
        return {str(key): _data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_data(item) for item in value]
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str | int | float):  # of a subclass, which may have methods of its own
        return (
            str.__str__(value)
            if isinstance(value, str)
            else value.__int__()
            if isinstance(value, int)
            else float(value)
        )
    raise QkvError(f"a message holds a {type(value).__name__}; text, numbers, lists and tables are expected")


# --- the budget ---------------------------------------------------------------------------------------------------


class _Budget:
    """What the template that now runs may still make, and until when; all that goes wrong becomes one QkvError."""

    def __enter__(self) -> Self:
        self.left, self.until = ROOM, thread_time() + SECONDS
        self._before = _NOW.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        _NOW.reset(self._before)
        if isinstance(fault, Exception) and not isinstance(fault, QkvError):
            what = "refuses the messages" if isinstance(fault, _Refusal) else "fails"
            line = f" at line {fault.lineno}" if isinstance(fault, TemplateSyntaxError) else ""
            said = " ".join(str(fault)[:300].split()) or type(fault).__name__
            raise QkvError(f"the chat template {what}{line}: {said}") from None


_NOW: ContextVar[_Budget] = ContextVar("budget")


class _Refusal(TemplateError):
    """What a template raises by itself."""


def _spend(amount: int = 0) -> None:
    budget = _NOW.get()
    budget.left -= amount
    if budget.left < 0:
        raise QkvError("the chat template makes millions of characters more than the messages have: it is broken")
    if thread_time() > budget.until:
        raise QkvError(f"the chat template runs for more than {SECONDS} seconds: it is broken")


def _weight(value: Any, most: float = float("inf")) -> int:
    """The characters in a value and in all that it holds; counting ends past `most`."""
    total, waiting = 0, [value]
    while waiting and total <= most:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict | list | tuple | KeysView | ValuesView | ItemsView):
            total += _ITEM * len(item)
            waiting += [*item, *item.values()] if isinstance(item, dict) else item
    return total


def _deep(value: Any) -> int:
    """The weight of a value that is about to be read to its depths: never more than what is left."""
    left = _NOW.get().left
    weight = _weight(value, left)
    _spend(weight if weight > left else 0)
    return weight


def _text(value: Any) -> str:
    """A value as text, paid for; what stands in a list is written with quotes and escapes."""
    if not isinstance(value, str | int | float | list | tuple | dict | Undefined | None):
        raise SecurityError(f"a {type(value).__name__} is no text")
    _spend(_deep(value) * (1 if isinstance(value, str) else 10))
    return str(value)


def _items(values: Iterable[Any]) -> list[Any]:
    """A list that pays for its items one by one."""
    found = []
    for value in values:
        _spend(_ITEM)
        found.append(value)
    return found


# --- the language -------------------------------------------------------------------------------------------------

_REFUSED = (
    *(nodes.Extends, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport),
    *(nodes.EvalContextModifier, nodes.ScopedEvalContextModifier),
)


class _Guard(NodeTransformer):
    """Has a template pay for its loops, lists, slices, comparisons and joined texts; refuses what is not listed."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        starred = getattr(node, "dyn_args", None) or getattr(node, "dyn_kwargs", None)
        if isinstance(node, _REFUSED) or starred or (isinstance(node, nodes.For) and node.recursive):
            what = "starred arguments" if starred else f"{type(node).__name__.lower()} of this kind"
            raise SecurityError(f"{what} at line {node.lineno} is not for chat templates")
        self.generic_visit(node)
        if isinstance(node, nodes.TemplateData):
            return nodes.Const(node.data, lineno=node.lineno)  # which is paid for like all that is written
        if isinstance(node, nodes.For):
            node.iter = _through("each", node.iter)
        if isinstance(node, nodes.Compare | nodes.Operand):
            node.expr = _through("compared", node.expr)
        if isinstance(node, nodes.Pair):
            node.key = _through("compared", node.key)
        if isinstance(node, nodes.Concat):
            return _through("joined", nodes.List(node.nodes, lineno=node.lineno))
        listed = isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
        sliced = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        return _through("paid", node) if listed or sliced else node


def _through(name: str, node: nodes.Node) -> nodes.Filter:
    """The expression passed through a filter whose name no template can spell."""
    return nodes.Filter(node, f" {name}", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, which marks, for training, what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - so declared by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=_written
        )
        self.filters = {name: _filter(name, price) for name, price in _FILTERS.items()} | _OWN_FILTERS
        self.tests = {name: _test(name) for name in _TESTS}
        self.globals = {"range": self.globals["range"], **_FUNCTIONS}

    def getattr(self, obj: Any, attribute: str) -> Any:
        _spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _deep(argument)
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is not for chat templates")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # so named by Jinja
        _spend()
        if not isinstance(__obj, Macro | Undefined) and not any(__obj is known for known in __self.globals.values()):
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", type(__obj).__name__)
            price = _METHODS.get(type(owner), {}).get(name)
            if price is None:
                raise SecurityError(f"{name}() is not for chat templates")
            named = {key: value for key, value in kwargs.items() if key not in _INTERNAL}
            for value in (*args, *named.values()):
                _deep(value)
            _spend(price(owner, *args, **named))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _spend(_operation(operator, left, right))
        return super().call_binop(context, operator, left, right)


_INTERNAL = ("_loop_vars", "_block_vars")  # what compiled templates pass on to every call


def _operation(operator: str, left: Any, right: Any) -> int:
    """The price of an operator; one that could make much out of little is refused."""
    long = [each for each in (left, right) if isinstance(each, str | list | tuple)]
    sizes = sum(len(each) if isinstance(each, str) else _ITEM * len(each) for each in long)
    if operator == "*" and len(long) == 1:
        times = right if long[0] is left else left
        return sizes * max(times, 0) if isinstance(times, int) else 0
    if long and operator != "+":
        raise SecurityError(f"{operator} on text or lists is not for chat templates")
    large = any(isinstance(each, int) and each.bit_length() > _BITS for each in (left, right))
    if large or (operator == "**" and isinstance(right, int | float) and abs(right) > 64):
        raise SecurityError(f"{operator} on numbers that large is not for chat templates")
    return sizes


# --- what things cost ---------------------------------------------------------------------------------------------

Price = Callable[..., int]


def _free(value: Any, *args: Any, **kwargs: Any) -> int:
    return 0


def _rewriting(value: Any, *args: Any, **kwargs: Any) -> int:
    return _deep(value) * (3 if isinstance(value, str) else 10)  # ŉ is two letters in capitals, ΐ three


def _listing(value: Any, *args: Any, **kwargs: Any) -> int:
    """For each item, and for the parts of attributes' names."""
    _deep(value)
    names = sum(len(each) for each in (*args, *kwargs.values()) if isinstance(each, str))
    return _ITEM * (names + (len(value) if hasattr(value, "__len__") else 0))


def _wording(value: Any, *args: Any, **kwargs: Any) -> int:
    """For the words or lines of a text, which may be every other character."""
    return _ITEM // 2 * _rewriting(value)


def _stripping(text: Any, chars: str | None = None) -> int:
    if chars is not None and len(chars) > 100:
        raise SecurityError("to strip off more than 100 characters is not for chat templates")
    return _rewriting(text)


def _splitting(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    most = len(text) // 2 if sep is None else text.count(sep)
    return len(text) + _ITEM * (1 + (min(most, maxsplit) if maxsplit >= 0 else most))


def _replacing(text: Any, old: Any, new: Any, count: Any = None) -> int:
    return _rewriting(text) + str(text).count(str(old)) * len(str(new))


def _joining(items: Any, d: Any = "", attribute: Any = None) -> int:
    return 10 * _deep(items) + len(items) * (_ITEM + len(str(d)))


def _joining_with(separator: str, items: Any) -> int:
    return _joining(items, separator)


def _indenting(text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> int:
    by = width if isinstance(width, int) else len(str(width))
    return _wording(text) + _rewriting(text) * max(by, 0)


def _rounding(number: Any, precision: Any = 0, method: Any = "common") -> int:
    if not isinstance(precision, int) or abs(precision) > 20 or isinstance(number, str):
        raise SecurityError("to round to so many places is not for chat templates")
    return 0


def _priced(names: str, price: Price) -> dict[str, Price]:
    return dict.fromkeys(names.split(), price)


_METHODS: dict[type, dict[str, Price]] = {
    str: {
        **_priced("startswith endswith find rfind index rindex count isalnum isalpha isdecimal isdigit", _free),
        **_priced("isnumeric isspace islower isupper istitle", _free),
        **_priced("lower upper title capitalize casefold swapcase", _rewriting),
        **_priced("removeprefix removesuffix partition rpartition", _rewriting),
        **_priced("strip lstrip rstrip", _stripping),
        **_priced("split rsplit", _splitting),
        **_priced("splitlines", _wording),
        **_priced("replace", _replacing),
        **_priced("join", _joining_with),
    },
    dict: _priced("get items keys values", _free),
    list: _priced("index count", _listing),
    tuple: _priced("index count", _listing),
    LoopContext: _priced("cycle changed", _free),
}
_FILTERS: dict[str, Price] = {
    **_priced("default d first last length count int float abs", _free),
    **_priced("lower upper capitalize string", _rewriting),
    **_priced("list items dictsort sort unique reverse min max map", _listing),
    **_priced("select selectattr reject rejectattr", _listing),
    **_priced("trim", _stripping),
    **_priced("title", _wording),
    **_priced("replace", _replacing),
    **_priced("join", _joining),
    **_priced("indent", _indenting),
    **_priced("round", _rounding),
}
_TESTS = {
    *("boolean", "callable", "defined", "divisibleby", "eq", "==", "equalto", "even", "false", "float", "ge", ">="),
    *("gt", ">", "greaterthan", "in", "integer", "iterable", "le", "<=", "lt", "<", "lessthan", "lower", "mapping"),
    *("ne", "!=", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined", "upper"),
}
_PLAIN = ImmutableSandboxedEnvironment()


def _filter(name: str, price: Price) -> Callable[..., Any]:
    """Jinja's filter of that name, paid for; what it gives one by one becomes a list."""

    @pass_context  # so that it never runs while the template is compiled
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        for each in (*args, *kwargs.values()):
            _deep(each)
        _spend(price(value, *args, **kwargs))
        found = _PLAIN.call_filter(name, value, args, kwargs, context=context)
        return _items(found) if isinstance(found, Iterator) else found

    return run


def _test(name: str) -> Callable[..., bool]:
    """Jinja's test of that name, for values that were weighed."""

    def run(value: Any, *args: Any) -> bool:
        for each in (value, *args):
            _deep(each)
        if name in ("even", "odd", "divisibleby"):
            _spend(_operation("%", value, 1))
        return bool(_PLAIN.call_test(name, value, args))

    return run


# --- what qkv's guard puts in, and what the transformers package gives to templates ---------------------------------


@pass_context
def _written(context: Context, value: Any) -> str:
    return _text(value)


@pass_context
def _each(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend()
        yield value


@pass_context
def _compared(context: Context, value: Any) -> Any:
    _deep(value)
    return value


@pass_context
def _joined(context: Context, values: list[Any]) -> str:
    return "".join(map(_text, values))


@pass_context
def _paid(context: Context, value: Any) -> Any:
    _spend(len(value) if isinstance(value, str) else _ITEM * len(value))
    return value


@pass_context
def _safe(context: Context, value: Any) -> str:
    return _text(value)  # nothing is escaped here, so all is safe


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON, with nothing escaped for HTML."""
    _deep(value)
    if _weight([indent, separators]) + (indent if isinstance(indent, int) else 0) > 1000:
        raise SecurityError("JSON with so wide an indent is not for chat templates")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    written = []
    for part in encoder.iterencode(value):
        _spend(len(part) + _ITEM)
        written.append(part)
    return "".join(written)


_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    " each": _each,
    " compared": _compared,
    " joined": _joined,
    " paid": _paid,
    "safe": _safe,
    "tojson": _tojson,
}


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<namespace>"  # they can hold each other, and would print without end


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    _spend(sum(map(_listing, args)) + _ITEM * len(kwargs))
    return _Namespace(*args, **kwargs)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    _spend(sum(map(_listing, args)) + _ITEM * len(kwargs))
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise _Refusal(_text(message))


def _strftime_now(form: str) -> str:
    if not re.fullmatch(r"(?:%[-#]?[A-Za-z%]|[^%]){0,100}", form):
        raise SecurityError("a date of that form is not for chat templates")
    return datetime.now().strftime(form)


_FUNCTIONS = {
    "dict": _dict,
    "namespace": _namespace,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
