"""`featurekit config show`: every setting, its value and where it came from. Secrets are masked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.shared import Answer, Engine, OpenOptions, answering, command_app
from featurekit_spark.errors import UsageError

if TYPE_CHECKING:
    from featurekit_spark.settings import Leaf

__all__ = ["config_app"]

_WIDEST = 60
config_app = command_app("config", "See the settings that a run would have, and where each is from.")


@config_app.command("show")
@answering
def show_command(
    options: OpenOptions,
    key: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Only these, or all below: llm, search.top_k."),
    ] = None,
    engine: Engine = None,
) -> Answer:
    """Print every setting, its value, and where that came from.

    From a default, the conf file, the merchant's file, an environment variable or --set. Passwords are masked.

    Example: featurekit config show llm cache --conf-file conf/dev.yaml --merchant demo
    """
    from featurekit_spark.errors import known_names

    leaves = options.settings(engine).leaves()
    wanted = [text.rstrip(".") for text in key or ()]
    for name in wanted:
        if not any(_below(leaf.key, name) for leaf in leaves):
            raise UsageError(f"no setting {name!r}. {known_names(name, [leaf.key for leaf in leaves])}")
    shown = [leaf for leaf in leaves if not wanted or any(_below(leaf.key, name) for name in wanted)]
    facts = {leaf.key: {"value": leaf.value, "origin": leaf.origin} for leaf in shown}
    return Answer(facts, _lines(shown))


def _lines(leaves: Sequence[Leaf]) -> Iterator[str]:
    rows = [("key", "value", "origin"), *((leaf.key, _text(leaf.value), leaf.origin) for leaf in leaves)]
    widths = [min(max(len(row[i]) for row in rows), _WIDEST) for i in range(2)]
    for row in rows:
        yield f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}"


def _below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _text(value: Any) -> str:
    """As `--set` takes it: JSON is YAML; a plain text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
