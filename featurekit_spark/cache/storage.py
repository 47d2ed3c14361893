"""A cache's storage opened with pyarrow by the very options that `deltalake` takes.

S3's options are translated for pyarrow's own filesystem, because the one of `deltalake` can abort at interpreter exit;
it is used where there is no translation. Knows options and filesystems, no tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from featurekit_spark.cache.staged import filesystem_of

__all__ = ["storage_of"]

# What S3's options are called, less `aws_` and in lower case, and what pyarrow calls it.
_S3: Final = {
    "access_key_id": "access_key",
    "secret_access_key": "secret_key",
    "session_token": "session_token",
    "token": "session_token",
    "region": "region",
    "default_region": "region",
    "endpoint": "endpoint_override",
    "endpoint_url": "endpoint_override",
    "virtual_hosted_style_request": "force_virtual_addressing",
    "skip_signature": "anonymous",
}
# How `deltalake` commits and how long it waits: nothing of it changes what is read, or by whom.
_OTHER: Final = {
    "allow_http",  # an endpoint says by itself whether it is one
    "conditional_put",
    "connect_timeout",
    "copy_if_not_exists",
    "s3_allow_unsafe_rename",
    "s3_locking_provider",
    "timeout",
    "unsigned_payload",
}
_TRUE: Final = ("1", "true", "on", "yes", "y")


def storage_of(uri: str, options: Mapping[str, str]) -> Any:
    """pyarrow's filesystem over a folder or prefix, with the rights that `options` give."""
    parts = urlsplit(uri)
    if not options or parts.scheme in ("", "file"):
        return filesystem_of(uri)
    from pyarrow import fs

    arguments = _s3_arguments(options) if parts.scheme in ("s3", "s3a") else None
    if arguments is not None:
        folder = f"{parts.netloc}/{unquote(parts.path).strip('/')}".rstrip("/")
        return fs.SubTreeFileSystem(folder, fs.S3FileSystem(**arguments))
    return fs.PyFileSystem(_deltalake_handler(uri, options))


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
