from __future__ import annotations

import hashlib
import importlib.util
import sys
import textwrap
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.codeprint import code_fingerprint
from featurekit_spark.errors import DefinitionError
from featurekit_spark.fingerprint import (
    canonical_json,
    config_hash,
    digest,
    entry_id,
    group_hash,
    inputs_hash,
    key_json,
    payload_hash,
)


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


class Mode(Enum):
    FAST = "fast"


@dataclass(frozen=True)
class Config:
    model: str = "mini"
    inner: Inner = field(default_factory=Inner)
    mode: Mode = Mode.FAST
    weights: Any = ()


def test_digests_are_pinned() -> None:
    """They name what is in people's caches; whoever changes one of these throws every cache away."""
    found = {
        "digest": digest("kind", "a", "b"),
        "payload": payload_hash("string", b"lamp"),
        "entry": entry_id("Title", "c" * 32, '["abt","US","p1"]', "i" * 32),
        "inputs": inputs_hash(["a", "b"], ["g"]),
        "no inputs": inputs_hash([]),
        "group": group_hash([('["p1"]', "a"), ('["p2"]', "b")]),
        "no group": group_hash([]),
        "config": config_hash("Title", "string", "1", Config()),
    }
    assert found == PINNED


PINNED = {
    "digest": "344a229b810bf55735af0728d3014380",
    "payload": "947ca5863a5711ce1d2dcd1cd104e589",
    "entry": "a75cc783369b0e53ba93802d57d0b4d2",
    "inputs": "384263bc4f41e99b046c976d9b75913e",
    "no inputs": "354a514b7888425904966af60a661ef1",
    "group": "d847321e36e56d6782cb27e719f701b9",
    "no group": "ad936fcbed631fa67e05c3ea03953905",
    "config": "1a5d26b64453d157cd1a07574e3ec845",
}


def test_the_preimages_are_what_the_docs_say() -> None:
    def sha(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    assert digest("kind", "a", "bc") == sha("kind\n1:a\n2:bc")
    assert payload_hash("string", b"lamp") == sha("string:lamp")
    assert entry_id("T", "c", '["k"]', "i") == sha('entry\nT\nc\ni\n["k"]')
    assert inputs_hash(["a", "b"], ["g"]) == sha("inputs\na,b\ng")


def test_parts_do_not_run_together() -> None:
    assert digest("k", "ab", "c") != digest("k", "a", "bc")
    assert digest("k", "a\n1:b") != digest("k", "a", "b")
    assert digest("k1", "a") != digest("k2", "a")
    assert inputs_hash(["a", "b"]) != inputs_hash(["a"], ["b"])
    assert payload_hash("string", b"1") != payload_hash("int", b"1")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (("abt", "US", "p1"), '["abt","US","p1"]'),
        ((1, True, False, -2), "[1,true,false,-2]"),
        (('a"b', "a\\b", "a\nb", "\u00e9", "e\u0301"), '["a\\"b","a\\\\b","a\\nb","\u00e9","e\u0301"]'),
        ((), "[]"),
    ],
)
def test_keys_as_json(key: tuple[Any, ...], text: str) -> None:
    assert key_json(key) == text


@pytest.mark.parametrize("field", [1.5, None, b"x", ("a",), datetime(2026, 1, 1)])
def test_a_key_field_of_another_type_is_refused(field: Any) -> None:
    with pytest.raises(DefinitionError, match="keys hold text, integers and booleans. Convert it to text"):
        key_json((field,))


def test_configs_as_json() -> None:
    assert canonical_json(Config()) == '{"inner":{"rate":0.5},"mode":"fast","model":"mini","weights":[]}'
    assert canonical_json({"b": 1, "a": {2, 1}}) == canonical_json({"a": {1, 2}, "b": 1})
    assert canonical_json(timedelta(minutes=1)) == '{"seconds":60.0}'
    assert canonical_json(Path("a/b")) == canonical_json(Path("a") / "b")
    assert canonical_json(Decimal("1.50")) != canonical_json("1.50")
    assert canonical_json(b"\x00") == '{"bytes":"00"}'
    assert "2026-01-31" in canonical_json(datetime(2026, 1, 31, tzinfo=UTC))


def test_a_config_without_a_stable_form_is_refused_by_its_path() -> None:
    with pytest.raises(DefinitionError, match=r"config.weights\[1\] is a object, which has no stable hash"):
        canonical_json(Config(weights=[1, object()]))
    with pytest.raises(DefinitionError, match="clients and connections belong in the context"):
        canonical_json({"client": lambda: None})


@pytest.mark.parametrize(
    "changed",
    [
        ("Other", "string", "1", Config()),
        ("Title", "int64", "1", Config()),
        ("Title", "string", "2", Config()),
        ("Title", "string", "1", Config(inner=Inner(0.6))),
    ],
)
def test_every_part_of_a_config_counts(changed: tuple[Any, ...]) -> None:
    assert config_hash(*changed) != config_hash("Title", "string", "1", Config())


# -- the fingerprint of code ---------------------------------------------------------------------------------

PLAIN = """
class Feature:
    rate = 2

    def build(self, inputs):
        return [x * self.rate for x in inputs]
"""


def _fingerprint(folder: Path, source: str, *, uses: tuple[str, ...] = (), name: str = "Feature") -> str:
    """The fingerprint of a class as a module of its own has it."""
    number = len(list(folder.iterdir()))
    path = folder / f"fingerprinted_{number}.py"
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return code_fingerprint(
        getattr(module, name), library=object, uses=[getattr(module, use) for use in uses]
    )


@pytest.mark.parametrize(
    "same",
    [
        PLAIN.replace("rate = 2", "rate = 2  # twice"),
        PLAIN.replace("class Feature:\n", 'class Feature:\n    """Says what it is."""\n'),
        PLAIN.replace("(self, inputs):\n", '(self, inputs):\n        """And how."""\n'),
        PLAIN.replace(
            "[x * self.rate for x in inputs]",
            "[\n            x*self.rate\n            for x in inputs\n        ]",
        ),
        "import os\n\n\n" + PLAIN,
        PLAIN.replace("[x", "([x").replace("inputs]", "inputs])"),
    ],
)
def test_blind_to_how_code_is_written(tmp_path: Path, same: str) -> None:
    assert _fingerprint(tmp_path, PLAIN) == _fingerprint(tmp_path, same)


@pytest.mark.parametrize(
    "other",
    [
        PLAIN.replace("rate = 2", "rate = 3"),
        PLAIN.replace("x * self", "x + self"),
        PLAIN.replace("inputs]", "inputs if x]"),
        PLAIN.replace("[x *", "[-x *"),
        PLAIN.replace("return", "inputs = list(inputs)\n        return"),
    ],
)
def test_sensitive_to_what_code_does(tmp_path: Path, other: str) -> None:
    assert _fingerprint(tmp_path, PLAIN) != _fingerprint(tmp_path, other)


def test_a_base_class_of_the_users_counts(tmp_path: Path) -> None:
    one = "class Base:\n    rate = 1\n\n\nclass Feature(Base):\n    pass\n"
    assert _fingerprint(tmp_path, one) != _fingerprint(tmp_path, one.replace("rate = 1", "rate = 2"))


def test_helpers_count_when_they_are_named(tmp_path: Path) -> None:
    one = "def helper(x):\n    return x + 1\n\n\nTABLE = {'a': 1}\n" + PLAIN
    helper, table = one.replace("x + 1", "x + 2"), one.replace("'a': 1", "'a': 2")
    assert _fingerprint(tmp_path, one) == _fingerprint(tmp_path, helper)
    assert _fingerprint(tmp_path, one, uses=("helper",)) != _fingerprint(tmp_path, helper, uses=("helper",))
    assert _fingerprint(tmp_path, one, uses=("TABLE",)) != _fingerprint(tmp_path, table, uses=("TABLE",))


def test_code_without_source_asks_for_a_version() -> None:
    made: dict[str, Any] = {}
    exec("class Feature:\n    pass", made)
    with pytest.raises(DefinitionError, match='Declare `version = "1"` on the builder'):
        code_fingerprint(made["Feature"], library=object)
