"""Chat templates: Jinja programs that come with a model, rendered within bounds (extra `text`).

A template may come from a stranger. Jinja's sandbox keeps it away from the process; it does not keep it from looping
for ever, or from asking for a terabyte with one ``'x'.center(10**12)``. Here every operation that makes a value is
bounded:

* A value may weigh `_VALUE` units at most (characters and elements, as a tree), and all values of one rendering
  `_TOTAL`, both plus a multiple of what the conversation weighs. Products, widths and powers are checked before they
  are computed; filters and string methods that pad are not there (``center``, ``format``, ``zfill``, …).
* Loop bodies and calls count as steps. After each step the clock is read.
* The text stops at `limit` characters.

What is not bounded: one operation is never interrupted, so a rendering can go on for as long as one operation on a
value of the largest weight takes (sorting, comparing, searching: seconds).

What templates of transformers find is here too: ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now``,
``{% generation %}``, loop controls, ``tools`` and ``documents``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["render"]

_SOURCE = 500_000  # characters of a template; those of Hugging Face's models have up to about 20,000
_VALUE = 1_000_000
_TOTAL = 5_000_000
_SHARE = 16  # more, for each unit of the conversation
_SECONDS = 5.0
_BITS = 4096  # of whole numbers
_WIDTH = 100  # of indentation and of numbers in ``%`` formats

_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float groupby indent int items join last length list
    lower map max min reject rejectattr replace reverse safe select selectattr sort string title trim unique upper
    wordcount
""".split()  # noqa: SIM905
_GLOBALS = ("cycler", "dict", "joiner", "namespace", "range")
_SCOPES = ("_loop_vars", "_block_vars")  # the variables around a call, which Jinja adds to its arguments
_TEXT_METHODS = """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace
    istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit
    rstrip split splitlines startswith strip swapcase title upper
""".split()  # noqa: SIM905


def render(
    source: str,
    *,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    limit: int,
) -> str:
    """Return the text of a conversation.

    Raises:
        TemplateError: the template refuses the conversation, or goes beyond a bound.
        Exception: whatever else a template does wrong.
    """
    if len(source) > _SOURCE:
        raise TemplateError(f"the template has {len(source)} characters, more than {_SOURCE}")
    conversation = [list(messages), list(tools or ()), list(documents or ()), dict(variables)]
    environment = _Environment(_Budget(_weight(conversation, limit=1_000_000_000)))
    tree = environment.parse(source)
    _Counted().generic_visit(tree)
    template = environment.from_string(tree)
    pieces, length = [], 0
    for piece in template.generate(
        **variables,
        messages=messages,
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
    ):
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            raise _TooMuchError(f"the text is longer than {limit} characters, more than the model's context holds")
    return "".join(pieces)


class _TooMuchError(TemplateError):
    """A template went beyond a bound."""


class _Budget:
    """What a rendering may still make and how long it may still run."""

    def __init__(self, conversation: int) -> None:
        self.value = _VALUE + _SHARE * conversation
        self._left = _TOTAL + _SHARE * conversation
        self._end = time.monotonic() + _SECONDS

    def step(self) -> None:
        """Count a loop's turn or a call."""
        self.spend(1)
        if time.monotonic() > self._end:
            raise _TooMuchError(f"the template ran for more than {_SECONDS:g} seconds")

    def spend(self, units: int) -> None:
        """Count characters or elements that are about to be made."""
        self._left -= units
        if units > self.value or self._left < 0:
            raise _TooMuchError("the template makes too much text or too many values")

    def admit(self, value: Any) -> Any:
        """Return a value that was made, after counting it."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(len(value))
            _weight(value, limit=self.value)
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
        return value

    def check_bits(self, bits: int) -> None:
        """Refuse numbers that are too large."""
        if bits > _BITS:
            raise _TooMuchError(f"the template computes with numbers of more than {_BITS} bits")


def _weight(value: Any, *, limit: int) -> int:
    """Return the characters and elements of a value as a tree, so that a list in a list twice counts twice.

    A namespace counts as one element: nothing looks into it as a part of a value (`_Namespace`).
    """
    weight, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        weight += 1
        if isinstance(item, str):
            weight += len(item)
        elif isinstance(item, Mapping):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        if weight + len(waiting) > limit:
            raise _TooMuchError("the template makes too large a value")
    return weight


class _Namespace(Namespace):
    """Jinja's namespace, which may be part of a value but is never written as text.

    Its contents can change after the value was weighed, and may hold the namespace itself.
    """

    def __repr__(self) -> str:
        raise _TooMuchError("the template writes a namespace as text")


class _Counted(NodeTransformer):
    """Rewrites a template so that what Jinja compiles to bare Python passes through the environment's filters."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """Return what takes the node's place."""
        self.generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(None), "_step"), lineno=node.lineno))
        elif isinstance(node, nodes.Concat):  # a ~ b
            return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concatenated")
        elif isinstance(node, nodes.Getitem):
            return _filtered(node, "_made") if isinstance(node.arg, nodes.Slice) else node  # text[a:b] is a copy
        elif isinstance(node, (nodes.List, nodes.Dict, nodes.Tuple)):
            return _filtered(node, "_made") if getattr(node, "ctx", "load") == "load" else node
        return node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks answers for training; here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the contents."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: _Budget) -> None:
        @pass_context  # so that Jinja computes no constant expression while it compiles
        def output(_: Context, value: Any) -> str:
            text = self._text(value)
            budget.spend(len(text))
            return text

        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
            finalize=output,
        )
        self._budget = budget
        self.globals = {name: value for name, value in self.globals.items() if name in _GLOBALS}
        self.globals |= {"namespace": _Namespace, "raise_exception": _refuse, "strftime_now": _now}
        filters = {name: self.filters[name] for name in _FILTERS}
        filters |= {"indent": self._indent, "join": self._join, "replace": self._replace, "tojson": self._to_json}
        self.filters = {name: self._bounded(function) for name, function in filters.items()}
        self.filters |= {"_step": lambda _: budget.step(), "_made": budget.admit, "_concatenated": self._join}

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # with Jinja's mark of what the function takes first
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._budget.step()
            return self._budget.admit(function(*args, **kwargs))

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Count a call and what it returns."""
        budget = __self._budget
        budget.step()
        if __obj in (dict, _Namespace):
            named = {name: value for name, value in kwargs.items() if name not in _SCOPES}
            _weight([*args, named], limit=budget.value)
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str) and name == "join":
            return __self._join(args[0], text)
        if isinstance(text, str) and name == "replace":
            return __self._replace(text, *args)
        return budget.admit(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator after checking how much it makes."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    self._budget.spend(len(value) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
            self._text(right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._budget.check_bits(left.bit_length() * right)
        return self._budget.admit(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Leave out methods of text and numbers that make much of little."""
        if isinstance(obj, (str, bytes, int, float)):
            return isinstance(obj, str) and attr in _TEXT_METHODS
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Leave out `str.format`: its widths make gigabytes."""
        return None if super().wrap_str_format(value) is None else _no_format

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            _weight(value, limit=self._budget.value)
        return str(value)

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        texts, separator = [self._text(item) for item in value], self._text(d)
        self._budget.spend(sum(map(len, texts)) + len(separator) * len(texts))
        return separator.join(texts)

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self._text(s), self._text(old), self._text(new)
        times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
        self._budget.spend(len(text) + times * len(new))
        return text.replace(old, new, times)

    def _indent(self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text, columns = self._text(s), len(width) if isinstance(width, str) else width
        if columns > _WIDTH:
            raise _TooMuchError(f"the template indents by more than {_WIDTH} columns")
        self._budget.spend(len(text) + columns * (text.count("\n") + 1))
        return do_indent(text, width, first, blank)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        _weight(value, limit=self._budget.value)
        if (indent is not None and indent > _WIDTH) or max(map(len, separators or ("",))) > _WIDTH:
            raise _TooMuchError(f"the template writes JSON with more than {_WIDTH} columns between values")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_widths(form: str) -> None:
    for spec in re.findall(r"%(?:\([^)]*\))?([^a-zA-Z%]*)", form):
        if "*" in spec or any(int(number[:9]) > _WIDTH for number in re.findall("[0-9]+", spec)):
            raise _TooMuchError(f"the template formats to more than {_WIDTH} columns")


def _refuse(message: Any) -> NoReturn:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    if len(form) > _WIDTH or re.search(r"%[^a-zA-Z%]*\d", form):  # "%1000000000d" is a width
        raise _TooMuchError("the template asks for the date in a format with widths")
    return datetime.now().strftime(form)


def _no_format(*_: Any, **__: Any) -> NoReturn:
    raise TemplateError("str.format is not available to chat templates: use ~ or %")
