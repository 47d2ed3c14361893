"""Where the code of a class, a function or a module stands in its source file, as a syntax tree.

Finds things by the lines that their compiled code names, so that two classes of one name in one file, classes of a
notebook's cells and several lambdas on a line are told apart. Judges nothing; what counts is `codeprint`'s affair.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import sys
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

__all__ = ["class_node", "code_of", "function_node", "module_node"]

FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def class_node(cls: type) -> ast.ClassDef:
    """The statement that defined `cls`. Raises OSError where it cannot be told."""
    short = cls.__qualname__.rpartition(".")[2]
    for member in vars(cls).values():
        code = code_of(member)
        # Borrowed functions and those that a dataclass makes stand elsewhere.
        if code is None or code.co_qualname.rpartition(".")[0] != cls.__qualname__:
            continue
        around = [
            node
            for node in ast.walk(_tree(code.co_filename, cls.__module__))
            if isinstance(node, ast.ClassDef)
            and node.name == short
            and node.lineno <= code.co_firstlineno <= (node.end_lineno or 0)
        ]
        if around:
            return max(around, key=lambda node: node.lineno)
    tree = _tree(inspect.getsourcefile(cls) or "", cls.__module__)
    found = list(_classes(tree, cls.__qualname__.split(".")))
    if not found:
        raise OSError("its definition is not in its module's file")
    if len({ast.dump(node) for node in found}) > 1:
        raise OSError(
            f"its file defines {len(found)} classes of that name, and it has no method to tell it by"
        )
    return found[0]


def function_node(function: FunctionType) -> FunctionNode:
    """The def or lambda that made `function`. Raises OSError where it cannot be told."""
    code = function.__code__
    tree = _tree(code.co_filename, function.__module__)
    if code.co_name != "<lambda>":
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first == code.co_firstlineno:
                    return node
        raise OSError("its definition is not in its file")
    lambdas = [n for n in ast.walk(tree) if isinstance(n, ast.Lambda) and n.lineno == code.co_firstlineno]
    if len(lambdas) > 1:
        places = [
            (start, column)
            for start, _, column, end_column in code.co_positions()
            if start is not None and column is not None and end_column
        ]
        # Of nested ones the innermost that holds all of its code.
        lambdas = [n for n in lambdas if places and all(_within(n.body, place) for place in places)]
        lambdas.sort(key=lambda n: (n.lineno, n.col_offset), reverse=True)
    if not lambdas:
        raise OSError("there are several lambdas on its line; give it a name with def")
    return lambdas[0]


def module_node(module: ModuleType) -> ast.Module:
    """A module's whole text; of a package, that of its `__init__`."""
    return _tree(inspect.getsourcefile(module) or "", module.__name__)


def code_of(member: Any) -> CodeType | None:
    """The compiled code of a class's member, unwrapped; None for what is no function."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    member = (
        inspect.unwrap(getattr(member, "__func__", member))
        if callable(member) or hasattr(member, "__func__")
        else member
    )
    return member.__code__ if isinstance(member, FunctionType) else None


def _classes(tree: ast.AST, path: list[str]) -> list[ast.ClassDef]:
    """Classes at a qualified name, `<locals>` included, wherever branches put them."""
    found: list[ast.ClassDef] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name != path[0]:
                continue
            rest = path[1:]
            if not rest:
                found += [node] if isinstance(node, ast.ClassDef) else []
            elif isinstance(node, ast.ClassDef):
                found += _classes(node, rest)
            elif rest[0] == "<locals>":
                found += _classes(node, rest[1:])
        else:
            found += _classes(node, path)
    return found


def _within(node: ast.expr, place: tuple[int, int]) -> bool:
    start = (node.lineno, node.col_offset)
    end = (node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)
    return start <= place <= end


def _tree(filename: str, module: str | None) -> ast.Module:
    linecache.checkcache(filename)
    # With the module's globals, by which a file inside an archive is found.
    lines = linecache.getlines(filename, getattr(sys.modules.get(module or ""), "__dict__", None))
    if not lines:
        raise OSError(f"there is no source text at {filename!r}")
    return _parsed("".join(lines))


@functools.lru_cache(maxsize=8)
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)
