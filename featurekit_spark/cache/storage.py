"""A cache's storage opened with pyarrow by the very options that `deltalake` takes.

S3's options are translated for pyarrow's own filesystem, because the one of `deltalake` can abort at interpreter exit;
it is used where there is no translation. Knows options and filesystems, no tables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from featurekit_spark.errors import ConfigError
from featurekit_spark.locks import local_path

__all__ = ["check_options", "is_secret", "resolved", "storage_of", "without_secrets"]

# What S3's options are called, less `aws_` and in lower case, and what pyarrow calls it.
_S3: Final = {
    "access_key_id": "access_key",
    "secret_access_key": "secret_key",
    "session_token": "session_token",
    "token": "session_token",
    "default_region": "region",
    "region": "region",
    "endpoint": "endpoint_override",
    "endpoint_url": "endpoint_override",
    "virtual_hosted_style_request": "force_virtual_addressing",
    "skip_signature": "anonymous",
}
# How `deltalake` commits, how long it waits and how often it tries: nothing of it changes what is read, or by whom.
_OTHER: Final = {
    "allow_http",  # an endpoint says by itself whether it is one
    "conditional_put",
    "connect_timeout",
    "copy_if_not_exists",
    "max_retries",
    "retry_timeout",
    "s3_allow_unsafe_rename",
    "s3_locking_provider",
    "timeout",
    "unsigned_payload",
}
# What `deltalake` takes from the environment where no option says otherwise. Credentials pyarrow finds by itself.
_FROM_ENVIRONMENT: Final = (
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_ENDPOINT",
    "AWS_ENDPOINT_URL",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_SKIP_SIGNATURE",
)
_TRUE: Final = ("1", "true", "on", "yes", "y")
_REFERENCE: Final = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET: Final = re.compile(r"secret|token|password|sas_|key$|key_base64$", re.IGNORECASE)
_NO_SECRET: Final = re.compile(r"_(id|file|path|ur[il])$", re.IGNORECASE)


def is_secret(option: str) -> bool:
    """Whether what stands under this name must not be shown."""
    return _SECRET.search(option) is not None and _NO_SECRET.search(option) is None


def check_options(options: Mapping[str, str]) -> str | None:
    """What is wrong with options as they are written down; their values are not shown."""
    for name, value in options.items():
        if "${" in _REFERENCE.sub("", value):
            return f"holds a reference in {name} that cannot be read: write ${{env:NAME}}, with a variable's name"
        if is_secret(name) and not _REFERENCE.fullmatch(value):
            return (
                f"holds a secret in {name}: put it into an environment variable and write {name}: ${{env:NAME}}, or "
                "leave it out where the storage's own variables hold it"
            )
    return None


def resolved(options: Mapping[str, str]) -> dict[str, str]:
    """Options as they are used: for `${env:NAME}` the variable of this process. ConfigError where there is none."""

    def value(found: re.Match[str]) -> str:
        try:
            return os.environ[found[1]]
        except KeyError:
            raise ConfigError(
                f"a storage option refers to the environment variable {found[1]!r}, which is not set in this process. "
                "Set it for the driver and, with Spark, for its workers (spark.executorEnv.*)."
            ) from None

    return {name: _REFERENCE.sub(value, text) for name, text in options.items()}


def without_secrets(text: str, options: Mapping[str, str]) -> str:
    """`text` without the secrets among the options, whoever put them there."""
    for name, value in options.items():
        if is_secret(name):
            for secret in {value, _REFERENCE.sub(lambda found: os.environ.get(found[1], ""), value)}:
                if secret and not _REFERENCE.search(secret):
                    text = text.replace(secret, "***")
    return text


def storage_of(uri: str, options: Mapping[str, str]) -> Any:
    """pyarrow's filesystem over a folder or prefix, with the rights that `options` give. ConfigError as `resolved`."""
    from pyarrow import fs

    local = local_path(uri)
    if local is not None:
        return fs.SubTreeFileSystem(str(local), fs.LocalFileSystem())
    parts, options = urlsplit(uri), resolved(options)
    if parts.scheme in ("s3", "s3a"):
        ambient = {name: os.environ[name] for name in _FROM_ENVIRONMENT if os.environ.get(name)}
        arguments = _s3_arguments({**ambient, **options})
        if arguments:
            folder = f"{parts.netloc}/{unquote(parts.path).strip('/')}".rstrip("/")
            return fs.SubTreeFileSystem(folder, _s3(os.getpid(), tuple(sorted(arguments.items()))))
        uri = f"s3://{uri.partition('://')[2]}"
        options = options if arguments is None else {}
    if options:
        return fs.PyFileSystem(_deltalake_handler(uri, options))
    filesystem, path = fs.FileSystem.from_uri(uri)
    return fs.SubTreeFileSystem(path, filesystem)


@lru_cache(maxsize=16)
def _s3(pid: int, arguments: tuple[tuple[str, Any], ...]) -> Any:
    """One for all of a process, so that connections are kept; a forked process needs its own."""
    from pyarrow import fs

    return fs.S3FileSystem(**dict(arguments), allow_delayed_open=True)  # a small object is one request


def _deltalake_handler(uri: str, options: Mapping[str, str]) -> Any:
    import pyarrow as pa
    from deltalake.fs import DeltaStorageHandler

    class Handler(DeltaStorageHandler):
        def open_output_stream(self, path: str, metadata: dict[str, str] | None = None) -> Any:
            return pa.PythonFile(_OfBytes(self._handler.open_output_stream(path, metadata)), "w")

    return Handler(uri, dict(options))


class _OfBytes:
    """A stream that takes the buffers which pyarrow writes; that of `deltalake` takes bytes alone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: Any) -> Any:
        return self._stream.write(bytes(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _s3_arguments(options: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of pyarrow's S3FileSystem; None where it has none for an option."""
    found: dict[str, Any] = {}
    for option, value in options.items():
        name = option.lower().removeprefix("aws_")
        if name in _S3:
            found[_S3[name]] = value
        elif name not in _OTHER:
            return None
    for switch in ("force_virtual_addressing", "anonymous"):
        if switch in found:
            found[switch] = found[switch].lower() in _TRUE
    endpoint = urlsplit(found.get("endpoint_override", ""))
    if endpoint.scheme:
        found |= {"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc + endpoint.path.rstrip("/")}
    return found
