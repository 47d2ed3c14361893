"""How many tokens a text has for a model: by the model's own vocabulary where it is installed, else by a rule of thumb.

The vocabularies come with a package of the extra `llm`: nothing is fetched. Must not know prices, nor who makes calls.
"""

from __future__ import annotations

import gzip
import math
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Final

__all__ = ["TokenCount", "count_request", "count_tokens"]

_BYTES_PER_TOKEN: Final = 4
_PIECE: Final = 20_000
"""Longer texts are counted in pieces of so many characters: a tokenizer takes quadratic time for one endless word."""

_PER_MESSAGE: Final = 3  # as OpenAI documents it for its chat models
_PER_REQUEST: Final = 3

# What tiktoken calls the files of its own cache: the SHA-1 of the addresses that it would fetch them from.
_CACHED_AS: Final = {
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
}
_CACHE_VARIABLE: Final = "TIKTOKEN_CACHE_DIR"
_lock = Lock()


@dataclass(frozen=True)
class TokenCount:
    """`estimated`: no vocabulary of the model is known here, so that this is about right for English and no more."""

    count: int
    estimated: bool


def count_tokens(text: str, model: str) -> TokenCount:
    """How many tokens `text` has for `model`, special tokens in it taken as plain text."""
    encoding = _encoding_of(model)
    if encoding is None:
        return TokenCount(math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN), True)
    pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    return TokenCount(sum(len(encoding.encode_ordinary(piece)) for piece in pieces), False)


def count_request(prompt: str, system: str | None, model: str) -> TokenCount:
    """How many tokens a provider counts for a chat request: its texts, and what frames them."""
    texts = [prompt] if system is None else [system, prompt]
    counts = [count_tokens(text, model) for text in texts]
    framed = sum(found.count + _PER_MESSAGE for found in counts) + _PER_REQUEST
    return TokenCount(framed, any(found.estimated for found in counts))


@cache
def _encoding_of(model: str) -> Any:
    """The tokenizer of a model, None where there is none on this machine."""
    try:
        from tiktoken.model import encoding_name_for_model
    except ImportError:
        return None
    for name in (model, model.rpartition("/")[2]):  # gateways put the provider before the model
        try:
            return _encoding(encoding_name_for_model(name))
        except KeyError:
            continue
    return None


@cache
def _encoding(name: str) -> Any:
    """A tokenizer by the name of its vocabulary, None where that is not installed."""
    import tiktoken

    with _lock:
        if os.environ.get(_CACHE_VARIABLE):  # somebody has seen to it
            return tiktoken.get_encoding(name)
        packed = _vocabulary(name)
        if packed is None:
            return None
        # tiktoken has its vocabulary from a folder whose name it takes from the environment, or from the network.
        with TemporaryDirectory() as folder:
            Path(folder, _CACHED_AS[name]).write_bytes(gzip.decompress(packed.read_bytes()))
            os.environ[_CACHE_VARIABLE] = folder
            try:
                return tiktoken.get_encoding(name)
            finally:
                del os.environ[_CACHE_VARIABLE]


def _vocabulary(name: str) -> Path | None:
    """The file in which the package `bpe-openai` ships a vocabulary."""
    found = find_spec("bpe_openai") if name in _CACHED_AS else None
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder, "data", f"{name}.tiktoken.gz")
        if path.is_file():
            return path
    return None
