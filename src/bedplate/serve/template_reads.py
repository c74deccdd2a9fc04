"""What a chat template reads of the messages that it is shown, as its source says.

Values are followed from `messages` on: through names, loops, filters, arguments of macros. Where one goes to something
that is not known here, such as a filter that writes all of it, the template may read all of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as _LoopControls
from jinja2.parser import Parser

_LONGEST = 1 << 17  # characters of a template that is looked through: published ones have 17,000 at most
_ROUNDS = 20  # in which values are followed. A name that is made of another one mostly stands after it.
_DEEPEST = 4  # names of a field of a field
_AS_THEY_ARE = {"list", "reverse", "sort", "unique", "select", "reject", "selectattr", "rejectattr", "slice"}
_ONE_OF_THEM = {"first", "last", "random", "min", "max"}
_COUNTS = {"length", "count"}

_Path = tuple[str, ...]


class _Value(NamedTuple):
    """path: the fields that lead to it from a message. Empty: it is one.  is_list: it has several of them."""

    path: _Path
    is_list: bool = False


_Values = frozenset[_Value]
_NONE: _Values = frozenset()


class Reads:
    """fields: of messages, by the fields that lead to them.  whole: where all may be read."""

    def __init__(self, fields: Iterable[_Path], whole: Iterable[_Path]) -> None:
        self._fields, self._whole = frozenset(fields), frozenset(whole)

    def names(self, *path: str) -> bool:
        """Whether a field of a message is read by name, or a field of a field: `names("tool_calls", "id")`."""
        return path in self._fields

    def has(self, *path: str) -> bool:
        """Whether it may be read, by name or with all that stands beside it."""
        return path in self._fields or any(path[:length] in self._whole for length in range(len(path) + 1))


@lru_cache(64)
def reads_of(template: str) -> Reads:
    """template: its source. What is too long, or too deep, may read all."""
    try:
        if len(template) <= _LONGEST and (found := _Follower().follow(_PARSER.parse(template))) is not None:
            return found
    except (jinja2.TemplateError, RecursionError):
        pass
    return Reads((), ((),))


class _Shown(Extension):
    """`{% generation %}…{% endgeneration %}`, as transformers has it."""

    tags = {"generation"}  # noqa: RUF012 — jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_PARSER = jinja2.Environment(extensions=[_Shown, _LoopControls])


class _Follower:
    """A name has what it is anywhere in the template."""

    def __init__(self) -> None:
        self._names: defaultdict[str, set[_Value]] = defaultdict(set)
        self._names["messages"].add(_Value((), is_list=True))
        self._macros: dict[str, list[str]] = {}
        self._fields: set[_Path] = set()
        self._whole: set[_Path] = set()

    def follow(self, template: nodes.Template) -> Reads | None:
        """None: it takes too long."""
        for macro in template.find_all(nodes.Macro):
            self._macros[macro.name] = [argument.name for argument in macro.args]
        for _ in range(_ROUNDS):
            before = self._known()
            self._statements(template)
            if self._known() == before:
                return Reads(self._fields, self._whole)
        return None

    def _known(self) -> int:
        return sum(map(len, self._names.values())) + len(self._fields) + len(self._whole)

    def _statements(self, node: nodes.Node) -> None:
        """All that stands in it."""
        for child in node.iter_child_nodes():
            if isinstance(child, nodes.Expr):
                self._of(child)
            else:
                self._statements(child)
        if isinstance(node, nodes.Output):
            for shown in node.nodes:
                self._all_of(self._of(shown))
        elif isinstance(node, nodes.For):
            self._loop(node)
        elif isinstance(node, nodes.Assign):
            self._assign(node.target, node.node)
        elif isinstance(node, nodes.With):
            for target, value in zip(node.targets, node.values, strict=True):
                self._assign(target, value)
        elif isinstance(node, nodes.Macro):
            for argument, default in zip(reversed(node.args), reversed(node.defaults), strict=False):
                self._names[argument.name] |= self._of(default)
        elif isinstance(node, nodes.FilterBlock):
            self._all_of(self._of(node.filter))

    def _loop(self, node: nodes.For) -> None:
        found = self._of(node.iter)
        ones = frozenset(_Value(value.path) for value in found)
        self._bind(node.target, ones)
        for name in ("loop.previtem", "loop.nextitem"):
            self._names[name] |= ones
        for value in found:
            if not value.path and not value.is_list:  # the names in a message
                self._whole.add(value.path)

    def _assign(self, target: nodes.Node, value: nodes.Node) -> None:
        if (
            isinstance(value, nodes.Call)
            and isinstance(target, nodes.Name)
            and _name(value.node) == "namespace"
        ):
            for pair in value.kwargs:
                self._names[f"{target.name}.{pair.key}"] |= self._of(pair.value)
        else:
            self._bind(target, self._of(value))

    def _bind(self, target: nodes.Node, values: _Values) -> None:
        if isinstance(target, nodes.Name):
            self._names[target.name] |= values
        elif isinstance(target, nodes.NSRef):
            self._names[f"{target.name}.{target.attr}"] |= values
        else:  # several names at once
            for name in target.find_all(nodes.Name):
                self._names[name.name] |= values

    def _all_of(self, values: _Values) -> None:
        self._whole.update(value.path for value in values)

    def _of(self, node: nodes.Node | None) -> _Values:
        """What an expression can be, of messages."""
        if node is None or isinstance(node, (nodes.Const, nodes.TemplateData)):
            return _NONE
        if isinstance(node, nodes.Name):
            return frozenset(self._names.get(node.name, ()))
        if isinstance(node, nodes.Getattr):
            own = frozenset(self._names.get(f"{_name(node.node)}.{node.attr}", ()))
            return own | self._field(self._of(node.node), node.attr)
        if isinstance(node, nodes.Getitem):
            return self._item(self._of(node.node), node.arg)
        if isinstance(node, nodes.Filter):
            return self._filtered(node)
        if isinstance(node, nodes.Call):
            return self._called(node)
        if isinstance(node, nodes.Compare):
            return self._compared(node)
        parts = [self._of(child) for child in node.iter_child_nodes()]
        if isinstance(node, (nodes.Test, nodes.Not)):
            return _NONE
        if isinstance(node, nodes.And):  # what is left of it is empty, if it is the left
            return parts[1]
        if isinstance(node, nodes.CondExpr):
            return _NONE.union(*parts[1:])
        found = _NONE.union(*parts)
        if isinstance(node, (nodes.List, nodes.Tuple)):
            return frozenset(_Value(value.path, is_list=True) for value in found)
        if isinstance(node, (nodes.Or, nodes.Add)):
            return found
        self._all_of(found)
        return _NONE

    def _field(self, values: _Values, name: str) -> _Values:
        paths = {(*value.path, name) for value in values if len(value.path) < _DEEPEST}
        self._fields |= paths
        return frozenset(map(_Value, paths))

    def _item(self, values: _Values, key: nodes.Node) -> _Values:
        if isinstance(key, nodes.Slice):
            for part in key.iter_child_nodes():
                self._of(part)
            return values
        if isinstance(key, nodes.Const) and isinstance(key.value, str):
            return self._field(values, key.value)
        self._of(key)
        if not isinstance(key, nodes.Const):  # of a list, it is a place
            self._all_of(frozenset(value for value in values if not value.is_list))
        return frozenset(_Value(value.path) for value in values)

    def _filtered(self, node: nodes.Filter) -> _Values:
        values = self._of(node.node)
        given = [*node.args, *(pair.value for pair in node.kwargs)]
        others = _NONE.union(*map(self._of, given))
        named = [pair.value for pair in node.kwargs if pair.key == "attribute"]
        named += node.args[:1] if node.name in ("selectattr", "rejectattr") else []
        found = values
        for one in named:
            for name in str(getattr(one, "value", "")).split("."):
                found = self._field(found, name)
        if node.name in ("default", "d"):
            return values | others
        if node.name in _AS_THEY_ARE:
            return values
        if node.name in _ONE_OF_THEM:
            return frozenset(_Value(value.path) for value in values)
        if node.name == "map" and named:
            return frozenset(_Value(value.path, is_list=True) for value in found)
        if node.name not in _COUNTS:
            self._all_of(values | others)
        return _NONE

    def _called(self, node: nodes.Call) -> _Values:
        given = [self._of(one) for one in node.args]
        pairs = {pair.key: self._of(pair.value) for pair in node.kwargs}
        names = self._macros.get(_name(node.node))
        if names is not None and not (node.dyn_args or node.dyn_kwargs) and len(given) <= len(names):
            for name, values in [*zip(names, given, strict=False), *pairs.items()]:
                self._names[name] |= values
            return _NONE
        method = node.node if isinstance(node.node, nodes.Getattr) else None
        of = self._of(node.node if method is None else method.node)
        if method is not None:
            key = node.args[0] if node.args else None
            if method.attr == "get" and isinstance(key, nodes.Const):
                return self._field(of, str(key.value)).union(*given)
        others = (self._of(node.dyn_args), self._of(node.dyn_kwargs))
        if _name(node.node) == "namespace":  # see `_assign`
            pairs = {}
        self._all_of(of.union(*given, *pairs.values(), *others))
        return _NONE

    def _compared(self, node: nodes.Compare) -> _Values:
        self._of(node.expr)
        for operand in node.ops:
            right = self._of(operand.expr)
            if operand.op in ("in", "notin"):
                if isinstance(node.expr, nodes.Const):
                    self._field(right, str(node.expr.value))
                else:
                    self._all_of(frozenset(value for value in right if not value.is_list))
        return _NONE


def _name(node: nodes.Node) -> str:
    return node.name if isinstance(node, nodes.Name) else ""
