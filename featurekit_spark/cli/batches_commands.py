"""`featurekit batches list | collect | cancel`: calls that were handed in and are on their way. What is handed in, and
how it is taken in, is in `llm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.shared import NOBODY, Answer, DryRun, OpenOptions, answering, command_app
from featurekit_spark.cli.wording import counted, table
from featurekit_spark.errors import ContextError, UsageError, known_names

if TYPE_CHECKING:
    from featurekit_spark.cache.folder import Folder
    from featurekit_spark.llm.batch_desk import BatchDesk
    from featurekit_spark.llm.batch_records import Submission
    from featurekit_spark.llm.openai import OpenAIChat

__all__ = ["batches_app"]

batches_app = command_app(
    "batches", "Calls that were handed in by batch (llm.mode: batch), and what came of them."
)
_OWNER = "featurekit batches"


@batches_app.command("list")
@answering
def list_command(options: OpenOptions) -> Answer:
    """What is on its way, and what came and no run has taken in.

    Of all models and runs of the cache. Asks the provider how far each is, if settings name one (llm.provider: openai)
    and its key is set. Changes nothing.

    Example: featurekit batches list --conf-file conf/prod.yaml
    """
    with _opened(options) as counter:
        batches, notes = counter.told()
    rows = [("batch", "model", "state", "requests", "since", "run"), *map(_row, batches)]
    text = list(table(rows, align="<<<><<")) if batches else ["no calls are on their way"]
    return Answer({"status": "ok", "folder": str(counter.folder), "batches": batches}, text, notes)


@batches_app.command("collect")
@answering
def collect_command(options: OpenOptions) -> Answer:
    """Take what came into the cache, as runs do when they begin.

    Whatever model and configuration it was asked with. Entries are those of the runs that asked. Lines that failed are
    errors of their keys; a run asks again for those that may succeed. Files of batches that were taken in are removed
    at the provider.

    Example: featurekit batches collect --conf-file conf/prod.yaml
    """
    from featurekit_spark.cache.care import reading
    from featurekit_spark.cache.delta import DeltaCache
    from featurekit_spark.deferred import take_in
    from featurekit_spark.llm.batch_answers import collected

    entries = hand_ins = 0
    with _opened(options) as counter:
        desk, chat = counter.required()
        cache = DeltaCache(counter.cache_path, storage_options=counter.folder.options)
        with reading(counter.cache_path):
            for answers in collected(desk, chat, _OWNER):
                taken = take_in(answers, cache, None)
                entries, hand_ins = entries + taken, hand_ins + bool(taken)
            if entries:
                cache.drop_marks()
        says = sorted(desk.says.values())
        left = [item for item in desk.records.all() if item.stage.value == "answered"]
    facts = {"entries": entries, "batches": hand_ins, "on_the_way": says, "left": len(left)}
    return Answer({"status": "ok", **facts}, _collected(entries, hand_ins, says, left))


@batches_app.command("cancel")
@answering
def cancel_command(
    options: OpenOptions,
    batches: Annotated[
        list[str] | None, typer.Argument(metavar="[BATCH]...", help="As `batches list` names them.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All that are on their way.")] = False,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget",
            help="Forget those that the provider does not know any more: what they asked is asked, and paid, anew.",
        ),
    ] = False,
    dry_run: DryRun = False,
) -> Answer:
    """Ask the provider to end batches.

    What it has answered by then is paid for, and collected as always; the rest is an error of its keys, and the next
    run asks again.

    Example: featurekit batches cancel batch_68f --conf-file conf/prod.yaml
    """
    if bool(batches) == every:
        raise UsageError("name the batches to cancel, or give --all.")
    with _opened(options) as counter:
        desk, _ = counter.required()
        with desk.records.locked(_OWNER):
            chosen = _chosen(counter.on_the_way(), batches)
            told = [_cancelled(desk, item, forget=forget, dry_run=dry_run) for item in chosen]
    text = [f"{one['batch']}: {one['said']}" for one in told] or ["no calls are on their way"]
    return Answer({"status": "ok", "dry_run": dry_run, "batches": told}, text)


@dataclass(frozen=True)
class _Counter:
    """Where batches are asked for. `desk` and `chat`: None where settings name no provider."""

    folder: Folder
    cache_path: str
    desk: BatchDesk | None
    chat: OpenAIChat | None

    def required(self) -> tuple[BatchDesk, OpenAIChat]:
        from featurekit_spark import aio

        if self.desk is None or self.chat is None:
            raise UsageError(
                "the settings name no provider to ask (llm.provider is offline): give the conf file of the runs that "
                "handed calls in, or --set llm.provider=openai --set llm.model=..."
            )
        aio.run(self.desk.client.ready())
        return self.desk, self.chat

    def all(self) -> list[Submission]:
        from featurekit_spark.llm.batch_records import BatchRecords

        return BatchRecords(self.folder).all()

    def on_the_way(self) -> list[Submission]:
        from featurekit_spark.llm.batch_records import BatchRecords

        return BatchRecords(self.folder).on_the_way()

    def told(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Every submission for programs, and why some could not be asked for."""
        from featurekit_spark.errors import FeaturekitError

        notes: dict[str, None] = {}
        found = []
        for item in sorted(self.all(), key=lambda item: item.since):
            state = item.stage.value
            if item.stage.value == "submitted":
                try:
                    state = "on its way" if self.desk is None else self.desk.state_of(item)
                except FeaturekitError as error:
                    notes[f"warning: {error}"] = None
            found.append(_facts(item, state))
        return found, list(notes)


@contextmanager
def _opened(options: OpenOptions) -> Iterator[_Counter]:
    """The desk of the settings' cache and provider; its connections are closed."""
    options.both_or_neither()
    settings = options.settings()
    if settings.cache.kind == "memory":
        raise UsageError("cache.kind is memory, beside which no calls are handed in: there is nothing there.")
    from featurekit_spark import aio
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.cache.folder import Folder
    from featurekit_spark.llm.batch import OpenAIBatch
    from featurekit_spark.llm.batch_desk import BatchDesk
    from featurekit_spark.llm.batch_records import BatchRecords
    from featurekit_spark.llm.openai import OpenAIChat
    from featurekit_spark.llm.openai_batch import BatchClient

    folder = Folder(f"{settings.cache_path.rstrip('/')}/batches", settings.cache.storage_options)
    boot = Bootstrap(settings, merchant=options.merchant or NOBODY, market=options.market or NOBODY)
    llm = boot.get_llm()
    chat = llm.chat if isinstance(llm, OpenAIBatch) else llm
    if not isinstance(chat, OpenAIChat):
        yield _Counter(folder, settings.cache_path, None, None)
        return
    try:
        desk = BatchDesk(BatchClient(chat), BatchRecords(folder))
        yield _Counter(folder, settings.cache_path, desk, chat)
    finally:
        aio.run(chat.aclose())


def _chosen(there: Sequence[Submission], names: Sequence[str] | None) -> list[Submission]:
    if not names:
        return list(there)
    known = {item.batch_id or item.tag: item for item in there}
    for name in names:
        if name not in known:
            raise UsageError(f"{name!r} is no batch that is on its way. {known_names(name, known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _cancelled(desk: BatchDesk, item: Submission, *, forget: bool, dry_run: bool) -> dict[str, Any]:
    name = item.batch_id or item.tag
    if dry_run:
        return {"batch": name, "cancelled": False, "said": f"would be cancelled, {_asked(item)}"}
    if not desk.asks(item):
        return {
            "batch": name,
            "cancelled": False,
            "said": f"was handed in at {item.base_url}: set llm.base_url",
        }
    from featurekit_spark.llm.openai_batch import Progress, UnknownBatchError

    try:
        state = desk.cancel(item)
    except UnknownBatchError as error:
        if not forget:
            raise ContextError(
                f"{error} If it is gone for good, --forget removes what is kept of it here."
            ) from error
        desk.drop(item)
        return {"batch": name, "cancelled": False, "said": f"forgotten, {_asked(item)}"}
    if state is None:
        return {"batch": name, "cancelled": False, "said": "not known to the provider yet: try again"}
    if state.progress.ended and state.progress is not Progress.CANCELLED:
        return {
            "batch": name,
            "cancelled": False,
            "said": f"{state}: it had ended, and is collected as always",
        }
    return {"batch": name, "cancelled": True, "said": f"{state}, {_asked(item)}"}


def _asked(item: Submission) -> str:
    return f"{counted(item.requests, 'request')} of {item.identity}"


def _facts(item: Submission, state: str) -> dict[str, Any]:
    return {
        "batch": item.batch_id or item.tag,
        "record": item.tag,
        "model": item.identity,
        "stage": item.stage.value,
        "state": state,
        "requests": item.requests,
        "since": datetime.fromtimestamp(item.since, UTC).isoformat(timespec="seconds"),
        "run_id": item.run_id,
        "builders": [asker.name for asker in item.askers],
        "files_at_provider": len(item.files),
    }


def _row(facts: Mapping[str, Any]) -> tuple[str, ...]:
    state = {
        "answered": "answered, not taken in",
        "done": "done, files left",
        "creating": "not known yet",
        "intended": "broken off",
    }.get(facts["state"], facts["state"])
    since = f"{facts['since'][:16].replace('T', ' ')} UTC"
    return facts["batch"], facts["model"], state, str(facts["requests"]), since, facts["run_id"]


def _collected(entries: int, hand_ins: int, says: Sequence[str], left: Sequence[Submission]) -> Iterator[str]:
    if entries:
        yield f"{counted(entries, 'entry', 'entries')} from {counted(hand_ins, 'batch', 'batches')} taken in"
    else:
        yield "nothing came that was not taken in before"
    for said in says:
        yield f"on its way: {said}"
    for item in left:
        names = ", ".join(asker.name for asker in item.askers) or "nobody knows which builder"
        yield f"{item.batch_id}: some answers wait for a run of {names}, which alone can read them"
