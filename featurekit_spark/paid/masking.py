"""What of a prompt and an answer may be shown: secrets, contacts and marked fields are taken out of texts.

Pure functions of text. Knows how a prompt template reads, and nothing of prompts' builders or of who looks at them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from typing import Final

__all__ = ["MarkedFields", "Masking", "secret_values"]

_SECRET_NAME: Final = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST_SECRET: Final = 8  # a shorter value is a word of many texts

_SECRETS: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|\Z)",
        r"\beyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?",  # a JSON web token
        r"\b(?:sk|pk|rk)-[\w-]{16,}",
        r"\b(?:gh[opsur]_|github_pat_|glpat-|xox[abprs]-|dapi|hf_)[\w-]{16,}",
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        r"(?i)\bbearer\s+[\w.~+/=-]{8,}",
        r"(?i)\b(?:api[_ -]?key|access[_ -]?key|secret|token|passwo?r?d)\b[\"']?\s{0,3}[:=]\s{0,3}[\"']?[^\s\"',;]{4,}",
    )
)
_EMAIL: Final = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_PHONE: Final = re.compile(r"(?<![\w.,])(?:\+|\()?\d(?:[ ()./-]{0,2}\d){7,30}(?!\w)")


def secret_values(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values of the environment's variables whose names say that they are secret."""
    found = os.environ if environment is None else environment
    values = {value for name, value in found.items() if _SECRET_NAME.search(name)}
    return tuple(sorted((v for v in values if len(v) >= _SHORTEST_SECRET), key=len, reverse=True))


@dataclass(frozen=True)
class MarkedFields:
    """Fields of a prompt template whose values nobody is shown. `template`: with named fields; None where prompts
    cannot be read back (a template with logic), so that no prompt is shown at all."""

    template: str | None
    names: frozenset[str]

    def read(self, prompt: str) -> tuple[str, dict[str, str]] | None:
        """(the prompt without the marked fields, their values); None where the prompt does not say what they are: it is
        from elsewhere, or can be read in two ways."""
        if self.template is None:
            return None
        shortest, longest = (_reader(self.template, lazy).fullmatch(prompt) for lazy in (True, False))
        # The first reading gives each field in turn as little as it can have, the other as much.
        if shortest is None or longest is None or shortest.groupdict() != longest.groupdict():
            return None
        marked = {name: value for name, value in shortest.groupdict().items() if name in self.names}
        shown = {
            name: f"[{name}]" if name in marked else value for name, value in shortest.groupdict().items()
        }
        return self.template.format(**shown), marked


@dataclass(frozen=True)
class Masking:
    """`patterns`: regular expressions of the user's own; `contacts`: whether e-mail addresses and telephone numbers
    are taken out; `secrets`: values to take out wherever they stand; `also`: applied to every text first."""

    fields: MarkedFields | None = None
    patterns: tuple[str, ...] = ()
    contacts: bool = True
    secrets: tuple[str, ...] = ()
    also: Callable[[str], str] = str

    def text(self, text: str, marked: Mapping[str, str] | None = None) -> str:
        """One text; `marked`: values that are taken out too, by name, wherever they stand as words of their own."""
        for name, value in sorted((marked or {}).items(), key=lambda field: -len(field[1])):
            if value.strip():
                text = _of(value.strip()).sub(f"[{name}]", text)
        for secret in self.secrets:
            text = text.replace(secret, "[secret]")
        text = self.also(text)
        for pattern in _SECRETS:
            text = pattern.sub("[secret]", text)
        for own in self.patterns:
            text = re.sub(own, "[masked]", text)
        if self.contacts:
            text = _PHONE.sub("[phone]", _EMAIL.sub("[email]", text))
        return text

    def call(self, prompt: str, answer: str | None) -> tuple[str, str | None]:
        """A prompt and its answer, which may repeat what was in the prompt. Where fields are marked and the prompt does
        not say what they are, neither is shown."""
        marked: Mapping[str, str] = {}
        if self.fields is not None and self.fields.names:
            found = self.fields.read(prompt)
            if found is None:
                return _hidden(prompt), None if answer is None else _hidden(answer)
            prompt, marked = found
        return self.text(prompt, marked), None if answer is None else self.text(answer, marked)


@lru_cache(maxsize=1024)
def _of(value: str) -> re.Pattern[str]:
    """What finds a value again, in capitals or not; as words of its own, so that an `a` does not mask all others."""
    forms = {value, value.upper(), value.lower(), value.casefold()}
    found = "|".join(map(_as_words, sorted(forms, key=len, reverse=True)))
    return re.compile(found, re.IGNORECASE)


def _as_words(form: str) -> str:
    # In JSON the letter before it may be the end of an escape.
    before = r"(?:(?<!\w)|(?<=\\[bfnrt])|(?<=\\u[0-9a-f]{4}))" if re.match(r"\w", form) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", form) else ""
    return f"{before}{''.join(map(_character, form))}{after}"


def _character(char: str) -> str:
    """One character as it stands in a text, or escaped in JSON, as encoders like it."""
    if char == " " or (char.isascii() and char.isalnum()):
        return char
    escaped = {
        json.dumps(char)[1:-1],
        json.dumps(char, ensure_ascii=False)[1:-1],
        f"\\{char}" * (char == "/"),
    }
    if char.isascii():
        escaped.add(f"\\u{ord(char):04x}")
    forms = sorted(map(re.escape, escaped - {"", char}), key=len, reverse=True)
    return f"(?:{'|'.join([*forms, re.escape(char)])})"


def _hidden(text: str) -> str:
    return f"[not shown: {len(text)} characters]"


@lru_cache(maxsize=16)
def _reader(template: str, lazy: bool) -> re.Pattern[str]:
    """What reads a prompt back into the fields of its template."""
    parts: list[str] = []
    seen: set[str] = set()
    for literal, name, _, _ in Formatter().parse(template):
        parts.append(re.escape(literal))
        if name is not None:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>.*{'?' * lazy})")
            seen.add(name)
    return re.compile("".join(parts), re.DOTALL)
