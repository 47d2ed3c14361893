"""Stand-ins for the outside world that count what they are asked: databases, a chat model, a clock.

They keep everything in memory, need no network, and travel to Spark workers as copies.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from featurekit_spark.llm.base import Completion, Message
from featurekit_spark.sources.base import AttributeId, Dimension, IngestionDimensionKey, ProductId
from featurekit_spark.sources.interactions import interaction_schema
from featurekit_spark.sources.memory import InMemoryProductDB

__all__ = ["CountingLLM", "InteractionDBFake", "MovingClock", "ProductDBFake"]


@dataclass
class MovingClock:
    """A clock that moves when told to: `Context(clock=MovingClock())`, then `clock.advance(hours=6)`."""

    now: datetime = datetime(2026, 1, 31, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **duration: float) -> None:
        """Move on by a `timedelta(**duration)`."""
        self.now += timedelta(**duration)


@dataclass
class ProductDBFake:
    """A ProductDB over a dictionary that a test may edit between runs: `{product_id: {attribute: value}}`.

    A value that varies is a dict by dimension key, `{(): "Lamp", (("locale", "de_DE"),): "Lampe"}`.
    `requests` holds what was asked for: (sorted attribute ids, sorted product ids or None for all).
    """

    products: dict[ProductId, dict[AttributeId, Any]]
    requests: list[tuple[list[AttributeId], list[ProductId] | None]] = field(default_factory=list)

    async def get_product_attribute_dimensions(self) -> dict[AttributeId, Dimension]:
        """Every attribute that some product has, with what it varies by."""
        return await InMemoryProductDB(self.products).get_product_attribute_dimensions()

    async def get_products(
        self, attribute_ids: set[AttributeId], product_ids: set[ProductId] | None = None
    ) -> dict[ProductId, dict[AttributeId, dict[IngestionDimensionKey, Any]]]:
        """As the ProductDB protocol says; DataError for an attribute that no product has."""
        self.requests.append((sorted(attribute_ids), None if product_ids is None else sorted(product_ids)))
        return await InMemoryProductDB(self.products).get_products(attribute_ids, product_ids)


@dataclass
class InteractionDBFake:
    """Interactions per (merchant, market) from plain rows: entity_id, product_id, kind, served_at,
    reacted_at.
    """

    rows: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)

    async def get_interactions(
        self,
        merchant: str,
        market: str,
        *,
        entity_ids: Collection[str] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> pa.Table:
        """The rows of some entities (None: all) with since <= served_at < until, sorted by time."""
        rows = [
            row
            for row in self.rows.get((merchant, market), [])
            if (entity_ids is None or row["entity_id"] in entity_ids)
            and (since is None or row["served_at"] >= since)
            and (until is None or row["served_at"] < until)
        ]
        ordered = sorted(rows, key=lambda row: (row["served_at"], row["entity_id"], row["product_id"]))
        return pa.Table.from_pylist(ordered, schema=interaction_schema())


@dataclass
class CountingLLM:
    """A ChatModel that answers from a mapping or a function and counts its calls by prompt.

    `failures`: the exception to raise for a prompt, for as long as it is listed. `log`: a file that gets
    one line per call, by which calls in other processes (Spark workers have copies) are counted too.
    """

    answers: Mapping[str, str] | Callable[[str], str] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    identity: str = "fake:counting"
    temperature: float | None = 0.0
    max_tokens: int | None = 256
    usd_per_call: float | None = 0.001
    log: Path | None = None
    _here: Counter[str] = field(default_factory=Counter)

    async def complete(
        self,
        prompt: str,
        *,
        system: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        earlier: Sequence[Message] = (),
    ) -> Completion:
        """The answer given for `prompt`; a prompt that has none is answered with itself."""
        self._count(prompt)
        if prompt in self.failures:
            raise self.failures[prompt]
        text = self.answers(prompt) if callable(self.answers) else self.answers.get(prompt, prompt)
        return Completion(text, len(prompt.split()), len(text.split()), self.usd_per_call)

    @property
    def calls(self) -> Counter[str]:
        """Calls by prompt; of all processes where there is a `log`, else of this one."""
        if self.log is None:
            return self._here
        if not self.log.exists():
            return Counter()
        return Counter(map(json.loads, self.log.read_text().splitlines()))

    def _count(self, prompt: str) -> None:
        self._here[prompt] += 1
        if self.log is not None:
            # One write of one short line: appends by several processes do not mix.
            file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, json.dumps(prompt).encode() + b"\n")
            finally:
                os.close(file)
