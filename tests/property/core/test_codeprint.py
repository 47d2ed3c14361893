"""Which changes of a builder's code count: any mix of rewritings that say the same keeps its fingerprint, and any
change of what it does changes it, whatever else was rewritten."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import linecache
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.builder import bind
from featurekit_spark.errors import DefinitionError

SOURCE = """
import functools
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder, Source
from featurekit_spark.freshness import Freshness

GROUP = ("merchant", "market")
LIMIT = 20


def shorten(text, size=10):
    return text[:size]


def louder(factor):
    def shout(text):
        return text.upper() + "!" * factor

    return shout


class Base(FeatureBuilder[str]):
    suffix = "."

    def finish(self, text):
        return shorten(text) + self.suffix


class Feature(Base):
    key = (*GROUP, "product_id")
    value = pa.string()
    uses = (shorten, louder(2), re.compile("a+"))
    freshness = Freshness(ttl="1h")
    limit = LIMIT

    @dataclass(frozen=True)
    class Config:
        words: int = 3

        def half(self):
            return self.words // 2

    def default_config(self, context):
        return self.Config(words=5)

    def build_one(self, inputs, config, context):
        words = inputs["product_id"].split()
        if not words:
            return None
        kept = [word for word in words if len(word) < self.limit]
        return self.finish(" ".join(kept[: config.half()]))
"""

_numbers = itertools.count()


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The version of a class of a module with some source text."""
    folder = tmp_path_factory.mktemp("modules")

    def load(source: str, name: str = "Feature") -> str:
        return bind(getattr(_module(folder, source), name), None).version

    return load


def _module(folder: Path, source: str) -> Any:
    path = folder / f"printed_{next(_numbers)}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def edited(*pairs: str) -> Callable[[str], str]:
    """An edit that must find what it replaces: (old, new, old, new ...)."""

    def edit(source: str) -> str:
        for old, new in zip(pairs[::2], pairs[1::2], strict=True):
            if old not in source:
                raise LookupError(f"{old!r} is not in the source")
            source = source.replace(old, new)
        return source

    return edit


SAYS_THE_SAME: dict[str, Callable[[str], str]] = {
    "comment": edited("if not words:\n", "if not words:  # nothing to say\n"),
    "comment line": edited("        kept =", "        # short ones\n        kept ="),
    "class docstring": edited("class Feature(Base):\n", 'class Feature(Base):\n    """What it is."""\n\n'),
    "method docstring": edited("        words = inputs", '        """How."""\n        words = inputs'),
    "helper docstring": edited("    return text[:size]", '    """Cut."""\n    return text[:size]'),
    "attribute docstring": edited('    suffix = "."\n', '    suffix = "."\n    """Comes last."""\n'),
    "quotes": edited('" ".join', "' '.join"),
    "line breaks": edited("kept[: config.half()]", "kept[\n            : config.half()\n        ]"),
    "parentheses": edited("len(word) < self.limit", "(len(word)) < (self.limit)"),
    "imports": edited("import functools\n", "import functools\nimport itertools\n"),
    "neighbours": edited("\nclass Base", "\n\nclass Other:\n    pass\n\n\nclass Base"),
    "pass": edited("            return None\n", "            pass\n            return None\n"),
    "helper's annotations": edited(
        "def shorten(text, size=10):", "def shorten(text: str, size: int = 10) -> str:"
    ),
    "method's annotations": edited(
        "def build_one(self, inputs, config, context):",
        "def build_one(self, inputs: dict[str, Any], config: Config, context: Any) -> str | None:",
    ),
    "a local's annotation": edited("kept = [word", "kept: list[str] = [word"),
    "a constant's annotation": edited("    limit = LIMIT", "    limit: ClassVar[int] = LIMIT"),
    "a constant's value spelled out": edited("(*GROUP, ", '("merchant", "market", '),
    "a constant in its base named": edited(
        '    suffix = "."', "    suffix = DOT", "\nclass Base", '\nDOT = "."\n\n\nclass Base'
    ),
    "ttl": edited('ttl="1h"', 'ttl="2h"'),
    "kept how": edited("    value = pa", "    inline = light = False\n    needs = ()\n    value = pa"),
    "order of uses": edited('shorten, louder(2), re.compile("a+")', 'louder(2), re.compile("a+"), shorten'),
    "names in one line": edited("    value = pa.string()\n    uses =", "    value, uses = pa.string(),"),
    "type argument": edited("FeatureBuilder[str]", "FeatureBuilder[str | None]"),
}

DOES_SOMETHING_ELSE: dict[str, Callable[[str], str]] = {
    "operator": edited("// 2", "// 3"),
    "condition": edited("if not words", "if words"),
    "constant": edited('    suffix = "."', '    suffix = "!"'),
    "module constant that the class takes in": edited("LIMIT = 20", "LIMIT = 21"),
    "key": edited('"product_id")', '"product")'),
    "inherited method": edited(" + self.suffix", ""),
    "base": edited(
        "class Feature(Base)",
        "class Feature(Base, Mixin)",
        "class Base",
        "class Mixin:\n    x = 1\n\n\nclass Base",
    ),
    "helper": edited("text[:size]", "text[size:]"),
    "helper's default": edited("size=10", "size=11"),
    "what a factory was given": edited("louder(2)", "louder(3)"),
    "what a factory makes": edited("text.upper()", "text.lower()"),
    "pattern": edited('"a+"', '"b+"'),
    "one helper less": edited("(shorten, louder(2)", "(shorten"),
    "decorator": edited("    def finish", "    @functools.cache\n    def finish"),
    "config's method": edited("self.words // 2", "self.words"),
    "name of a local": edited("kept", "left"),
    "order of statements": edited("        words = inputs", "        assert inputs\n        words = inputs"),
    "null handling": edited("    value = pa", "    accepts_null = True\n    value = pa"),
}


@given(
    st.lists(st.sampled_from(sorted(SAYS_THE_SAME)), unique=True),
    st.sampled_from([None, *sorted(DOES_SOMETHING_ELSE)]),
    st.booleans(),
)
def test_any_mix_of_rewritings(
    version: Callable[..., str], rewritten: list[str], change: str | None, printed: bool
) -> None:
    source = SOURCE
    if change is not None:
        source = DOES_SOMETHING_ELSE[change](source)
    for name in rewritten:
        with suppress(LookupError):  # another edit was at the same place
            source = SAYS_THE_SAME[name](source)
    if printed:  # loses every comment, and lays everything out anew
        source = ast.unparse(ast.parse(source))
    assert (version(source) == version(SOURCE)) == (change is None)


@pytest.mark.parametrize("name", SAYS_THE_SAME)
def test_what_does_not_count(version: Callable[..., str], name: str) -> None:
    assert version(SAYS_THE_SAME[name](SOURCE)) == version(SOURCE)


@pytest.mark.parametrize("name", DOES_SOMETHING_ELSE)
def test_what_counts(version: Callable[..., str], name: str) -> None:
    assert version(DOES_SOMETHING_ELSE[name](SOURCE)) != version(SOURCE)


def test_defaults_count_as_config_and_not_as_code(version: Callable[..., str], tmp_path: Path) -> None:
    other = edited("words: int = 3", "words: int = 4", "words=5", "words=6")(SOURCE)
    assert version(other) == version(SOURCE)
    one, two = (bind(_module(tmp_path, source).Feature, None) for source in (SOURCE, other))
    assert one.config_hash != two.config_hash


def test_what_the_code_reads_of_its_declaration_counts(version: Callable[..., str]) -> None:
    reading = edited("        words = inputs", "        print(self.freshness.ttl)\n        words = inputs")(
        SOURCE
    )
    assert version(reading) != version(edited('"1h"', '"2h"')(reading))
    asking = edited("config.half()", "self.default_config(context).half()")(SOURCE)
    assert version(asking) != version(edited("words=5", "words=6")(asking))


def test_a_class_may_be_renamed(version: Callable[..., str]) -> None:
    renamed = edited("class Feature(Base):\n", 'class Better(Base):\n    name = "Feature"\n')(SOURCE)
    assert version(renamed, "Better") == version(SOURCE)


TWO = """
import pyarrow as pa
from featurekit_spark.builder import FeatureBuilder


def one():
    class Feature(FeatureBuilder[int]):
        key, value = ("k",), pa.int64()

        def build_one(self, inputs, config, context):
            return 1

    return Feature


def make(step):
    class Feature(FeatureBuilder[int]):
        key, value = ("k",), pa.int64()

        def build_one(self, inputs, config, context):
            return step

    return Feature


if True:

    class Feature(FeatureBuilder[int]):
        key, value = ("k",), pa.int64()

        def build_one(self, inputs, config, context):
            return 3

    First = Feature


class Feature(FeatureBuilder[int]):
    key, value = ("k",), pa.int64()

    def build_one(self, inputs, config, context):
        return 4
"""


def test_classes_of_one_name_in_one_file_are_told_apart(tmp_path: Path) -> None:
    module = _module(tmp_path, TWO)
    made = [module.one(), module.make(1), module.make(2), module.First, module.Feature]
    assert len({bind(cls, None).version for cls in made}) == len(made)
    assert bind(module.make(1), None).version == bind(module.make(1), None).version


def test_classes_that_cannot_be_told_apart_must_say_so(tmp_path: Path) -> None:
    text = TWO + "\n\nclass Kind(Feature):\n    step = 1\n\n\nclass Kind(Feature):\n    step = 2\n"
    with pytest.raises(DefinitionError, match="defines 2 classes of that name.*Declare `version"):
        bind(_module(tmp_path, text).Kind, None)


def _lambdas(folder: Path, first: str, second: str) -> str:
    text = f"pair = ({first}, {second})\nmany = [\n    {first},\n]\n"
    text += TWO.replace(
        "class Feature(FeatureBuilder[int]):\n    key, value",
        "class Feature(FeatureBuilder[int]):\n    uses = pair[1:]\n    key, value",
    )
    return bind(_module(folder, text).Feature, None).version


def test_a_lambda_counts_by_itself(tmp_path: Path) -> None:
    plain = _lambdas(tmp_path, "lambda x: x", "lambda x: x * 2")
    assert _lambdas(tmp_path, "lambda x: -x", "lambda x: x * 2") == plain
    assert _lambdas(tmp_path, "lambda x: x", "lambda x: x * 3") != plain
    assert _lambdas(tmp_path, "lambda x: x", "lambda x: (lambda y: y)(x) * 2") != plain


USES = (
    TWO
    + """

import functools
import math
from dataclasses import dataclass
from enum import Enum

def plain(x):
    return x + 1

def wrapping(function):
    def around(x):
        return function(x)
    return around

@wrapping
def wrapped(x):
    return x + 1

@functools.cache
def cached(x):
    return x + 1

class Root:
    def up(self, x):
        return x + 1

class Tool(Root):
    @classmethod
    def make(cls, x):
        return x + 1

class Kind(Enum):
    ONE = 1

@dataclass(frozen=True)
class Table:
    rows: int

PART = functools.partial(plain, 1)

class Using(Feature):
    uses = (HELPER,)
"""
)


@pytest.mark.parametrize(
    "helper", ["plain", "wrapped", "cached", "Tool", "Tool.make", "PART", "functools.partial(cached)"]
)
def test_helpers_of_every_kind(version: Callable[..., str], helper: str) -> None:
    source = USES.replace("HELPER", helper)
    assert version(source, "Using") == version(source.replace("x + 1", "x  +  1  # up"), "Using")
    assert version(source, "Using") != version(source.replace("x + 1", "x + 2"), "Using")


@pytest.mark.parametrize(
    ("helper", "other"),
    [
        ("math.log", "math.log2"),
        ("functools.partial(plain, 1)", "functools.partial(plain, 2)"),
        ("Table(1)", "Table(2)"),
        ("Kind.ONE", "2"),
        ("str.upper", "str.lower"),
        ("pa.compute.utf8_lower", "pa.compute.utf8_upper"),
        ("functools", "math"),
    ],
)
def test_helpers_that_are_data_or_compiled(version: Callable[..., str], helper: str, other: str) -> None:
    source = USES.replace("HELPER", helper).replace("import math", "import math\nimport pyarrow.compute")
    assert version(source, "Using") == version(source + "\n", "Using")
    assert version(source, "Using") != version(source.replace(f"({helper},)", f"({other},)"), "Using")


def test_a_helper_without_a_fingerprint_is_refused(version: Callable[..., str]) -> None:
    with pytest.raises(DefinitionError, match="uses names <object.*which has no fingerprint"):
        version(USES.replace("HELPER", "object()"), "Using")


def test_a_codecs_functions_count(version: Callable[..., str]) -> None:
    source = TWO.replace(
        'class Feature(FeatureBuilder[int]):\n    key, value = ("k",), pa.int64()',
        "from featurekit_spark.values import codec\n\n\ndef encode(v):\n    return str(v).encode()\n\n\n"
        'class Feature(FeatureBuilder[int]):\n    key, value = ("k",), codec(encode, int)',
    )
    assert "codec(" in source
    assert version(source) != version(source.replace("str(v)", "repr(v)"))


PINNED = (
    TWO
    + """

class Pinned(Feature):
    version = "1"

    def build_one(self, inputs, config, context):
        return 5

class Below(Pinned):
    def build_one(self, inputs, config, context):
        return 6

class Unpinned(Pinned):
    version = None
"""
)


def test_a_pin_holds_for_the_class_that_declares_it(version: Callable[..., str]) -> None:
    assert version(PINNED, "Pinned") == "1"
    assert version(PINNED.replace("return 5", "return 7"), "Pinned") == "1"
    # A subclass has code of its own, which the pin says nothing of.
    assert version(PINNED.replace("return 5", "return 7"), "Below") == version(PINNED, "Below")
    assert version(PINNED.replace("return 6", "return 7"), "Below") != version(PINNED, "Below")
    assert version(PINNED.replace('"1"', '"2"'), "Below") != version(PINNED, "Below")
    assert version(PINNED.replace("return 5", "return 7"), "Unpinned") != version(PINNED, "Unpinned")


def test_counters_in_a_class_are_no_code(tmp_path: Path) -> None:
    """What a program counts up while it runs is not what its code says."""
    text = TWO.replace("    First = Feature\n", "    First = Feature\n\ncalls = 0\n")
    one, two = (_module(tmp_path, text + "\n\nclass Counting(Feature):\n    calls = 0\n") for _ in range(2))
    two.Counting.calls = random.Random(0).randrange(1, 9)
    assert bind(one.Counting, None).version == bind(two.Counting, None).version


def test_a_notebooks_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is in `linecache` alone, under a name that is no file; its module has no file either."""

    def cell(body: str) -> str:
        name = f"<cell {next(_numbers)}>"
        text = TWO.replace("return 4", body)
        monkeypatch.setitem(linecache.cache, name, (len(text), None, text.splitlines(keepends=True), name))
        made: dict[str, Any] = {"__name__": "cells"}
        exec(compile(text, name, "exec"), made)
        return bind(made["Feature"], None).version

    assert cell("return 4") == cell("return 4  # again") != cell("return 5")
