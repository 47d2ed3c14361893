"""Clients whose answers may come when the run that asked has ended: what the core asks of them, and how what came is
taken into the cache, once, under the identity that it was asked with.

Knows builders and entries; what is handed in, and to whom, is the client's affair.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Bound, FeatureBuilder, import_path, load_builder
from featurekit_spark.cache.base import Entry, FeatureCache, TraceRow
from featurekit_spark.errors import (
    AnswersPendingError,
    BudgetError,
    ContextError,
    FeaturekitError,
    UsageError,
)
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.fingerprint import digest, entry_id, inputs_hash, key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.results import new_entries, to_rows

__all__ = [
    "Answers",
    "Asker",
    "Collecting",
    "Deferring",
    "OnTheWay",
    "collecting",
    "deferring",
    "handing_in",
    "on_the_way",
    "take_in",
    "take_in_answers",
    "until_answered",
]

_log = logging.getLogger(__name__)
T = TypeVar("T")
Came = Callable[[Mapping[str, str]], set[str]]
"""Of prompts by some name: the names of those whose answers another run has taken in meanwhile."""
Rows = Collection[tuple[str, tuple[Any, ...]]]
"""Builders' names and keys."""
_ASKED_BY = ("prompt",)
_ROWS = 2_048


@dataclass(frozen=True)
class Asker:
    """A builder that asks prompts, as a later process finds it, whatever its configuration is then."""

    builder: str
    name: str
    config: Mapping[str, Any]
    config_hash: str

    @classmethod
    def of(cls, bound: Bound) -> Asker | None:
        """None for a config that is more than JSON, and for a builder that is not keyed by the prompt alone."""
        told = asdict(bound.config)
        try:
            plain = json.loads(json.dumps(told)) == told
        except (TypeError, ValueError):
            return None
        if not plain or bound.key != _ASKED_BY or bound.deps:
            return None
        return cls(import_path(type(bound.builder)), bound.name, told, bound.config_hash)

    def entry_id(self, prompt: str) -> str:
        """Of the entry that an answer to this prompt becomes."""
        return entry_id(self.name, self.config_hash, key_json((prompt,)), inputs_hash(()))

    def bindings(self, context: Any) -> tuple[Bindings, type[FeatureBuilder[Any]]] | None:
        """The builder as it asked; None where its code is another today, or gone."""
        try:
            builder = load_builder(self.builder)
            bindings = Bindings(context, {builder: builder.Config(**self.config)})
            same = bindings[builder].config_hash == self.config_hash
        except (UsageError, TypeError):
            return None
        return (bindings, builder) if same else None


@dataclass(frozen=True)
class Answers:
    """What came of one hand-in of the run `run_id`, at the time `at`. `client`: answers these prompts as the model did
    that was asked, and raises AnswersPendingError for others; `done`: is called with the rows that the cache has."""

    run_id: str
    at: datetime
    askers: tuple[Asker, ...]
    prompts: Sequence[str]
    client: Any
    done: Callable[[Rows], None]


@dataclass(frozen=True)
class OnTheWay:
    """One hand-in whose answers are to come. `said`: what it is, for people."""

    askers: tuple[Asker, ...]
    prompts: Sequence[str]
    said: str


@runtime_checkable
class Collecting(Protocol):
    """A client that knows of calls which were handed in, by whatever run and with whatever configuration."""

    @property
    def pays_again(self) -> bool:
        """Whether what is on the way is asked once more all the same."""

    def collecting(self, run_id: str) -> AbstractContextManager[Iterable[Answers]]:
        """What came since. No other run is given it meanwhile."""

    def on_the_way(self) -> list[OnTheWay]:
        """What is to come, by what is written down here; nobody else is asked."""

    def opened(self, run_id: str, askers: Sequence[Asker], came: Came) -> AbstractContextManager[None]:
        """For the length of a run, or of a part of it: a call that is on its way raises AnswersPendingError, for which
        single requests do not wait."""


@runtime_checkable
class Deferring(Collecting, Protocol):
    """A client that hands calls in. While it is `opened`, a call that has no answer yet raises AnswersPendingError, and
    at the end all that was asked is handed in together. What was answered meanwhile is in the cache when it ends. Only
    the driver calls it."""

    def awaited(self, run_id: str) -> bool:
        """Wait for what this run asked, as long as it may. Whether anything came, for which the run is to be carried
        out once more."""


def collecting(builders: Iterable[type[FeatureBuilder[Any]]], context: Any) -> list[Collecting]:
    """The clients of paid builders that may know of calls on their way."""
    names = dict.fromkeys(name for builder in builders if builder.paid for name in builder.needs)
    clients = (getattr(context, name, None) for name in names)
    return [client for client in clients if isinstance(client, Collecting)]


def deferring(builders: Iterable[type[FeatureBuilder[Any]]], context: Any) -> list[Deferring]:
    """The clients of paid builders that hand calls in."""
    return [client for client in collecting(builders, context) if isinstance(client, Deferring)]


@contextmanager
def handing_in(graph: Graph, job: Job) -> Iterator[None]:
    """For the length of a run."""
    with ExitStack() as opened:
        for client in collecting(graph, job.context):
            askers = [
                asker
                for builder in graph
                if builder.paid and client in collecting([builder], job.context)
                if (asker := Asker.of(job.bindings[builder])) is not None
            ]
            came = _came(askers, job.cache, time.time_ns())
            opened.enter_context(client.opened(job.run_id, askers, came))
        yield


def until_answered(graph: Graph, job: Job, execute: Callable[[], T]) -> T:
    """Carry out a run, once more each time when answers came that it waits for: they are entries then, whoever took
    them in."""
    while True:
        try:
            return execute()
        except AnswersPendingError:
            if not any(client.awaited(job.run_id) for client in deferring(graph, job.context)):
                raise
            take_in_answers(graph, job)


def take_in_answers(graph: Graph, job: Job) -> frozenset[str]:
    """Before anything is planned or refused: what came of earlier runs' calls, of any group, becomes entries under
    those runs' names. What no builder can read stays where it is, for a run whose builder does.

    The entry_ids of what is still to come, and is asked once more all the same.
    """
    found: set[str] = set()
    for client in collecting(graph, job.context):
        own = [builder for builder in graph if builder.paid and client in collecting([builder], job.context)]
        taken = 0
        with client.collecting(job.run_id) as came:
            for answers in came:
                taken += take_in(answers, job.cache, job.context, fallback=(job.bindings, own))
        if taken:
            job.cache.drop_marks()
        if client.pays_again:
            found |= on_the_way([client]).keys()
    return frozenset(found)


def on_the_way(clients: Iterable[Collecting]) -> dict[str, OnTheWay]:
    """What is to come, by the entry_id that it will have."""
    return {
        asker.entry_id(prompt): sent
        for client in clients
        for sent in client.on_the_way()
        for asker in sent.askers
        for prompt in sent.prompts
    }


def take_in(
    answers: Answers,
    cache: FeatureCache,
    context: Any,
    *,
    fallback: tuple[Bindings, Sequence[type[FeatureBuilder[Any]]]] | None = None,
) -> int:
    """Append what came of one hand-in, each answer once; how many entries. `fallback`: who may have asked where nobody
    is named, or can be found. What needs more than `context` has waits for a run that has it. So does, with a warning,
    what no code was made for: one hand-in must not keep others from the cache."""
    taken, kept = 0, set[tuple[str, tuple[Any, ...]]]()
    try:
        known, waits = _readers(answers, context, fallback)
        for bindings, builder, view in known:
            for start in range(0, len(answers.prompts), _ROWS):
                prompts = answers.prompts[start : start + _ROWS]
                evaluator = Evaluator(bindings, view, _Nothing(), now=answers.at, batch_rows=_ROWS)
                # Of prompts that another builder asked; or lines that say that there was no quota.
                with suppress(AnswersPendingError, BudgetError, ContextError):
                    evaluator.resolve(builder, [(prompt,) for prompt in prompts])
                kept |= {(builder.name, key) for key in evaluator.made.get(builder.name, ())}
                taken += _append(cache, evaluator, bindings[builder], answers.run_id, answers.at)
        if not waits:
            answers.done(kept)
    except FeaturekitError:
        raise
    except Exception as error:
        _log.warning(
            "what came of calls that run %s handed in cannot be taken in, and stays: %s: %s",
            *(answers.run_id, type(error).__name__, error),
        )
    return taken


def _readers(
    answers: Answers, context: Any, fallback: tuple[Bindings, Sequence[type[FeatureBuilder[Any]]]] | None
) -> tuple[list[tuple[Bindings, type[FeatureBuilder[Any]], _Recalling]], bool]:
    """Who reads what came, and in what context; whether somebody asked who cannot read here."""
    asked = [found for asker in answers.askers if (found := asker.bindings(context)) is not None]
    if not asked and fallback is not None:
        bindings, builders = fallback
        prompted = [b for b in builders if b.key == _ASKED_BY and not bindings[b].deps]
        asked = [(bindings, builder) for builder in prompted]
    views = [(*found, _Recalling.of(found[1], context, answers.client)) for found in asked]
    known = [(bindings, builder, view) for bindings, builder, view in views if view is not None]
    return known, len(known) < len(views)


def _append(cache: FeatureCache, evaluator: Evaluator, bound: Bound, run_id: str, now: datetime) -> int:
    """What was made, but for what the cache has from this very hand-in."""
    pairs = evaluator.take_made().get(bound.name, [])
    entries = new_entries(to_rows(bound.name, bound.config_hash, pairs), run_id)
    known = cache.by_id(bound.name, entries["entry_id"].to_pylist())
    living = {
        identity: entry
        for identity, entry in known.items()
        if entry.run_id == run_id
        or (until := bound.builder.freshness.expiry(entry.ts)) is None
        or now < until
    }
    old = pa.array([identity in living for identity in entries["entry_id"].to_pylist()], pa.bool_())
    pointers: list[TraceRow] = []
    twice: list[dict[str, Any]] = []
    for row in entries.filter(old).to_pylist():
        entry = living[row["entry_id"]]
        if entry.run_id != run_id and row["status"] == "ok":
            # Under a name of its own, and with inputs that make this name.
            inputs = digest("paid twice", row["entry_id"], run_id)
            identity = entry_id(bound.name, bound.config_hash, row["key"], inputs)
            twice.append({**row, "entry_id": identity, "inputs_hash": inputs, "key": entry.key})
            pointers.append(_still(entry, now, run_id))
    new = entries.filter(pc.invert(old))
    is_error = pc.equal(new["status"], "error")
    # No answer is found by these, so that they are looked for by their names: a process may have died before `done`.
    unfound = pa.concat_tables([new.filter(is_error), pa.Table.from_pylist(twice, schema=entries.schema)])
    unfound = _not_stored(cache, unfound, bound.name, run_id)
    rows = pa.concat_tables([new.filter(pc.invert(is_error)), unfound])
    if len(rows):
        cache.append(rows, pointers)
    return len(rows)


def _not_stored(cache: FeatureCache, rows: pa.Table, builder: str, run_id: str) -> pa.Table:
    """Rows of this run of which the cache has none by the same name."""
    if not len(rows) or not cache.has(builder):
        return rows
    stored = cache.history(builder, ("entry_id", "run_id"))
    own = stored.filter(pc.equal(stored["run_id"], run_id))["entry_id"].unique()
    return rows.filter(pc.invert(pc.is_in(rows["entry_id"], own)))


def _still(entry: Entry, now: datetime, run_id: str) -> TraceRow:
    """What was paid for meanwhile is the answer: another one that comes later costs, and changes nothing."""
    return TraceRow(
        entry.builder,
        "pointer",
        entry.key,
        entry.config_hash,
        now,
        run_id,
        entry_id=entry.entry_id,
        value_hash=entry.value_hash,
    )


def _came(askers: Sequence[Asker], cache: FeatureCache, since: int) -> Came:
    """Looks for entries that were recorded since then (ns since 1970)."""

    def came(prompts: Mapping[str, str]) -> set[str]:
        found: set[str] = set()
        for asker in askers:
            names = {asker.entry_id(prompt): name for name, prompt in prompts.items()}
            known = cache.by_id(asker.name, names) if cache.has(asker.name) else {}
            found |= {names[identity] for identity, entry in known.items() if entry.recorded >= since}
        return found

    return came


class _Nothing:
    """A store without entries: that an answer was paid for is to be told, whatever else is known."""

    def find(self, builder: str, config_hash: str, wanted: Mapping[str, str]) -> Mapping[str, Any]:
        return {}

    def current(self, builder: str, config_hash: str, keys: Sequence[str]) -> Mapping[str, Any]:
        return {}

    def candidates(self, builder: str, config_hash: str, keys: Sequence[str]) -> Sequence[Any]:
        return ()


class _Recalling:
    """A context whose clients give the answers that came."""

    def __init__(self, context: Any, clients: Collection[str], client: Any) -> None:
        self._context, self._clients, self._client = context, clients, client

    @classmethod
    def of(cls, builder: type[FeatureBuilder[Any]], context: Any, client: Any) -> _Recalling | None:
        """None where it has not all that the builder needs. Without a context (None) it has a client only, which is
        what a builder asks that needs one thing."""
        needs = tuple(builder.needs)
        try:
            found = {} if context is None else {name: getattr(context, name) for name in needs}
        except Exception:  # what a context makes when it is asked for may fail in its own way
            return None
        clients = [name for name, value in found.items() if isinstance(value, Collecting)]
        if not clients and len(needs) > 1:
            return None
        return cls(context, clients or needs, client)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._client if name in self._clients else getattr(self._context, name)
