"""API keys: from the environment, or from a scope of Databricks secrets. Read by whoever makes calls, shown by nobody.

Knows where keys are kept, and how one travels to workers, which ask no scope; what is called with it, it does not.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

from featurekit_spark.errors import ContextError, ServiceError, UsageError

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from pydantic import SecretStr

__all__ = ["ApiKey", "KeyInScope", "KeyInVariable", "api_key"]

_WAIT_S: Final = 10  # the SDK's own patience is five minutes


class ApiKey(Protocol):
    """Where a client's API key is; in errors, `str` of it."""

    def value(self, *, what: str) -> str:
        """The key, of `what`. ContextError where there is none, or what cannot be one; ServiceError where who keeps it
        does not answer."""

    def ready(self, *, what: str) -> None:
        """Have what copies that travel cannot read themselves. Raises as `value`."""


@dataclass(frozen=True)
class KeyInVariable:
    """In an environment variable, of each process that makes calls."""

    name: str

    def value(self, *, what: str) -> str:
        key = os.environ.get(self.name)
        if not key:
            raise ContextError(
                f"the environment variable {self.name} is not set, but {what} takes its API key from it. Set it (to "
                "any text if none is needed)."
            )
        if not _is_one(key):
            raise ContextError(
                f"what the environment variable {self.name} holds is no API key for {what}: it has line breaks or "
                "letters beyond ASCII. Set it again, without a line break at its end and without quotes that an editor "
                "made."
            )
        return key

    def ready(self, *, what: str) -> None:
        """Workers may have it where the driver has not."""

    def __str__(self) -> str:
        return self.name


@dataclass
class KeyInScope:
    """In a scope of Databricks secrets, as `scope/key`. Read once, when it is first asked for; a copy that travels has
    what was read by then."""

    path: str
    _read: SecretStr | None = None
    _lock: Any = field(default_factory=threading.Lock, compare=False, repr=False)

    def value(self, *, what: str) -> str:
        from pydantic import SecretStr

        with self._lock:
            if self._read is None:
                self._read = SecretStr(self._asked(what))
            return self._read.get_secret_value()

    def ready(self, *, what: str) -> None:
        self.value(what=what)

    def __str__(self) -> str:
        return f"the Databricks secret {self.path}"

    def __hash__(self) -> int:
        return hash((self.path, self._read))

    def __reduce__(self) -> Any:
        return KeyInScope, (self.path, self._read)

    def _asked(self, what: str) -> str:
        scope, _, key = self.path.partition("/")
        told = f"{self}, the API key of {what}, cannot be read"
        client = _client(told)
        try:
            found = client.secrets.get_secret(scope, key).value
        except Exception as error:
            _raise(error, told, scope, key)
        try:
            value = base64.b64decode(found or "", validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            value = "\n"
        if not value:
            raise ContextError(
                f"{told}: it is empty. Put the key there: databricks secrets put-secret {scope} {key}."
            )
        if not _is_one(value):
            raise ContextError(
                f"{self} is no API key for {what}: it has line breaks or letters beyond ASCII. Put it there again, "
                f"without a line break at its end: databricks secrets put-secret {scope} {key} --string-value ..."
            )
        return value


def api_key(variable: str, secret: str | None) -> ApiKey:
    """In the scope where `secret` says so, else in the variable."""
    if secret is not None and not re.fullmatch(r"[^/\s]+/[^/\s]+", secret):
        raise UsageError(
            "api_key_secret should be the scope and the key of a Databricks secret, such as 'shop/openai'"
        )
    return KeyInVariable(variable) if secret is None else KeyInScope(secret)


def _is_one(key: str) -> bool:
    """An error about the header would quote one that is none."""
    return key.isascii() and key.isprintable()


def _client(told: str) -> WorkspaceClient:
    try:
        from databricks.sdk import WorkspaceClient
        from databricks.sdk.core import Config
    except ImportError as error:
        raise ContextError(
            f"{told}: the package databricks-sdk is missing. pip install 'featurekit-spark[databricks]', or name an "
            "environment variable with api_key_env."
        ) from error
    try:
        # It finds its way in a Databricks runtime, by variables, by a profile.
        return WorkspaceClient(config=Config(http_timeout_seconds=_WAIT_S, retry_timeout_seconds=_WAIT_S))
    except ValueError as error:
        why = str(error).partition(" Config:")[0].rstrip(". ")
        raise ContextError(
            f"{told}: {why}. Outside of a Databricks runtime set DATABRICKS_HOST and DATABRICKS_TOKEN."
        ) from None  # its own text goes on with the configuration that was found


def _raise(error: Exception, told: str, scope: str, key: str) -> NoReturn:
    """What the SDK raised, in our words."""
    from databricks.sdk.errors import BadRequest, NotFound, PermissionDenied, Unauthenticated
    from databricks.sdk.errors.base import DatabricksError

    why = " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__
    match error:
        case NotFound():
            raise ContextError(
                f"{told}: {why}. Correct the name (scope/key), or make it: databricks secrets create-scope {scope}; "
                f"databricks secrets put-secret {scope} {key}."
            ) from error
        case PermissionDenied():
            raise ContextError(
                f"{told}: {why}. Whoever runs this needs a valid token, and READ on the scope: databricks secrets "
                f"put-acl {scope} PRINCIPAL READ."
            ) from error
        case Unauthenticated() | BadRequest():
            raise ContextError(
                f"{told}: {why}. See whether DATABRICKS_HOST is the workspace's address, and the token still valid."
            ) from error
        case DatabricksError() | OSError() | TimeoutError() | RuntimeError() | ValueError():
            raise ServiceError(
                f"{told}: {why}. See whether the workspace can be reached, then run again."
            ) from error
        case _:
            raise error
