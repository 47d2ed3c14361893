"""The words a user writes: FeatureBuilder, Source, KeySet, and the deps between them.

Owns declaration and its checks, nothing else: no graph, no cache, no evaluation. A class that is declared wrongly
fails when it is defined.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

from featurekit_spark.codeprint import code_version
from featurekit_spark.errors import ContextError, DefinitionError, UsageError, known_names
from featurekit_spark.fingerprint import config_hash, key_json
from featurekit_spark.freshness import Freshness
from featurekit_spark.values import Codec, ValueType, value_type

if TYPE_CHECKING:
    import pandas as pd

    from featurekit_spark.controller import Controller

__all__ = [
    "Bound",
    "ContextView",
    "Dep",
    "Each",
    "FeatureBuilder",
    "Gathered",
    "KeySet",
    "Metered",
    "Source",
    "Update",
    "bind",
    "each",
    "import_path",
    "load_builder",
    "parse_key",
]

V = TypeVar("V")
Key: TypeAlias = tuple[Any, ...]
Builder: TypeAlias = "type[FeatureBuilder[Any]]"
# A name is a folder of the cache's tables, and writers of Delta differ in how they spell any other character there.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Dep:
    """One input of a builder: which feature, and how its key comes from the reader's key.

    `on`: (field of the dep's key, where its value comes from); fields not named are matched by name.
    `over`: the key set whose members are gathered.
    """

    builder: Builder
    on_fields: tuple[tuple[str, Dep | Each], ...] = ()
    keyset: type[KeySet] | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        """The input column's name."""
        return self.label or self.builder.name

    @property
    def fans_out(self) -> bool:
        """Whether the value is a list, one item for each item of another dep's list."""
        return any(isinstance(source, Each) for _, source in self.on_fields)

    def on(self, **fields: Builder | Dep | Each) -> Dep:
        """Take fields of this dep's key from other deps' values."""
        for field in fields:
            if field not in self.builder.key:
                raise DefinitionError(
                    f"{self.builder.name}.on({field}=...): its key has no field {field!r}. "
                    + known_names(field, self.builder.key)
                )
        sources = tuple(
            (field, source if isinstance(source, Each) else as_dep(source))
            for field, source in sorted(fields.items())
        )
        if sum(isinstance(source, Each) for _, source in sources) > 1:
            raise DefinitionError(f"{self.builder.name}.on(...): only one field can fan out with each(...)")
        return replace(self, on_fields=sources)

    def over(self, keyset: type[KeySet]) -> Dep:
        """Gather this feature for all members of `keyset`; as a run's target, compute it for all of them."""
        if not _is_class(keyset, KeySet):
            raise DefinitionError(f"{self.builder.name}.over({keyset!r}): a KeySet class is needed")
        return replace(self, keyset=keyset)

    def named(self, label: str) -> Dep:
        """Give the input column a name of its own, needed where one builder is used twice."""
        return replace(self, label=label)

    def __str__(self) -> str:
        on = ", ".join(f"{field}={source}" for field, source in self.on_fields)
        over = f".over({self.keyset.name})" if self.keyset else ""
        return f"{self.builder.name}{f'.on({on})' if on else ''}{over}"


@dataclass(frozen=True)
class Each:
    """Marks a list-valued dep whose items become one key each."""

    dep: Dep

    def __str__(self) -> str:
        return f"each({self.dep})"


def _is_class(thing: object, base: type) -> bool:
    """What users pass where a class is expected may be anything."""
    return isinstance(thing, type) and issubclass(thing, base)


def each(source: Builder | Dep) -> Each:
    """Fan out over the list that `source` yields: `Searcher.on(text=each(Suggestions))`."""
    return Each(as_dep(source))


def as_dep(source: Builder | Dep) -> Dep:
    """A bare class or a Dep, as a Dep."""
    if isinstance(source, Dep):
        return source
    if _is_class(source, FeatureBuilder):
        return Dep(source)
    raise DefinitionError(
        f"{source!r} is no feature: deps are FeatureBuilder classes, or such a class with .on/.over"
    )


@dataclass(frozen=True)
class Gathered(Generic[V]):
    """What `.over` gives a build: member keys (the key set's `of` field) and values, aligned, in key order.

    Members that failed are left out of both and named in `failed`; a member without a value has None.
    """

    keys: tuple[Any, ...]
    values: Sequence[V | None]
    failed: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Metered(Generic[V]):
    """A value with what it cost, returned by `build_one` of a paid builder; usd None is "no price known".
    `estimated_tokens`: how many of `tokens` were counted here and not by the provider; `attempts`: how many requests it
    took. What those cost that led to no answer belongs to the sums."""

    value: V
    tokens: int = 0
    usd: float | None = None
    estimated_tokens: int = 0
    attempts: int = 1


class Update(Enum):
    """What `update` returns in place of a value."""

    KEEP = "keep"  # the earlier value still is the right one
    REBUILD = "rebuild"  # the value does not follow from the earlier one: build it


class FeatureBuilder(Generic[V]):
    """One feature: its key fields, what it reads, its value type and how a value is made.

    Define one of
    `build(inputs, config, context)`: a pandas DataFrame with a column for each key field and dep, to a Series;
    `build_one(inputs, config, context)`: a dict with the same names for one key, to one value;
    `get(key, config, context, controller)`: by hand, everything read through `controller.get`.
    `build` and `build_one` may be `async def`. Each sees only the context attributes named in `needs`.
    Beside build `update`, where values follow from earlier ones when the group-level dep `follows` changed.

    `paid`: a model's answer, kept until its ttl or a refresh. `inline`: never cached, evaluated where it is read.
    `light`: cheaper to evaluate than to send to a worker, so that Spark runs it in-process for longer.
    `accepts_null`: build sees null inputs, which otherwise make the value null.
    """

    key: ClassVar[tuple[str, ...]] = ()
    deps: ClassVar[tuple[Any, ...]] = ()
    value: ClassVar[Any] = None
    name: ClassVar[str] = ""
    version: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[tuple[Any, ...]] = ()
    follows: ClassVar[type[FeatureBuilder[Any]] | None] = None
    freshness: ClassVar[Freshness] = Freshness()
    paid: ClassVar[bool] = False
    inline: ClassVar[bool] = False
    light: ClassVar[bool] = False
    accepts_null: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Config:
        """A builder without settings."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        if cls.key:  # a class without a key is a base for others
            _check_definition(cls)

    def default_config(self, context: Any) -> Any:
        """The config where the caller gives none: `Config()` unless overridden."""
        return self.Config()

    def build(self, inputs: pd.DataFrame, config: Any, context: Any) -> Any:
        """Values for a batch of keys, all of one group: one row in, one value out, in the same order."""
        raise DefinitionError(f"{self.name} defines no build")

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> Any:
        """The value for one key."""
        raise DefinitionError(f"{self.name} defines no build_one")

    def update(self, inputs: pd.DataFrame, before: pd.DataFrame, config: Any, context: Any) -> Any:
        """Values for keys of which the dep `follows` has another value than before, and nothing else that they read
        changed; exactly what `build` would return.

        `inputs`: as for `build`. `before`, row by row: that dep's earlier value under its name, and in `value` the
        feature's own. `Update.KEEP` for a key whose earlier value stands, `Update.REBUILD` for one to build after all.
        """
        raise DefinitionError(f"{self.name} defines no update")

    def distributes(self, shared: Mapping[str, Any], config: Any, context: Any) -> int:
        """For how many keys at once `build` distributes its work itself, for a group whose group-level deps have the
        values `shared`, by name; 0 where it does not. Spark then calls it in the driver, for that many keys at most,
        and context attributes that have `on_spark(session)` are what that returns. Asked in the driver before; may
        prepare what `build` will need."""
        return 0

    def get(self, key: Key, config: Any, context: Any, controller: Controller) -> tuple[V | None, str]:
        """(value, value_hash) for one key: deps through the controller, then `build`.

        Overridden by hand, it is the whole feature: read others by `controller.get(Builder, key)`, and return
        `self.hashed(value, config)`.
        """
        feature = controller.get(type(self), key, configs={type(self): config})
        return feature.require(), feature.value_hash

    def hashed(self, value: V | None, config: Any = None) -> tuple[V | None, str]:
        """A value with its canonical hash, as `get` returns them."""
        kind = value_type(type(self).value, config)
        checked = kind.checked(value)
        return checked, kind.hash(checked)

    @classmethod
    def on(cls, **fields: Builder | Dep | Each) -> Dep:
        """This feature, with key fields taken from other deps' values."""
        return Dep(cls).on(**fields)

    @classmethod
    def over(cls, keyset: type[KeySet]) -> Dep:
        """This feature for all members of a key set."""
        return Dep(cls).over(keyset)

    @classmethod
    def named(cls, label: str) -> Dep:
        """This feature under another input name."""
        return Dep(cls).named(label)

    @classmethod
    def is_dynamic(cls) -> bool:
        """Whether the feature is a hand-written `get`, whose inputs are known only once it ran."""
        return cls.get is not FeatureBuilder.get

    @classmethod
    def followed(cls) -> int | None:
        """Place in `deps` of what `update` follows; None where there is no `update`."""
        return next((i for i, dep in enumerate(map(as_dep, cls.deps)) if dep.builder is cls.follows), None)


class Source(FeatureBuilder[V]):
    """A builder that reads the outside world; read again on every run and compared, unless a ttl says otherwise.

    May offer `scan(group, config, context)`, which yields a whole group at once: an object with `bytes: int`,
    `to_arrow() -> pa.Table` and `to_spark(session) -> DataFrame`, both of two columns: member, value.
    """

    scan: ClassVar[Any] = None

    def snapshot_version(self, context: Any) -> str | None:
        """What changes whenever anything that this source reads may have changed: a table's version, a file's size and
        time. None, as here: unknown, so it is read on every run. Must be cheap, and must not read the data."""
        return None


class KeySet(Source[list[Any]]):
    """A source of keys: for a group (its own key), the values of one further field, `of`."""

    of: ClassVar[str] = ""

    @classmethod
    def member_key(cls) -> tuple[str, ...]:
        """The fields of a member's full key: the group's, then `of`."""
        return (*cls.key, cls.of)


def _check_definition(cls: type[FeatureBuilder[Any]]) -> None:
    where = f"{cls.__module__}.{cls.__qualname__}"
    if not _NAME.fullmatch(str(cls.name)):
        raise DefinitionError(
            f"{where}: its name {cls.name!r} is a folder of the cache; use ASCII letters, digits, '_', '.' and '-', "
            "as in name = 'Price'"
        )
    fields: Any = cls.key
    if not isinstance(fields, tuple) or not all(isinstance(f, str) and f.isidentifier() for f in fields):
        raise DefinitionError(f"{where}: key must be a tuple of field names, found {cls.key!r}")
    if len(set(cls.key)) < len(cls.key):
        raise DefinitionError(f"{where}: key {cls.key!r} names a field twice")
    if cls.value is None:
        raise DefinitionError(f"{where}: declare the value's type, such as value = pa.string()")
    value_type(cls.value)
    if not isinstance(cls.deps, tuple):
        raise DefinitionError(
            f"{where}: deps must be a tuple, found {cls.deps!r}; a single one is written (Dep,)"
        )
    made_by = [m for m in ("build", "build_one", "get") if getattr(cls, m) is not getattr(FeatureBuilder, m)]
    if len(made_by) != 1:
        found = " and ".join(made_by) or "none of them"
        raise DefinitionError(f"{where}: define exactly one of build, build_one or get; found {found}")
    if cls.paid and made_by == ["build"]:
        raise DefinitionError(
            f"{where}: a paid builder defines build_one, so that a failed call repeats no other"
        )
    if cls.follows is not None or cls.update is not FeatureBuilder.update:
        _check_update(cls, where)
    if issubclass(cls, KeySet) and not cls.of:
        raise DefinitionError(f"{where}: a KeySet says which field it expands: of = 'product_id'")
    names = [dep.name for dep in map(as_dep, cls.deps)]
    for name in names:
        if names.count(name) > 1 or name in cls.key:
            raise DefinitionError(
                f"{where}: two inputs are called {name!r}; give one a name with .named('...')"
            )


def _check_update(cls: type[FeatureBuilder[Any]], where: str) -> None:
    plain = [d.builder for d in map(as_dep, cls.deps) if d.keyset is None and not d.on_fields]
    if cls.follows not in plain or cls.update is FeatureBuilder.update or cls.paid or cls.is_dynamic():
        raise DefinitionError(
            f"{where}: update and follows go together, beside a build that is not paid; follows names a dep that is "
            f"written as a bare class. Found follows = {getattr(cls.follows, 'name', cls.follows)!r}, such deps: "
            f"{[builder.name for builder in plain]!r}"
        )


class ContextView:
    """The part of a context that a builder declared in `needs`; anything else is a ContextError."""

    __slots__ = ("_builder", "_context", "_needs")

    def __init__(self, builder: str, context: Any, needs: tuple[str, ...]) -> None:
        self._builder, self._context, self._needs = builder, context, needs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._needs:
            raise ContextError(
                f"{self._builder} reads context.{name}, which it does not declare; add it: needs = "
                f"{(*self._needs, name)!r}"
            )
        try:
            return getattr(self._context, name)
        except AttributeError:
            raise ContextError(
                f"{self._builder} needs context.{name}, but the {type(self._context).__name__} has none"
            ) from None


@dataclass(frozen=True)
class Bound:
    """A builder with its config: an instance, its types, and its identity. `deps` are normalised."""

    builder: FeatureBuilder[Any]
    config: Any
    type: ValueType
    config_hash: str
    version: str
    deps: tuple[Dep, ...]

    @property
    def name(self) -> str:
        return self.builder.name

    @property
    def key(self) -> tuple[str, ...]:
        return self.builder.key

    def view(self, context: Any) -> ContextView:
        return ContextView(self.name, context, self.builder.needs)


def bind(cls: Builder, context: Any, configs: Mapping[Any, Any] | None = None) -> Bound:
    """Give a builder its config: the override under its class or name, else `default_config(context)`.

    An override may be a whole config or a mapping of some of its fields.
    """
    builder = cls()
    configs = configs or {}
    given = configs.get(cls, configs.get(cls.name))
    if given is None or isinstance(given, Mapping):
        config = builder.default_config(context)
        if given:
            fields = {field.name for field in dataclasses.fields(config)}
            for name in given:
                if name not in fields:
                    raise UsageError(
                        f"config of {cls.name} has no field {name!r}. {known_names(name, fields)}"
                    )
            config = replace(config, **given)
    else:
        config = given
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise DefinitionError(f"{cls.name}: a config is an instance of a frozen dataclass, found {config!r}")
    kind = value_type(cls.value, config)
    codecs = (cls.value.encode, cls.value.decode) if isinstance(cls.value, Codec) else ()
    version = code_version(cls, library=_library_base(cls), uses=(*cls.uses, *codecs))
    return Bound(
        builder,
        config,
        kind,
        config_hash(cls.name, kind.text, version, config),
        version,
        tuple(map(as_dep, cls.deps)),
    )


def _library_base(cls: type) -> type:
    return next(c for c in (KeySet, Source, FeatureBuilder) if issubclass(cls, c))


def parse_key(cls: Builder, key: Any) -> Key:
    """A key as a tuple in the order of `cls.key`; takes a tuple, or a mapping by name. Raises UsageError."""
    fields = cls.key
    if isinstance(key, Mapping):
        if set(key) != set(fields):
            raise UsageError(f"{cls.name} has the key fields {fields!r}, found {tuple(key)!r}")
        key = tuple(key[field] for field in fields)
    if isinstance(key, str) or not isinstance(key, Sequence):
        raise UsageError(f"a key of {cls.name} is a tuple {fields!r}, found {key!r}")
    if len(key) != len(fields):
        raise UsageError(
            f"{cls.name} has the key fields {fields!r} ({len(fields)}), found {len(key)}: {key!r}"
        )
    parsed: Key = tuple(key)
    try:
        key_json(parsed).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"key {key!r} of {cls.name} is no valid text: {error}") from error
    return parsed


def keys_of(fields: tuple[str, ...], key: Key, wanted: tuple[str, ...]) -> Key:
    """The part of a key (of `fields`) that a builder with the key `wanted` has."""
    return key if fields == wanted else tuple(key[fields.index(field)] for field in wanted)


def import_path(cls: Builder) -> str:
    """`module:Class`, by which a recorded read names its builder."""
    return f"{cls.__module__}:{cls.__qualname__}"


def load_builder(path: str) -> Builder:
    """The builder class at `module:Class`: one that exists in this process, else imported. Raises UsageError."""
    pending: list[Builder] = [FeatureBuilder]
    while pending:
        for cls in pending.pop().__subclasses__():
            if import_path(cls) == path:
                return cls
            pending.append(cls)
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{path!r} names no builder ({error}); write it as package.module:Class") from error
    if not (isinstance(found, type) and issubclass(found, FeatureBuilder)):
        raise UsageError(f"{path!r} is a {type(found).__name__}, not a FeatureBuilder class")
    return found
