"""Filters as Qdrant's conditions on the payload. Knows no client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from featurekit_spark.errors import UsageError
from featurekit_spark.search.filters import And, Equals, Filter, In, Or, Range

if TYPE_CHECKING:
    from qdrant_client import models

__all__ = ["compiled", "condition"]


def compiled(wanted: Filter | None) -> models.Filter | None:
    from qdrant_client import models

    return None if wanted is None else models.Filter(must=[condition(wanted)])


def condition(wanted: Filter) -> Any:
    from qdrant_client import models

    match wanted:
        case Equals(name, value):
            if isinstance(value, float):  # it matches whole numbers only
                return models.FieldCondition(key=f"p.{name}", range=models.Range(gte=value, lte=value))
            return models.FieldCondition(key=f"p.{name}", match=models.MatchValue(value=value))
        case In(name, values):
            if isinstance(values[0], bool | float):
                return models.Filter(should=[condition(Equals(name, value)) for value in values])
            some: list[Any] = list(values)
            return models.FieldCondition(key=f"p.{name}", match=models.MatchAny(any=some))
        case Range(name):
            bounds: dict[str, Any] = wanted.bounds
            if any(isinstance(bound, str) for bound in bounds.values()):
                raise UsageError(
                    f"filter: Qdrant has no ranges of text, and field {name!r} is text; use Equals or In"
                )
            return models.FieldCondition(key=f"p.{name}", range=models.Range(**bounds))
        case And(parts):
            return models.Filter(must=[condition(part) for part in parts])
        case Or(parts):
            return models.Filter(should=[condition(part) for part in parts])
    assert_never(wanted)
