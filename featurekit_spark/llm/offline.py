"""The default chat model: a deterministic stand-in that calls nothing, costs nothing, and says so in every answer
that has room for it."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from itertools import count
from typing import Any

from featurekit_spark.costs import Expected
from featurekit_spark.errors import UsageError
from featurekit_spark.llm.base import Completion, Message

__all__ = ["OFFLINE_NOTICE", "OfflineLLM"]

OFFLINE_NOTICE = "(offline stand-in: no model was called)"

_LEAD = re.compile(
    r"^\s*(?:get|find|give|list|suggest|show)?\s*(?:me\s+)?recommendations?\s+for\s*:?\s*", re.IGNORECASE
)


class OfflineLLM:
    """Answers with a numbered list of `suggestions` descriptions made from the prompt's own words: some left
    out, some in another order. Searching for them finds products with similar titles.

    Asked for a JSON Schema, it answers with JSON that follows it, of such words; limits that stand in a description
    (the length of a text) and those of validators are not met.
    """

    def __init__(self, suggestions: int = 3) -> None:
        if suggestions < 1:
            raise UsageError(f"the stand-in makes at least one suggestion, found suggestions={suggestions!r}")
        self.suggestions = suggestions
        self.identity = f"offline/1:suggestions={suggestions}"

    def __repr__(self) -> str:
        return f"OfflineLLM(suggestions={self.suggestions})"

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
        """The same answer to the same request, everywhere; tokens are a rough count, usd is 0."""
        words = _LEAD.sub("", prompt).split() or prompt.split()
        chance = zlib.crc32(prompt.encode("utf-8", "replace"))
        if response_format is not None:
            text = _by_schema(response_format, words, chance, self.suggestions)
        else:
            items = dict.fromkeys(_variant(words, chance, turn) for turn in range(self.suggestions))
            lines = [OFFLINE_NOTICE, *(f"{i}. {item}" for i, item in enumerate(items, start=1) if item)]
            text = "\n".join(lines)
        said = [system or "", *(message["content"] for message in earlier), prompt]
        return Completion(text, sum(map(_tokens, said)), _tokens(text), usd=0.0)

    def expected_cost(
        self, prompt: str, *, system: str | None = None, max_tokens: int | None = None
    ) -> Expected:
        """Nothing but time; an answer is about as long as its prompt for each suggestion."""
        asked = _tokens(prompt)
        answered = _tokens(OFFLINE_NOTICE) + self.suggestions * asked
        return Expected(_tokens(system or "") + asked + answered, 0.0, priced=True)


def _by_schema(response_format: Mapping[str, Any], words: list[str], chance: int, items: int) -> str:
    """JSON by the schema of a `response_format`; an empty object where it has none."""
    turns = count()

    def made(node: Mapping[str, Any]) -> Any:
        if "anyOf" in node:
            return made(next((n for n in node["anyOf"] if n.get("type") != "null"), node["anyOf"][0]))
        turn = next(turns)
        if "enum" in node:
            choices = [choice for choice in node["enum"] if choice is not None] or [None]
            return choices[(chance + turn) % len(choices)]
        match node.get("type"):
            case "object":
                return {name: made(item) for name, item in node.get("properties", {}).items()}
            case "array":
                size = max(node.get("minItems", 0), min(items, node.get("maxItems", items)))
                return [made(node.get("items", {})) for _ in range(size)]
            case "integer" | "number" as kind:
                return _number(node, chance + turn, whole=kind == "integer")
            case "boolean":
                return (chance + turn) % 2 == 0
            case "null":
                return None
        day = date(2026, 1, 1) + timedelta(days=(chance + turn) % 365)
        match node.get("format"):
            case "date":
                return day.isoformat()
            case "date-time":
                return f"{day.isoformat()}T12:00:00Z"
        return _variant(words, chance, turn)

    schema = response_format.get("json_schema", {}).get("schema", {})
    return json.dumps(made(schema) or {}, ensure_ascii=False)


def _number(node: Mapping[str, Any], chance: int, *, whole: bool) -> float:
    """A number within the node's limits: a small whole one where there is one."""
    step = node.get("multipleOf") or 1
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    if low is None:
        low = 0 if high is None or high > 0 else high - 100 * step
    if high is None:
        high = low + 100 * step
    first = math.floor(low / step) + 1 if "exclusiveMinimum" in node else math.ceil(low / step)
    last = math.ceil(high / step) - 1 if "exclusiveMaximum" in node else math.floor(high / step)
    if first > last:
        return float(low + high) / 2
    first = 1 if first <= 1 <= last else first
    found = (first + chance % min(last - first + 1, 100)) * step
    return int(found) if whole or found == int(found) else found


def _variant(words: list[str], chance: int, turn: int) -> str:
    """A description near the words: the first turns drop one word, later ones also rotate what is left."""
    size = len(words)
    if size < 3:
        return " ".join(words if turn % 2 == 0 else reversed(words))
    drop = (chance + turn) % size
    kept = words[:drop] + words[drop + 1 :]
    shift = (turn // 2) % len(kept)
    return " ".join(kept[shift:] + kept[:shift])


def _tokens(text: str) -> int:
    """About four characters to a token, as a rule of thumb for English."""
    return (len(text) + 3) // 4
