"""The one evaluator: distinct keys -> deps by recursion -> identities -> look-up -> build misses.

Runs everywhere: behind `controller.get`, in the local engine, and inside each Spark stage, where results of earlier
stages are given instead of recursed into. Knows a place to look entries up, not who keeps it; writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal, Protocol

from featurekit_spark.batch import NO_LINEAGE, NULL, Batch, Lineage, earliest, fold, lineage
from featurekit_spark.bindings import Bindings
from featurekit_spark.budget import Purse
from featurekit_spark.build import Built, Keep, build_values, finish
from featurekit_spark.builder import (
    Bound,
    Dep,
    Each,
    FeatureBuilder,
    KeySet,
    Source,
    import_path,
    keys_of,
)
from featurekit_spark.cache.base import Found
from featurekit_spark.cache.journal import Journal
from featurekit_spark.errors import (
    AnswersPendingError,
    BudgetError,
    FeaturekitError,
    NotBuiltError,
    UsageError,
)
from featurekit_spark.failures import FailureKind, Failures, KnownFailure, unasked
from featurekit_spark.fingerprint import digest, entry_id, inputs_hash, key_json
from featurekit_spark.flight import SingleFlight
from featurekit_spark.following import Earlier, follow
from featurekit_spark.links import Link, gathered, links_of
from featurekit_spark.results import Counts, Origin, Result, count, from_entry
from featurekit_spark.values import NULL_HASH

__all__ = ["Evaluator", "Lookup"]

Builder = type[FeatureBuilder[Any]]
Key = tuple[Any, ...]
_MICRO_BATCH = 8  # answers of a client that does not tell how many calls it makes at once


class Lookup(Earlier, Protocol):
    """The reading half of a cache."""

    def current(self, builder: str, config_hash: str, keys: Sequence[str]) -> Mapping[str, Found]: ...


class Evaluator:
    """Resolves builders for keys, remembering every result.

    `gather`: what to do where a group-level feature's inputs are a whole group: build it (runs), take the group's
    current entry (workers and single requests), in both cases `NotBuiltError` where there is nothing to take.
    `results[builder name][key]` holds all results, given ones included; `done` counts those that were taken;
    `incomplete` names the builders whose gather lost members that failed. `purse`: what paid builders may still pay;
    `journal`: keeps their answers from the moment they come; `failures`: what they failed at before.
    """

    def __init__(
        self,
        bindings: Bindings,
        context: Any,
        store: Lookup,
        *,
        now: datetime,
        gather: Literal["build", "current"] = "current",
        batch_rows: int = 2048,
        controller: Callable[[Evaluator], Any] | None = None,
        purse: Purse | None = None,
        journal: Journal | None = None,
        failures: Failures | None = None,
        flight: SingleFlight | None = None,
    ) -> None:
        self.bindings, self.context, self.now = bindings, context, now
        self.store: Lookup = store
        self.gather, self.batch_rows = gather, batch_rows
        self.results: dict[str, dict[Key, Result]] = {}
        self.made: dict[str, list[Key]] = {}
        self.purse, self.journal, self.failures = purse, journal, failures
        self.flight = flight
        self._spent: FeaturekitError | None = None
        self.done: dict[str, Counts] = {}
        self.incomplete: set[str] = set()
        self._offers: dict[str, Mapping[Key, Any]] = {}
        self._controller = controller

    def resolve(self, builder: Builder, keys: Iterable[Key]) -> list[Result]:
        """Results of `builder` for `keys`, in their order; a key that was resolved before is not resolved again."""
        known = self.results.setdefault(builder.name, {})
        keys = list(keys)
        todo = [key for key in dict.fromkeys(keys) if key not in known]
        if todo:
            bound = self.bindings[builder]
            for batch in self._batches(bound, todo):
                found = zip(batch, self._resolve_batch(bound, batch), strict=True)
                done = {key: result for key, result in found if result is not None}
                known.update(done)
                self.made.setdefault(builder.name, []).extend(done)
                if self._spent is not None:
                    raise self._spent  # only now: what others of the batch paid for is kept
        return [known[key] for key in keys]

    def give(self, builder: Builder, results: Mapping[Key, Result]) -> None:
        """Results known from elsewhere: an earlier stage, a proven trace."""
        self.results.setdefault(builder.name, {}).update(results)

    def give_source(self, builder: Builder, keys: Sequence[Key], values: Sequence[Any]) -> None:
        """A source's values as a scan read them, taken in as if `build` had returned them."""
        bound = self.bindings[builder]
        results = self._source_results(bound, keys, values, 0.0)
        self.give(builder, {k: self._with_own_read(bound, k, r) for k, r in zip(keys, results, strict=True)})
        self.made.setdefault(builder.name, []).extend(keys)

    def offer(self, builder: Builder, values: Mapping[Key, Any]) -> None:
        """A source's values as a scan read them, for keys that are going to be asked for."""
        self._offers[builder.name] = values

    def take_offered(self, builder: Builder, keys: Iterable[Key]) -> None:
        """Take in what was offered for these keys, at once."""
        values, known = self._offers[builder.name], self.results.get(builder.name, {})
        new = [key for key in keys if key in values and key not in known]
        if new:
            self.give_source(builder, new, [values[key] for key in new])

    def value_hashes(self, builder: Builder, keys: Sequence[Key]) -> list[str]:
        """Value hashes of `keys`, "error" for what fails. What was offered and is fine is hashed and not taken in."""
        values, known = self._offers.get(builder.name, {}), self.results.get(builder.name, {})
        bound = self.bindings[builder]
        if not known and builder.freshness.ttl is None and all(key in values for key in keys):
            there = [value for key in keys if (value := values[key]) is not None]
            checked = bound.type.checked_many(there)
            if checked is not None:
                payloads = [bound.type.encode(value) for value in checked]
                hashes = iter(bound.type.hash_many(checked, payloads))
                return [NULL_HASH if values[key] is None else next(hashes) for key in keys]
        return [result.value_hash or "error" for result in self.resolve(builder, keys)]

    def take_made(self) -> dict[str, list[tuple[str, Result]]]:
        """Results made since the last call, by builder and key as JSON: what a commit looks at."""
        made = {
            name: [(key_json(key), self.results[name][key]) for key in keys]
            for name, keys in self.made.items()
        }
        for name, pairs in made.items():
            self.done.setdefault(name, Counts()).add(count([r for _, r in pairs], paid=self._paid(name)))
        self.made = {}
        return made

    def dep_keys(self, dep: Dep, fields: tuple[str, ...], keys: Sequence[Key]) -> list[Key]:
        """The dep's distinct keys that readers with `keys` lead to; what they come from must be resolved."""
        found: dict[Key, None] = {}
        for item in self._link(dep, fields, keys):
            match item:
                case tuple():
                    found[item] = None
                case list():
                    found.update(dict.fromkeys(key for key in item if key is not None))
        return list(found)

    def read_by(
        self, dep: Dep, fields: tuple[str, ...], keys: Sequence[Key]
    ) -> Iterator[tuple[Builder, list[Key]]]:
        """The builders and keys that readers with `keys` read through `dep`, those its key comes from included."""
        if dep.keyset is None:
            for _, source in dep.on_fields:
                yield from self.read_by(source.dep if isinstance(source, Each) else source, fields, keys)
            yield dep.builder, self.dep_keys(dep, fields, keys)

    def _paid(self, name: str) -> bool:
        return any(b.name == name and b.paid for b, _ in self.bindings.items())

    def _batches(self, bound: Bound, keys: list[Key]) -> Iterable[list[Key]]:
        """Keys in batches of at most `batch_rows`, each of one group."""
        at = [i for i, field in enumerate(bound.key) if field in self.bindings.group_fields]
        groups: dict[Key, list[Key]] = {}
        for key in keys:
            groups.setdefault(tuple(key[i] for i in at), []).append(key)
        for group in groups.values():
            for start in range(0, len(group), self.batch_rows):
                yield group[start : start + self.batch_rows]

    def _resolve_batch(self, bound: Bound, keys: list[Key]) -> Sequence[Result | None]:
        """One result per key; None for keys for which there was no money left."""
        if isinstance(bound.builder, Source):
            return self._resolve_source(bound, keys)
        if bound.builder.is_dynamic():
            return [self._resolve_dynamic(bound, key) for key in keys]
        gathers = any(dep.keyset is not None for dep in bound.deps)
        if gathers and self.gather == "current":
            return self._take_current(bound, keys)
        batch = Batch(bound, keys, [self._column(dep, bound.key, keys) for dep in bound.deps])
        shared = [
            column for dep, column in zip(bound.deps, batch.columns, strict=True) if dep.keyset is not None
        ]
        if any(not cell.failed and cell.value.failed for column in shared for cell in column):
            self.incomplete.add(bound.name)
        for row in batch.odd_rows():
            batch.results[row] = self._cut_short(bound, keys[row], batch.cells(row))
        wanted = batch.identify()
        found = {} if bound.builder.inline else self.store.find(bound.name, bound.config_hash, wanted)
        self._mark_emptied(bound, keys, batch.results)
        misses = []
        for row, (text, _, identity) in enumerate(batch.identities):
            if batch.results[row] is None:
                hit = found.get(text)
                if hit is not None and hit.entry.entry_id == identity and self._lives(bound, hit):
                    batch.results[row] = self._hit(bound, hit, batch.lineage(row))
                else:
                    misses.append(row)
        if misses and bound.builder.paid and self.failures is not None:
            misses = batch.remember(misses, self.failures.standing(bound, self.now))
        if misses:
            self._build(batch, misses)
        return batch.results

    def _build(self, batch: Batch, misses: list[int]) -> None:
        """Results for the rows that no entry answers."""
        self._build_anew(batch, follow(batch, misses, self.bindings, self.store, self.context, self.now))

    def _build_anew(self, batch: Batch, misses: list[int]) -> None:
        journal = self.journal if batch.bound.builder.paid else None
        if journal is not None:
            identities = {batch.identities[row][0]: batch.identities[row][2] for row in misses}
            found = journal.find(batch.bound.name, identities)
            for row in misses:
                if (entry := found.get(batch.identities[row][0])) is not None:
                    batch.recall(row, entry)
            misses = [row for row in misses if batch.results[row] is None]
        for rows in self._affordable(batch.bound, misses):
            keep = None if journal is None else self._keep(journal, batch, rows)
            built = self._values(batch.bound, batch.inputs(rows), keep)
            for row, item in zip(rows, built, strict=True):
                if item.found is not None:
                    hit = Found(item.found)
                    batch.results[row] = self._hit(batch.bound, hit, batch.lineage(row))
                elif item.refused is not None:
                    text, _, identity = batch.identities[row]
                    error = f"{batch.bound.name}{text}: {item.refused}"
                    known = KnownFailure(error, self.now, FailureKind.TERMINAL, attempts=1)
                    batch.remember([row], {identity: known})
            there = [
                at
                for at, item in enumerate(built)
                if not item.elsewhere
                and not isinstance(item.error, AnswersPendingError)
                and not unasked(item.error)
            ]
            batch.take([rows[at] for at in there], [built[at] for at in there], self.now)

    def _keep(self, journal: Journal, batch: Batch, rows: list[int]) -> Keep:
        """Has answers for some of these rows written down as they come."""

        def write(places: list[int], built: list[Built]) -> None:
            entries = batch.entries([rows[place] for place in places], built, self.now, journal.run_id)
            if len(entries):
                journal.add(entries)

        clients = (getattr(self.context, name, None) for name in batch.bound.builder.needs)
        in_flight = max((getattr(client, "concurrency", 0) for client in clients), default=0)
        flight = None
        if self.flight is not None:
            identities = [batch.identities[row][2] for row in rows]
            flight = self.flight.of(
                batch.bound.name,
                identities,
                lambda entry: self._lives(batch.bound, Found(entry)),
                refusals=self.failures is None or self.failures.remembers(batch.bound),
            )
        return Keep(journal.size or in_flight or _MICRO_BATCH, write, flight)

    def _affordable(self, bound: Bound, rows: list[int]) -> Iterator[list[int]]:
        """Rows to build next, until all are or the budget is reached; all at once where nothing limits them."""
        while rows and self._spent is None:
            size = len(rows)
            if self.purse is not None and bound.builder.paid:
                size = self.purse.grant(bound.name, size)
                if not size:
                    self._spent = self.purse.ended(bound.name)
            if size:
                yield rows[:size]
            rows = rows[size:]

    def _values(self, bound: Bound, inputs: Mapping[str, list[Any]], keep: Keep | None = None) -> list[Built]:
        built = build_values(bound, inputs, self.context, keep)
        if self.purse is not None and bound.builder.paid:
            made = [item for item in built if not item.elsewhere]
            answers = [item.usd for item in made if item.error is None]
            failed = [item.usd for item in made if item.error is not None and not unasked(item.error)]
            self.purse.charge(bound.name, answers, failed)
        spent = sorted((b.error for b in built if isinstance(b.error, BudgetError)), key=unasked)
        self._spent = spent[0] if spent else self._spent
        return built

    def _resolve_source(self, bound: Bound, keys: list[Key]) -> Sequence[Result | None]:
        """A source is read again and compared, unless its ttl says that what was read still stands."""
        results: dict[Key, Result] = {}
        if bound.builder.freshness.ttl is not None:
            texts = {key_json(key): key for key in keys}
            for text, hit in self.store.current(bound.name, bound.config_hash, list(texts)).items():
                if self._lives(bound, hit):
                    results[texts[text]] = self._hit(bound, hit)
        offered = self._offers.get(bound.name, {})
        scanned = [key for key in keys if key in offered and key not in results]
        if scanned:
            values = [offered[key] for key in scanned]
            results.update(zip(scanned, self._source_results(bound, scanned, values, 0.0), strict=True))
        todo = [key for key in keys if key not in results]
        for rows in self._affordable(bound, list(range(len(todo)))):
            part = [todo[row] for row in rows]
            inputs = {field: [key[i] for key in part] for i, field in enumerate(bound.key)}
            built = self._values(bound, inputs)
            values = [b.error if b.error is not None else b.value for b in built]
            seconds = sum(b.seconds for b in built)
            results.update(zip(part, self._source_results(bound, part, values, seconds), strict=True))
        found = ((key, results.get(key)) for key in keys)
        return [None if result is None else self._with_own_read(bound, key, result) for key, result in found]

    def _source_results(
        self, bound: Bound, keys: Sequence[Key], values: Sequence[Any], seconds: float
    ) -> list[Result]:
        """What a source read, identified by its content: reading the same again finds the same entry."""
        share = seconds / max(len(keys), 1)
        built = [
            Built(error=v, seconds=share) if isinstance(v, Exception) else Built(v, share) for v in values
        ]
        made = finish(bound, keys, built, self.now, [("", "")] * len(keys), [(None, ())] * len(keys))
        for key, result in zip(keys, made, strict=True):
            if not result.failed:
                result.inputs_hash = inputs_hash([result.value_hash or ""])
                result.entry_id = entry_id(bound.name, bound.config_hash, key_json(key), result.inputs_hash)
        if bound.builder.inline:
            return made
        wanted = {
            key_json(key): r.entry_id for key, r in zip(keys, made, strict=True) if r.entry_id is not None
        }
        found = self.store.find(bound.name, bound.config_hash, wanted)
        for i, key in enumerate(keys):
            hit = found.get(key_json(key))
            expired = bound.builder.freshness.ttl is not None
            if hit is not None and made[i].entry_id == hit.entry.entry_id and not expired:
                made[i] = self._hit(bound, hit)
        return made

    def _with_own_read(self, bound: Bound, key: Key, result: Result) -> Result:
        if bound.name in self.bindings.value_sources:
            result.reads = ((import_path(type(bound.builder)), key_json(key), result.value_hash or "error"),)
        return result

    def _resolve_dynamic(self, bound: Bound, key: Key) -> Result:
        """A hand-written `get`: valid while everything it read last time still has the same value, else run again."""
        if self._controller is None:
            raise UsageError(f"{bound.name} is a hand-written get and needs a controller to run")
        text = key_json(key)
        hit = self.store.current(bound.name, bound.config_hash, [text]).get(text)
        controller = self._controller(self)
        if (
            hit is not None
            and hit.reads is not None
            and self._lives(bound, hit)
            and controller.still_reads(hit.reads)
        ):
            result = self._hit(bound, hit)
            result.reads = tuple((path, read, value_hash) for path, read, value_hash in json.loads(hit.reads))
            return result
        return controller.run_by_hand(bound, key, self.now)  # type: ignore[no-any-return]

    def _take_current(self, bound: Bound, keys: list[Key]) -> list[Result]:
        texts = [key_json(key) for key in keys]
        found = self.store.current(bound.name, bound.config_hash, texts)
        for key, text in zip(keys, texts, strict=True):
            if text not in found:
                raise NotBuiltError(
                    f"{bound.name} was never built for {dict(zip(bound.key, key, strict=True))!r} with this config. "
                    f"Run it for the whole group first (session.run), or pass gather=True to build it now."
                )
        return [self._hit(bound, found[text]) for text in texts]

    def _column(self, dep: Dep, fields: tuple[str, ...], keys: list[Key]) -> list[Result]:
        """One result of the dep per reader key; a fan-out or a gather is folded into one result."""
        if dep.keyset is not None:
            groups = [keys_of(fields, key, dep.keyset.key) for key in keys]
            gathered = {group: self._gather(dep, dep.keyset, group) for group in dict.fromkeys(groups)}
            return [gathered[group] for group in groups]
        links = self._link(dep, fields, keys)
        flat = [k for k in links if isinstance(k, tuple)]
        flat += [k for link in links if isinstance(link, list) for k in link if k is not None]
        known = dict(zip(flat, self.resolve(dep.builder, flat), strict=True)) if flat else {}
        column = []
        for link in links:
            match link:
                case tuple():
                    column.append(known[link])
                case list():
                    column.append(fold([NULL if k is None else known[k] for k in link]))
                case _:
                    column.append(link)
        return column

    def _link(self, dep: Dep, fields: tuple[str, ...], keys: Sequence[Key]) -> list[Link]:
        """Where each reader key leads: a key, a list of keys, or a result that already decides (null, failed)."""
        columns = {
            field: self._column(source.dep if isinstance(source, Each) else source, fields, list(keys))
            for field, source in dep.on_fields
        }
        return links_of(dep, fields, keys, columns)

    def _gather(self, dep: Dep, keyset: type[KeySet], group: Key) -> Result:
        members = self.resolve(keyset, [group])[0]
        if members.failed:
            return members
        ids = members.value or []
        keys = [(*group, member) for member in ids]
        column = self._column(replace(dep, keyset=None), keyset.member_key(), keys)
        return gathered(group, ids, column)

    def _cut_short(self, bound: Bound, key: Key, cells: list[Result]) -> Result | None:
        """The result where no build is needed: an input failed, or is null and nulls are not accepted."""
        failed = next((cell for cell in cells if cell.failed), None)
        if failed is not None:
            inputs = digest("failed", failed.error or "")
            return Result(
                Origin.STILL if failed.origin in (Origin.REMEMBERED, Origin.STILL) else Origin.UPSTREAM,
                None,
                error=failed.error,
                ts=self.now,
                inputs_hash=inputs,
                entry_id=entry_id(bound.name, bound.config_hash, key_json(key), inputs),
                until=failed.until,
            )
        if not bound.builder.accepts_null and any(cell.is_null for cell in cells):
            until, reads = lineage(cells)
            return Result(Origin.EMPTY, NULL_HASH, kind=bound.type, until=until, reads=reads)
        if any(cell.unknown for cell in cells):
            return Result(Origin.MISS, None)
        return None

    def _mark_emptied(self, bound: Bound, keys: list[Key], results: list[Result | None]) -> None:
        """Null without a build has no entry: where the key has one from before, that is no longer the current one."""
        empty = {
            key_json(key): result
            for key, result in zip(keys, results, strict=True)
            if result is not None and result.origin is Origin.EMPTY
        }
        if empty and not bound.builder.inline:
            for text in self.store.current(bound.name, bound.config_hash, list(empty)):
                empty[text].current = False

    def _lives(self, bound: Bound, hit: Found) -> bool:
        until = bound.builder.freshness.expiry(hit.entry.ts)
        return until is None or self.now < until

    def _hit(self, bound: Bound, hit: Found, inherited: Lineage = NO_LINEAGE) -> Result:
        until, reads = inherited
        own = bound.builder.freshness.expiry(hit.entry.ts)
        result = from_entry(hit.entry, bound.type, current=hit.current, until=earliest(until, own))
        result.reads = reads
        return result
