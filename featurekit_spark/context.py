"""What builders are given besides their inputs: databases, model, embedder, clock. Nothing else is global.

Owns the defaults, which need no network. Everything in it must be picklable, because it travels to workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from featurekit_spark.embed.base import Embedder
from featurekit_spark.embed.hashing import HashingEmbedder
from featurekit_spark.errors import ContextError
from featurekit_spark.llm.base import ChatModel
from featurekit_spark.llm.offline import OfflineLLM
from featurekit_spark.search.matrix import MatrixStore

__all__ = ["Context", "FixedClock", "utc_now"]


def utc_now() -> datetime:
    """The current instant, aware, in UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class FixedClock:
    """A clock that stands still: `Context(clock=FixedClock(datetime(2026, 1, 31, tzinfo=UTC)))`."""

    instant: datetime

    def __post_init__(self) -> None:
        if self.instant.tzinfo is None:
            raise ContextError(
                f"FixedClock({self.instant!r}) has no time zone; pass an aware datetime, such as UTC"
            )

    def __call__(self) -> datetime:
        return self.instant


@dataclass(frozen=True)
class Context:
    """The dependencies of a run or a request, all optional.

    `merchant_config` is read with defaults: `prompt_template`, `template_engine`, `top_k`, `title_attribute`,
    `dimensions` (of the market), `logic_builders`, `suggestions`, `temperature`, `max_tokens`, and what builders
    of your own look for. A builder sees only the attributes it names in `needs`. For attributes of your own, subclass
    with a frozen dataclass.
    """

    product_db: Any = None
    interaction_data_db: Any = None
    merchant_config: Mapping[str, Any] = field(default_factory=dict)
    llm: ChatModel = field(default_factory=OfflineLLM)
    embedder: Embedder = field(default_factory=HashingEmbedder)
    matrices: MatrixStore = field(default_factory=MatrixStore.temporary)
    clock: Callable[[], datetime] = utc_now
    vector_index: Any = None
