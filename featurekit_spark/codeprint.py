"""The fingerprint of a builder's code, which is its version unless it declares one.

Owns which changes of code count. Comments, docstrings, layout and annotations do not, nor declarations that say how a
value is kept or called and not what it is. Reads source text; knows no configs, no cache, and runs nothing.
"""

from __future__ import annotations

import ast
import copy
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final
from weakref import WeakKeyDictionary

from featurekit_spark.errors import DefinitionError
from featurekit_spark.fingerprint import canonical_json, digest
from featurekit_spark.sourcetree import class_node, code_of, function_node, module_node

__all__ = ["code_fingerprint", "code_version"]

# Words of a builder that its values do not depend on, or that its config hash holds anyway. They count where the
# code reads them (`self.freshness`). `uses` is counted by what it names.
_DECLARED: Final = frozenset(
    {"default_config", "freshness", "inline", "light", "name", "needs", "paid", "uses", "version"}
)
_READABLE: Final = (_DECLARED | {"Config"}) - {"name"}


def code_version(cls: type, *, library: type, uses: Sequence[Any] = ()) -> str:
    """A builder's version: the one it declares, else its fingerprint.

    A version that a base class declares pins that base. What a subclass adds is its own code, and counts.
    """
    pin = next((owner for owner in cls.__mro__ if "version" in vars(owner)), None)
    declared = vars(pin)["version"] if pin is not None else None
    if pin is None or not declared:
        return code_fingerprint(cls, library=library, uses=uses)
    if pin is cls:
        return str(declared)
    return digest("pinned", str(declared), code_fingerprint(cls, library=pin, uses=uses))


def code_fingerprint(cls: type, *, library: type, uses: Sequence[Any] = ()) -> str:
    """Hash of a class's code, its bases' included, and of the helpers it names.

    Classes from `library` upwards are left out: the library's own code does not decide what a user's feature is.
    Raises DefinitionError for code whose source cannot be read.
    """
    owners = [owner for owner in cls.__mro__ if not issubclass(library, owner)]
    codes = [_code(owner, builder=True) for owner in owners]
    helpers = [_helper(helper, library) for helper in uses]
    whole = any(code.reads for code in (*codes, *helpers))
    shapes = [code.whole if whole else code.shape for code in codes]
    return digest("code", *shapes, *sorted(helper.whole for helper in helpers))


@dataclass(frozen=True)
class _Code:
    """Code as text. `shape`: without the words of _DECLARED. `reads`: which of them it reads."""

    shape: str
    whole: str
    reads: frozenset[str] = frozenset()


# Reading and parsing takes some 20 ms for a class, and every request with a config of its own asks again. A class or
# function that is defined anew is another object; a module stays the same object when it is reloaded.
_builders: WeakKeyDictionary[Any, _Code] = WeakKeyDictionary()
_helpers: WeakKeyDictionary[Any, _Code] = WeakKeyDictionary()


def _code(thing: type | FunctionType, *, builder: bool = False) -> _Code:
    known = _builders if builder else _helpers
    if thing not in known:
        known[thing] = _read_class(thing, builder) if isinstance(thing, type) else _read_function(thing)
    return known[thing]


def _helper(thing: Any, library: type) -> _Code:
    """What `uses` names: code by its shape, data by its value, what others ship by its name."""
    match thing:
        case functools.partial():
            bound = canonical_json([thing.args, thing.keywords])
            return _joined(f"partial {bound}", [_helper(thing.func, library)])
        case type() | FunctionType() | ModuleType() if _is_shipped_with_python(thing):
            return _named(thing)
        case type():
            skipped = library.__module__
            owners = [o for o in thing.__mro__ if not _is_shipped_with_python(o) and o.__module__ != skipped]
            return _joined("class", [_code(owner) for owner in owners])
        case ModuleType():
            text = _shape(_readable(thing, lambda: module_node(thing)))
            return _Code("", text, _reads(text))
        case MethodType():
            return _joined("method", [_helper(thing.__func__, library), _helper(thing.__self__, library)])
        case re.Pattern():
            return _Code("", f"pattern {thing.pattern!r} {thing.flags}")
        case FunctionType():
            return _code(thing)
    if hasattr(thing, "__wrapped__"):  # functools.cache and the like
        return _helper(thing.__wrapped__, library)
    if callable(thing) and hasattr(thing, "__name__"):  # compiled code
        return _named(thing)
    try:
        return _Code("", canonical_json(thing))
    except DefinitionError as error:
        raise DefinitionError(
            f"uses names {thing!r}, a {type(thing).__name__}, which has no fingerprint. Name functions, classes, "
            "modules and plain values, or declare a version on the builder."
        ) from error


def _joined(kind: str, codes: Sequence[_Code]) -> _Code:
    reads = frozenset[str]().union(*(code.reads for code in codes))
    return _Code("", digest(kind, *(code.whole for code in codes)), reads)


def _named(thing: Any) -> _Code:
    name = getattr(thing, "__qualname__", getattr(thing, "__name__", type(thing).__name__))
    return _Code("", f"name {getattr(thing, '__module__', None)}.{name}")


def _is_shipped_with_python(thing: Any) -> bool:
    name = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    top = name.partition(".")[0]
    if top not in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(top), "__file__", None)  # a user's own `calendar.py` is not Python's
    return file is None or file.startswith(_STDLIB)


_STDLIB: Final = os.path.dirname(os.__file__)  # noqa: PTH120 - no Path needed for a prefix


def _readable(thing: Any, read: Any) -> Any:
    try:
        return read()
    except (OSError, SyntaxError, TypeError) as error:
        raise DefinitionError(
            f"the source of {getattr(thing, '__qualname__', thing)!r} cannot be read ({error}), so its code has no "
            'fingerprint. Declare `version = "1"` on the builder, and change it when the feature should be recomputed.'
        ) from error


def _read_class(cls: type, builder: bool) -> _Code:
    if _is_shipped_with_python(cls) and cls.__module__ != "builtins":  # abc.ABC, enum.Enum
        return _Code(_named(cls).whole, _named(cls).whole)
    node: ast.ClassDef = _readable(cls, lambda: class_node(cls))
    rebound = {name for n in ast.walk(node) if isinstance(n, ast.Nonlocal) for name in n.names}
    closed = [
        text
        for code_owner in vars(cls).values()
        for text in _closed_over(code_owner, rebound, functions=False)
    ]
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    head = [_shape(bases), _shape(node.keywords), _shape(node.decorator_list), *sorted(set(closed))]
    plain = builder and not node.decorator_list  # a decorator such as dataclass reads annotations
    body = [part for line in _statements(node.body) for part in _one_by_one(line)]
    whole = [_member(cls, line, plain) for line in body]
    if not builder:
        return _Code("", digest("class", *head, *whole), _reads(*whole))
    counted = [_without_defaults(line) for line in body if not _declares(line)]
    shape = [_member(cls, line, plain) for line in counted]
    return _Code(digest("class", *head, *shape), digest("class", *head, *whole), _reads(*shape))


def _read_function(function: FunctionType) -> _Code:
    original = function
    while isinstance(getattr(original, "__wrapped__", None), FunctionType):
        original = original.__wrapped__  # type: ignore[attr-defined]
    text = _shape(_readable(original, lambda: function_node(original)))
    closed = sorted(_closed_over(original, set(), functions=True))
    return _Code("", digest("function", text, *closed), _reads(text))


def _closed_over(thing: Any, skipped: set[str], *, functions: bool) -> Iterator[str]:
    """Values that a factory's function was made with: plain ones, and functions where a decorator may hold one."""
    code, function = code_of(thing), getattr(thing, "__func__", thing)
    if code is None or not isinstance(function, FunctionType):
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if _is_plain(value) and name not in skipped:
            yield f"closure {name}={value!r}"
        elif functions and isinstance(value, FunctionType) and value is not thing:
            yield f"closure {name}={_code(value).whole}"


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes)


# -- syntax trees as text ------------------------------------------------------------------------------------


def _member(cls: type, node: ast.stmt, plain: bool) -> str:
    """A statement of a class body. A constant counts by its value, however it is written."""
    match node:
        case ast.AnnAssign(target=ast.Name(id=name), value=value) if plain:
            pass
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            pass
        case _:
            return _shape(node)
    if value is None:
        return ""
    try:
        constant = ast.literal_eval(value)  # as written: the attribute may have been counted up since
    except (ValueError, TypeError):
        constant = vars(cls).get(name, [])
    return f"{name}={constant!r}" if _is_plain(constant) else f"{name}={_shape(value)}"


def _declares(node: ast.stmt) -> bool:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name in _DECLARED
        case ast.FunctionDef(name=name):
            return name in _DECLARED
    return False


def _one_by_one(line: ast.stmt) -> list[ast.stmt]:
    """`key, value = ("k",), int` and `a = b = 1` as an assignment for each name."""
    if not isinstance(line, ast.Assign):
        return [line]
    found: list[ast.stmt] = []
    for target in line.targets:
        match target, line.value:
            case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values) and not any(
                isinstance(item, ast.Starred) for item in (*names, *values)
            ):
                found += [ast.Assign([name], value) for name, value in zip(names, values, strict=True)]
            case _:
                found.append(ast.Assign([target], line.value))
    return found


def _without_defaults(node: ast.stmt) -> ast.stmt:
    """A builder's `Config` less the defaults of its fields: the config hash holds the values in use."""
    if not (isinstance(node, ast.ClassDef) and node.name == "Config"):
        return node
    body: list[ast.stmt] = []
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.dump(line.annotation):
            line = ast.AnnAssign(line.target, line.annotation, simple=line.simple)
        body.append(line)
    config = copy.copy(node)
    config.body = body
    return config


def _reads(*shapes: str) -> frozenset[str]:
    """Which of the words the code reads: `self.freshness`, `getattr(self, "freshness")`."""
    return frozenset(name for text in shapes for name in _READ.findall(text)) & _READABLE


_READ: Final = re.compile(r"(?:attr|value)='(\w+)'")


def _statements(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Without what does nothing: docstrings and other bare constants, `pass`."""
    return [
        s
        for s in body
        if not isinstance(s, ast.Pass) and not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
    ]


_SKIPPED: Final = {"kind", "type_comment", "type_params"}


def _shape(node: Any, in_function: bool = False) -> str:
    """A syntax tree as text, empty fields left out (newer Pythons add such fields), annotations in functions too."""
    match node:
        case list() if node and isinstance(node[0], ast.stmt):
            kept = (_shape(item, in_function) for item in _statements(node))
            return f"[{','.join(text for text in kept if text)}]"
        case list():
            return f"[{','.join(_shape(item, in_function) for item in node)}]"
        case ast.AnnAssign(target=target, value=value) if in_function:
            return "" if value is None else _shape(ast.Assign([target], value), in_function)
        case ast.AST():
            inner = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(node, ast.ClassDef):
                inner = False  # its annotations may be a dataclass's fields
            fields = [
                f"{name}={text}"
                for name, value in ast.iter_fields(node)
                if value is not None and name not in _SKIPPED and not _is_annotation(node, name)
                if (text := _shape(value, inner)) != "[]"
            ]
            return f"{type(node).__name__}({','.join(fields)})"
    return repr(node)


def _is_annotation(node: ast.AST, field: str) -> bool:
    return (isinstance(node, ast.arg) and field == "annotation") or (
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and field == "returns"
    )
