"""Prompt templates in Jinja2, for where named fields are not enough: conditions, filters, bounded loops.

Owns what a template may do. It sees the given fields and nothing else; data is put in as it is and never evaluated;
every template ends. Must not know builders, products or settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NoReturn

from featurekit_spark.errors import BuildError, ConfigError, known_names

if TYPE_CHECKING:
    from jinja2 import Environment, Template

__all__ = ["LONGEST_PROMPT", "LONGEST_TEMPLATE", "MOST_STEPS", "check_template", "render_jinja"]

LONGEST_TEMPLATE: Final = 10_000
LONGEST_PROMPT: Final = 100_000
"""Characters; what `join` and `replace` make may not be longer either."""
MOST_STEPS: Final = 1_000
"""Turns of all loops of one prompt together."""

_FILTERS: Final = (
    "capitalize",
    "d",
    "default",
    "first",
    "float",
    "int",
    "last",
    "length",
    "list",
    "lower",
    "reverse",
    "round",
    "sort",
    "title",
    "trim",
    "truncate",
    "unique",
    "upper",
    "wordcount",
)
_TESTS: Final = ("defined", "eq", "even", "ge", "gt", "in", "le", "lower", "lt", "ne", "none", "odd", "upper")
_OF_LOOPS: Final = frozenset({"index", "index0", "first", "last", "length", "revindex", "revindex0"})
_STEPS: Final = "_steps"
_COUNTED: Final = "_counted"
_SHOWN: Final = 80


class _LimitError(BuildError):
    """A template that would go on for too long."""


@dataclass
class _Steps:
    left: int = MOST_STEPS


def check_template(template: str, fields: Iterable[str]) -> None:
    """Raises ConfigError for a template that does not parse, reads other than these fields, or does what none may."""
    _compiled(template, frozenset(fields))


def render_jinja(template: str, columns: Mapping[str, Sequence[Any]]) -> list[str | BuildError]:
    """The template filled in for each row; an error in the place of a row that it cannot be filled in for.

    Raises ConfigError as `check_template` does.
    """
    compiled = _compiled(template, frozenset(columns))
    return [
        _filled(compiled, template, dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]


def _filled(compiled: Template, template: str, fields: dict[str, Any]) -> str | BuildError:
    parts: list[str] = []
    size = 0
    try:
        for part in compiled.generate({**fields, _STEPS: _Steps()}):
            parts.append(part)
            size += len(part)
            _refuse_long(size)
    except Exception as error:  # a filter may raise anything
        why = str(error) if isinstance(error, _LimitError) else f"{type(error).__name__}: {error}"
        return BuildError(
            f"prompt_template {_short(template)} cannot be filled in with {', '.join(sorted(fields))}: {why}"
        )
    return "".join(parts)


@lru_cache(maxsize=64)
def _compiled(template: str, fields: frozenset[str]) -> Template:
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.environment import Template
    except ImportError as error:
        raise ConfigError(
            "template_engine is jinja, but jinja2 is not installed: pip install 'featurekit-spark[llm]', or write the "
            "template with named fields, template_engine: fields."
        ) from error
    if len(template) > LONGEST_TEMPLATE:
        raise ConfigError(
            f"prompt_template {_short(template)} has {len(template)} characters, at most {LONGEST_TEMPLATE} are allowed"
        )
    environment = _environment()
    try:
        tree = environment.parse(template)
        _check(tree, template, fields)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        code = environment.compile(tree)
    except TemplateError as error:
        said = _unknown(error.message or "", environment) or error.message
        raise ConfigError(
            f"prompt_template {_short(template)} is no Jinja template: {said} (line {getattr(error, 'lineno', 1)})"
        ) from None
    except (RecursionError, SyntaxError, MemoryError):  # Python's own limits, of its parser as well
        raise ConfigError(f"prompt_template {_short(template)} is nested too deeply") from None
    return Template.from_code(environment, code, {})


def _environment() -> Environment:
    from jinja2 import StrictUndefined, pass_context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    )
    made.globals.clear()
    own = {"join": _join, "replace": _replace, "split": _split, "tojson": _tojson}
    made.filters = {name: made.filters[name] for name in _FILTERS} | own | {_COUNTED: pass_context(_counted)}
    made.tests = {name: made.tests[name] for name in _TESTS}
    return made


def _check(tree: Any, template: str, fields: frozenset[str]) -> None:
    """Refuse what a template may not do, and names that nothing gives."""
    from jinja2 import meta, nodes

    def refuse(node: nodes.Node, what: str) -> NoReturn:
        raise ConfigError(
            f"prompt_template {_short(template)} has {what} in line {node.lineno}; a template may read its fields, "
            "and use conditions, loops, filters, slices, + and -."
        )

    # Whatever is not listed is refused: what calls, assigns, imports or multiplies might leave the given fields, or
    # never end.
    words = (nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Concat)
    logic = (
        nodes.If,
        nodes.CondExpr,
        nodes.Test,
        nodes.Compare,
        nodes.Operand,
        nodes.And,
        nodes.Or,
        nodes.Not,
    )
    numbers = (nodes.Add, nodes.Sub, nodes.Neg, nodes.Slice, nodes.Keyword)
    for node in tree.find_all(nodes.Node):
        match node:
            case nodes.Name(name="self"):
                refuse(node, "the name 'self'")
            case nodes.For(recursive=True):
                refuse(node, "a recursive loop")
            case _ if isinstance(node, words + logic + numbers):
                pass
            case nodes.For():
                pass
            case nodes.Filter(name=name) if name != _COUNTED:
                pass
            case nodes.Getitem(arg=nodes.Slice() | nodes.Neg() | nodes.Const(value=int())):
                pass
            case nodes.Getattr(node=nodes.Name(name="loop"), attr=name) if name in _OF_LOOPS:
                pass
            case nodes.Getitem():
                refuse(node, "an index that is no number")
            case nodes.Getattr(attr=name):
                refuse(node, f"the attribute {name!r}")
            case nodes.Filter(name=name):
                refuse(node, f"the filter {name!r}")
            case _:
                refuse(node, f"{type(node).__name__.lower()!r}")
    read = meta.find_undeclared_variables(tree)
    unknown = sorted(read - fields)
    if not read:
        raise ConfigError(
            f"prompt_template {_short(template)} reads no field, so every prompt would be the same; write a field as "
            f"{{{{ {min(fields)} }}}}."
        )
    if unknown:
        raise ConfigError(
            f"prompt_template {_short(template)} has the field {unknown[0]!r}, which nothing gives. "
            f"{known_names(unknown[0], fields)}"
        )


def _unknown(said: str, environment: Environment) -> str | None:
    """Jinja's word about an unknown filter or test, with those that exist."""
    for kind, known in (("filter", environment.filters), ("test", environment.tests)):
        if said.startswith(f"No {kind} named "):
            name = said.split("'")[1]
            return f"{said} {known_names(name, set(known) - {_COUNTED})}"
    return None


def _refuse_long(size: int) -> None:
    if size > LONGEST_PROMPT:
        raise _LimitError(f"it makes more than {LONGEST_PROMPT} characters")


def _counted(context: Any, items: Iterable[Any]) -> Iterator[Any]:
    steps: _Steps = context[_STEPS]
    for item in items:
        steps.left -= 1
        if steps.left < 0:
            raise _LimitError(f"its loops take more than {MOST_STEPS} turns")
        yield item


def _join(items: Iterable[Any], by: str = "") -> str:
    parts = [str(item) for item in items]
    _refuse_long(sum(map(len, parts)) + len(by) * max(len(parts) - 1, 0))
    return by.join(parts)


def _replace(text: str, old: str, new: str) -> str:
    text = str(text)
    _refuse_long(len(text) + text.count(old) * max(len(new) - len(old), 0))
    return text.replace(old, new)


def _split(text: str, by: str | None = None) -> list[str]:
    return str(text).split(by)


def _tojson(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(template: str) -> str:
    return repr(template) if len(template) <= _SHOWN else f"{template[: _SHOWN - 3]!r}..."
