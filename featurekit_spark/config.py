"""Where settings come from: conf file, merchant file, environment and `--set`, laid over one another.

Owns the order of the sources, the reading of YAML, and the messages about what is wrong where. The keys
themselves are in `settings`. It must not know what the settings are used for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from featurekit_spark.errors import ConfigError, UsageError, known_names
from featurekit_spark.settings import (
    DeltaSinkSettings,
    Leaf,
    RedisSinkSettings,
    Settings,
    leaf_paths,
    mask_password,
    origin_of,
)

__all__ = [
    "DeltaSinkSettings",
    "Leaf",
    "RedisSinkSettings",
    "Settings",
    "check_name",
    "load_settings",
    "read_file",
]

ENV_PREFIX = "FEATUREKIT__"

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


def check_name(kind: str, value: str) -> str:
    """`value` if it is a usable merchant or market, else UsageError; `kind` names it in the message."""
    if not _NAME.fullmatch(value):
        raise UsageError(
            f"{kind} {value!r} cannot be used: give 1 to 64 characters of A-Z, a-z, 0-9, '_', '.', '-', "
            "not starting with a dot."
        )
    return value


def load_settings(
    *,
    merchant: str,
    market: str,
    conf_file: Path | None = None,
    conf_dir: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> Settings:
    """The settings of one merchant and market; later sources win, maps merge, lists are replaced whole.

    Order: built-in defaults < `conf_file` < `merchants/{merchant}.yaml` in `conf_dir` (by default the
    conf file's folder; a merchant without a file gets the defaults) < variables of `environ` such as
    `FEATUREKIT__LLM__PROVIDER` < `overrides` of the form `key.path=value`. Values of the last two are YAML.
    Raises UsageError for a bad merchant, market or override, ConfigError for everything else.
    """
    check_name("merchant", merchant)
    check_name("market", market)
    merged: dict[str, Any] = {}
    origins: dict[tuple[str, ...], str] = {}
    for origin, data in _sources(merchant, conf_file, conf_dir, environ or {}, overrides):
        try:
            _check_keys(data, (), origin)
        except RecursionError:
            raise ConfigError(f"{origin}: is nested too deeply, or an alias contains itself.") from None
        merged = _overlay(merged, data)
        for path, _ in leaf_paths(data):
            for old in [
                known for known in origins if known[: len(path)] == path or path[: len(known)] == known
            ]:
                del origins[old]
            origins[path] = origin
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        problems = [_problem(details, origins) for details in error.errors(include_url=False)]
        raise ConfigError("\n".join(problems)) from None  # pydantic's own text may quote secrets
    settings._origins.update(origins)
    return settings


def _sources(
    merchant: str,
    conf_file: Path | None,
    conf_dir: Path | None,
    environ: Mapping[str, str],
    overrides: Sequence[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, nested values) of every source, weakest first."""
    if conf_file is not None:
        yield str(conf_file), read_file(conf_file)
    folder = conf_dir or (conf_file.parent if conf_file is not None else None)
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: this folder of configuration files does not exist.")
        path = folder / "merchants" / f"{merchant}.yaml"
        if path.exists():
            yield str(path), read_file(path)
        elif path.with_name(f"{merchant}.yml").exists():
            raise ConfigError(
                f"{path.with_name(f'{merchant}.yml')}: is not read; rename it to {path.name!r}."
            )
    names = [name for name in environ if name.startswith(ENV_PREFIX)]
    # Shallow before deep, so that a variable for a whole section does not hide those for its keys.
    for name in sorted(names, key=lambda name: (name.count("__"), name)):
        parts = name.removeprefix(ENV_PREFIX).split("__")
        # Settings are two levels deep; what lies below is the user's own names (markets), kept as written.
        keys = [part.lower() for part in parts[:2]] + parts[2:]
        origin = f"environment {name}"
        yield origin, _nested(keys, _parse(environ[name], origin), origin)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {key!r} has no value: write --set key.path=value.")
        origin = f"--set {key}"
        yield origin, _nested(key.strip().split("."), _parse(value, origin), origin)


def _nested(keys: list[str], value: object, origin: str) -> dict[str, Any]:
    if not all(keys):
        raise UsageError(f"{origin}: a part of the key path is empty; write it like llm.model or LLM__MODEL.")
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: this configuration file does not exist; check --conf-file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    data = _parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {_found(data)} where a mapping of settings should be.")
    return data


def _parse(text: str, origin: str) -> object:
    """The value of a YAML 1.2 text: NO is a string, a key given twice is an error."""
    try:
        value: object = YAML(typ="safe", pure=True).load(StringIO(text))
    except DuplicateKeyError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ConfigError(
            f"{origin}: {where}{str(error.problem).split(' with value')[0]}; keep one of them."
        ) from None
    except YAMLError as error:
        raise ConfigError(f"{origin}: is not valid YAML: {mask_password(str(error))}") from None
    return value


def _check_keys(value: object, path: tuple[str, ...], origin: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                where = ".".join((*path, str(key)))
                raise ConfigError(f"{origin}: {where}: the key is {_found(key)}; put quotes around it.")
            _check_keys(inner, (*path, key), origin)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_keys(inner, (*path, str(number)), origin)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _problem(error: ErrorDetails, origins: Mapping[tuple[str, ...], str]) -> str:
    """One line about one wrong value: where, what is wrong, what was found."""
    loc = list(error["loc"])
    model: Any = Settings
    if loc[0] == "sinks" and len(loc) > 2:
        model = RedisSinkSettings if loc.pop(2) == "redis" else DeltaSinkSettings
    elif len(loc) > 1 or error["type"] == "model_type":
        model = Settings.model_fields[str(loc[0])].annotation
    for part in loc[1:] if error["type"] == "model_type" else loc[1:-1]:  # a section within a section
        below = getattr(model, "model_fields", {}).get(str(part))
        model = _section(below.annotation) or model if below is not None else model
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    origin = origin_of(origins, tuple(str(part) for part in loc))
    where = f"{origin}: " if origin == f"--set {key}" else f"{origin}: {key}: "
    match error["type"]:
        case "extra_forbidden":
            return f"{where}unknown key. {known_names(str(loc[-1]), model.model_fields)}"
        case "missing":
            return f"{where}is missing; give a value."
        case "model_type":
            names = ", ".join(model.model_fields)
            return f"{where}should be a mapping with keys among {names}; found {_found(error['input'])}."
        case "template" | "twice" | "needs":
            return f"{where}{error['msg'].rstrip('.')}."
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{where}should have kind: delta or kind: redis; found {_found(error['input'])}."
    if loc[:2] == ["cache", "storage_options"]:  # it may be a secret, which is not repeated
        return f"{where}should be text: put quotes around it, or write ${{env:NAME}} for a variable."
    if loc[-1] == "api_key_env":
        # What stands here by mistake is likely the key itself, so it is not repeated.
        return f"{where}should be the name of an environment variable that holds the API key, not the key."
    if loc[-1] == "api_key_secret":
        return f"{where}should be the scope and the key of a Databricks secret, `scope/key`, not the secret."
    hint = " Put quotes around it." if error["type"] == "string_type" and error["input"] is not None else ""
    return f"{where}{error['msg']}; found {_found(error['input'])}.{hint}"


def _section(annotation: Any) -> Any:
    """The section that a field holds, or may hold; None for plain values."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _found(value: object) -> str:
    if value is None:
        return "nothing (null)"
    text = mask_password(repr(value))
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
