"""What import-linter cannot see: what an import costs, what modules offer, words that must not appear."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import featurekit_spark

PACKAGE = Path(featurekit_spark.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def sources(*, below: str = "", but: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.Module]]:
    """(path in the package, syntax tree) of every module below a folder."""
    for path in sorted((PACKAGE / below).rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(but):
            yield name, ast.parse(path.read_text())


def attributes(tree: ast.Module) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def calls(tree: ast.Module) -> set[str]:
    names = (n.func for n in ast.walk(tree) if isinstance(n, ast.Call))
    return {name.id for name in names if isinstance(name, ast.Name)}


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    "module", ["featurekit_spark", "featurekit_spark.builder", "featurekit_spark.errors"]
)
def test_importing_the_library_loads_nothing_heavy(module: str) -> None:
    heavy = ["pyspark", "pandas", "deltalake", "sklearn", "pydantic", "openai", "redis", "typer"]
    if module != "featurekit_spark.builder":  # value types are pyarrow's
        heavy.append("pyarrow")
    code = f"import {module}, sys; print(*sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_warm_local_session_needs_no_spark() -> None:
    code = (
        "from featurekit_spark.session import Session; from featurekit_spark.cache.memory import MemoryCache; "
        "Session(None, MemoryCache(), engine='local'); import sys; print('pyspark' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_exported_names_exist_and_are_sorted(name: str) -> None:
    """Constants, then classes, then functions, as the linter wants them."""
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    if exported is not None:
        assert list(exported) == sorted(exported, key=lambda name: (not name.isupper(), name.islower(), name))
        assert len(set(exported)) == len(exported)
        missing = [item for item in exported if not hasattr(module, item)]
        assert missing == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [name for name, tree in sources() if tree.body and not ast.get_docstring(tree)]
    assert silent == []


def test_annotations_are_never_evaluated_at_import() -> None:
    without = [
        name
        for name, tree in sources()
        if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
        and "__future__" not in imports(tree)
    ]
    assert without == []


def test_spark_is_imported_where_it_is_used() -> None:
    """A top-level import of pyspark would start its import for everybody; `if TYPE_CHECKING` is free."""
    found = [
        name
        for name, tree in sources()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(part.startswith(("pyspark", "delta.")) for part in imports(ast.Module([node], [])))
    ]
    assert found == []


def test_no_rdd_and_one_place_for_the_spark_context() -> None:
    found = {
        name: attributes(tree) & {"rdd", "sparkContext", "_jsc", "_jvm", "_sc"} for name, tree in sources()
    }
    used = {name: words for name, words in found.items() if words}
    assert all(words == {"sparkContext"} for words in used.values()), used
    assert all(name.startswith("engines/") for name in used), used
    assert len(used) <= 1


def test_nobody_sets_a_master() -> None:
    """`testing.spark_session` takes one from the test that asks; `cluster` reads which one there is."""
    found = [
        name for name, tree in sources(but=("testing/", "engines/cluster.py")) if "master" in attributes(tree)
    ]
    texts = [
        name
        for name, tree in sources(but=("testing/", "engines/cluster.py"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "spark.master"
    ]
    assert found == texts == []


def test_nothing_stored_is_a_pickle() -> None:
    """The behaviour suite pickles a cache to see that it can travel; Spark's own pickler says what cannot."""
    found = {
        name: imports(tree) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
        for name, tree in sources(but=("testing/",))
    }
    assert {name: words for name, words in found.items() if words} == {}


def test_only_the_command_line_prints() -> None:
    assert [
        name
        for name, tree in sources(but=("cli/", "testing/samples.py", "testing/chat.py", "testing/load.py"))
        if "print" in calls(tree)
    ] == []


def test_no_asserts_for_users_mistakes() -> None:
    """An assert only tells the type checker what is so: that a name has a type, or is not None."""
    wrong = []
    for name, tree in sources(but=("testing/",)):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert) and not all(map(_narrows, _clauses(node.test))):
                wrong.append(f"{name}:{node.lineno}")
    assert wrong == []


def _clauses(test: ast.expr) -> list[ast.expr]:
    return test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]


def _narrows(test: ast.expr) -> bool:
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


def test_errors_are_the_librarys_own() -> None:
    """Every class that ends in Error, outside of the tree's module, derives from it."""
    from featurekit_spark import errors

    known = {name for name in dir(errors) if name.endswith("Error")}
    found = []
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and name != "errors.py":
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                if not bases & known:
                    found.append(f"{name}: {node.name}")
    assert found == []


def test_the_error_tree_is_drawn_as_it_is() -> None:
    from featurekit_spark import errors

    drawn = errors.__doc__ or ""
    for name in errors.__all__:
        if isinstance(getattr(errors, name), type):
            assert f" {name} " in drawn.replace("\n", " \n"), name


def test_shipped_builders_pin_their_versions() -> None:
    """An upgrade of the library must not compute, or pay for, anything again by accident."""
    import featurekit_spark.apps.product_recs
    import featurekit_spark.llm.completion  # noqa: F401
    from featurekit_spark.builder import FeatureBuilder, KeySet, Source

    pending, found = [FeatureBuilder], []
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if cls.__module__.startswith("featurekit_spark.") and cls not in (KeySet, Source):
                found.append(cls)
    shipped = [cls for cls in found if not cls.__module__.startswith("featurekit_spark.testing")]
    assert len(shipped) >= 11
    assert [cls.name for cls in shipped if not vars(cls).get("version")] == []
