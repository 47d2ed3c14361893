"""In which order `featurekit --help` tells its commands: what a newcomer needs first comes first."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

__all__ = ["InOrder"]

_ORDER = (
    *("demo", "doctor", "config"),  # to begin with
    *("plan", "run", "explain", "runs", "cost", "outputs"),  # daily
    *("adopt", "invalidate", "cache"),  # care
)


class InOrder(TyperGroup):
    """A group whose commands are listed in that order, those it does not know last."""

    def list_commands(self, ctx: Any) -> list[str]:
        known = {name: place for place, name in enumerate(_ORDER)}
        return sorted(super().list_commands(ctx), key=lambda name: known.get(name, len(known)))
