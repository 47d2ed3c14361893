"""What is said of one feature at one key: whether it would be computed again, and what it differs in from before.

Owns the answer's shape and its text, the same for the same answer on every machine. Finds nothing out itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

__all__ = [
    "Before",
    "Part",
    "Proof",
    "State",
    "Step",
    "Why",
    "cut",
    "group_said",
    "short",
    "tree_lines",
    "when",
]

State = Literal["hit", "computed", "stale", "miss", "error", "unknown", "empty", "inline"]
"""`computed`: by the run that is asked about. `stale`: its ttl has passed. `error`: it, or something it reads, fails.
`unknown`: an input would have to be built first, so that its identity cannot be known. `empty`: an input is null, and
so is it. `inline`: never looked up."""

_CUT = 72
_SHOWN_CAUSES = 3
_NAMED = 3


@dataclass(frozen=True)
class Part:
    """One part of an identity or of a trace, before and now.

    `old` and `new` are hashes (None: none, or not known). `changed` is None where it cannot be told. `said`: what there
    is to say of a change, a clause that names the part.
    """

    kind: Literal["config", "input", "group", "source", "read", "expiry", "entry", "status"]
    name: str
    old: str | None
    new: str | None
    changed: bool | None
    said: str


@dataclass(frozen=True)
class Before:
    """The entry that answered last."""

    config_hash: str
    inputs_hash: str
    entry_id: str
    value_hash: str | None
    ts: datetime
    run_id: str


@dataclass(frozen=True)
class Step:
    """A builder at a key: its identity now, the entry before, and the same of everything it reads.

    `own`: whether the cause lies in the builder itself (its code, config, age, what it reads outside) and not in its
    inputs. `again`: it is told elsewhere in the tree, and only named here.
    """

    builder: str
    key: str
    state: State
    cause: str
    own: bool
    config_hash: str
    inputs_hash: str | None
    entry_id: str | None
    value_hash: str | None
    before: Before | None
    parts: tuple[Part, ...]
    inputs: tuple[Step, ...]
    again: bool = False

    def roots(self) -> Iterator[Step]:
        """Steps below and itself, deepest first, whose cause lies in themselves."""
        for step in self.inputs:
            yield from step.roots()
        if self.own and not self.again:
            yield self


@dataclass(frozen=True)
class Proof:
    """A target's trace row against what it reads now. `proven`: everything agrees, so that nothing is computed."""

    ts: datetime
    run_id: str
    proven: bool
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Why:
    """Why a feature at a key is computed again, or that it is not. `str(why)` is the text."""

    builder: str
    key: str
    run_id: str | None
    proof: Proof | None
    step: Step
    note: str | None = None

    @property
    def state(self) -> State:
        """hit where the trace proves it, else what its identity says."""
        return "hit" if self.proof is not None and self.proof.proven else self.step.state

    @property
    def cause(self) -> str:
        """One clause: what is behind it."""
        if self.proof is not None and self.proof.proven:
            return f"proven unchanged since {when(self.proof.ts)}"
        if self.step.state == "error" or (self.proof is None and self.step.state == "hit"):
            return self.step.cause
        if self.proof is None and self.step.before is None and self.step.state != "empty":
            return "never computed"
        parts = self.proof.parts if self.proof is not None else ()
        causes = [part.said for part in parts if part.changed]
        if not causes and self.step.own:
            causes = [self.step.cause]
        if not causes:
            causes = [
                root.cause if root is self.step else f"{_named(root)}: {root.cause}"
                for root in self.step.roots()
            ]
        told = "; ".join(dict.fromkeys(causes[:_SHOWN_CAUSES])) or self.step.cause
        if len(causes) > _SHOWN_CAUSES:
            told += f"; and {len(causes) - _SHOWN_CAUSES} more"
        if self.step.state == "hit" and causes and parts:
            told += "; yet its entry answers"
        return told

    def facts(self) -> dict[str, Any]:
        """The whole answer as plain values, for JSON."""
        return {"state": self.state, "cause": self.cause, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{self.builder}{cut(self.key)}: {self.state}, {self.cause}"]
        if self.note is not None:
            lines.append(f"note: {self.note}")
        if self.proof is not None:
            lines += ["", f"its trace of {when(self.proof.ts)} (run {self.proof.run_id})"]
            lines += [f"  {line}" for line in _table(self.proof.parts)]
        lines += ["", "its identity, and what it reads" if self.step.inputs else "its identity"]
        lines += tree_lines(self.step, _step_lines, lambda step: step.inputs)
        return "\n".join(lines)


def short(found: str | None) -> str:
    """A hash, or a version that is one, as people read it."""
    if found is None:
        return "-"
    return found[:8] if len(found) == 32 else found


def when(ts: datetime) -> str:
    """An instant to the second, in UTC."""
    return ts.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def group_said(then: Mapping[str, str | None], now: Mapping[str, str | None]) -> str:
    """How many members came, went and changed, and the first of them."""
    found = {
        "added": [m for m in now if m not in then],
        "removed": [m for m in then if m not in now],
        "changed": [m for m in now if m in then and then[m] != now[m]],
    }
    told = []
    for what, members in found.items():
        if members:
            names = ", ".join(sorted(members)[:_NAMED]) + (", ..." if len(members) > _NAMED else "")
            plural = "member" if len(members) == 1 else "members"
            told.append(f"{len(members)} {plural} {what} ({names})")
    return ", ".join(told) or "its members are the same"


def cut(text: str) -> str:
    """A key of at most a line; a prompt may be long."""
    return text if len(text) <= _CUT else f"{text[: _CUT - 3]}..."


def tree_lines(root: Any, lines_of: Any, inputs_of: Any) -> list[str]:
    """A tree as text: `lines_of(node)` is its line and the lines of its details, `inputs_of(node)` its branches."""

    def walk(node: Any, first: str, rest: str) -> Iterator[str]:
        head, *details = lines_of(node)
        below = list(inputs_of(node))
        yield first + head
        for detail in details:
            yield f"{rest}{'│ ' if below else '  '}  {detail}"
        for number, item in enumerate(below, 1):
            last = number == len(below)
            yield from walk(item, f"{rest}{'└─' if last else '├─'} ", f"{rest}{'  ' if last else '│ '} ")

    return list(walk(root, "", ""))


def _named(step: Step) -> str:
    return f"{step.builder}{cut(step.key)}"


def _step_lines(step: Step) -> list[str]:
    head = f"{step.state:<8} {_named(step)}"
    if step.again:
        return [f"{head} (told above)"]
    lines = [f"{head}: {step.cause}"]
    settled = step.state in ("hit", "empty", "inline")
    if not settled or any(part.changed for part in step.parts):
        lines += _table(step.parts, first=step.before is None)
    return lines


def _table(parts: tuple[Part, ...], *, first: bool = False) -> list[str]:
    width = max((len(part.name) for part in parts), default=0)
    lines = []
    for part in parts:
        match part.changed:
            case False:
                told, found = "same", short(part.new) if part.new is not None else ""
            case True if part.kind in ("status", "expiry", "entry"):
                told, found = "changed", part.said
            case True:
                told, found = "changed", f"{short(part.old)} -> {short(part.new)}"
            case None if part.new is None:
                told, found = "not built", f"{short(part.old)} -> ?" if part.old is not None else ""
            case None:
                told, found = ("first", "") if first else ("untold", "? -> ")
                found += short(part.new)
        lines.append(f"{part.name:<{width}}  {told:<9}  {found}".rstrip())
    return lines
