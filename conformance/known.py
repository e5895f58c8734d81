"""Known failures as data: what is tolerated of a subject for a while, under whose issue, and until when.

A `wrong` answer still runs, and fails the run once it passes; a `crash` is never launched. The format is that of
`docs/known-failures.md`; `known_failures.toml` beside this file holds those of the subjects that ship here.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from .spec import Spec

_TEXTS = ("subject", "variant", "device", "property", "facet", "severity", "issue", "reason")
_NEEDED = ("subject", "severity", "issue", "reason", "expires")


@dataclass(frozen=True)
class KnownFailure:
    """One entry.

    Attributes:
        subject, variant, device: whose, by name or pattern.
        severity: `wrong` or `crash`.
        issue: the link to where it is tracked.
        reason: one sentence.
        expires: the day from which it is tolerated no more.
        property: of a wrong answer, an id or a pattern of ids.
        facet: of a crash, the call.
        when: fields of the specs that it concerns, each with a value or a list of them.
    """

    subject: str
    severity: Literal["wrong", "crash"]
    issue: str
    reason: str
    expires: date
    variant: str = "*"
    device: str = "*"
    property: str = ""
    facet: str = ""
    when: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """What tells entries apart in a ledger."""
        conditions = ", ".join(f"{name}={value}" for name, value in sorted(self.when.items()))
        return (
            f"{self.property or self.facet} of {self.subject}/{self.variant} when {conditions or 'ever'}: {self.issue}"
        )

    def concerns(self, subject: str, device: str) -> bool:
        """Whether it speaks of this subject on this device."""
        return fnmatchcase(subject, self.subject) and fnmatchcase(device, self.device)

    def matches(self, spec: Spec, variant: str) -> bool:
        """Whether it speaks of this case."""
        if not fnmatchcase(variant, self.variant) or (self.facet and spec.facet != self.facet):
            return False
        for name, value in self.when.items():
            allowed = value if isinstance(value, list) else [value]
            if not hasattr(spec, name) or getattr(spec, name) not in allowed:
                return False
        return True


def parse_known(text: str, place: str) -> list[KnownFailure]:
    """The entries of a file's text.

    Raises:
        ValueError: no TOML, or an entry with a key that is missing, unknown or ill-valued; says which.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"known failures: {place} is no TOML: {error}") from error
    unknown = sorted(set(data) - {"failure"})
    if unknown or not isinstance(data.get("failure", []), list):
        raise ValueError(f"known failures: {place}: expected [[failure]] tables alone, got {unknown or 'one table'}")
    return [_entry(entry, f"{place}, failure {number}") for number, entry in enumerate(data.get("failure", []), 1)]


def _entry(entry: dict[str, Any], place: str) -> KnownFailure:
    def refuse(key: str, expected: str) -> ValueError:
        return ValueError(f"known failures: {place}: {key}: expected {expected}, got {entry.get(key)!r}")

    unknown = sorted(set(entry) - set(KnownFailure.__dataclass_fields__))
    if unknown:
        raise ValueError(f"known failures: {place}: no such key: {', '.join(unknown)}")
    for key in _NEEDED:
        if key not in entry:
            raise ValueError(f"known failures: {place}: {key} is missing")
    for key in _TEXTS:
        if key in entry and not (isinstance(entry[key], str) and entry[key].strip()):
            raise refuse(key, "a text")
    if entry["severity"] not in ("wrong", "crash"):
        raise refuse("severity", "wrong or crash")
    if not entry["issue"].startswith(("https://", "http://")):
        raise refuse("issue", "a link")
    if type(entry["expires"]) is not date:
        raise refuse("expires", "a date such as 2027-03-31")
    if not isinstance(entry.get("when", {}), dict):
        raise refuse("when", "a table of a spec's fields")
    needed, other = ("property", "facet") if entry["severity"] == "wrong" else ("facet", "property")
    if needed not in entry or other in entry:
        raise refuse(needed, f"it beside severity {entry['severity']!r}, and no {other}")
    fields = {name for kind in Spec.kinds.values() for name in kind.__dataclass_fields__}
    strange = sorted(set(entry.get("when", {})) - fields)
    if strange:
        raise ValueError(f"known failures: {place}: when: no spec has a field {strange[0]}")
    return KnownFailure(**entry)


def load_known(more: str | None = None) -> list[KnownFailure]:
    """The entries that ship here, and those of a user's file.

    Raises:
        ValueError: no such file, or what `parse_known` refuses.
    """
    name = "known_failures.toml"
    entries = parse_known(files(__package__).joinpath(name).read_text(), name)
    if more is None:
        return entries
    if not Path(more).is_file():
        raise ValueError(f"known failures: expected a file, got {more!r}, which does not exist")
    return [*entries, *parse_known(Path(more).read_text(), more)]


class KnownFailures:
    """The entries that concern a run, asked case by case; what they met is counted in the ledger's `known`.

    Args:
        entries: of the files.
        subject: the subject's name.
        device: torch device type.
        today: for their expiry.
    """

    def __init__(self, entries: Sequence[KnownFailure], subject: str, device: str, today: date) -> None:
        self.entries = [entry for entry in entries if entry.concerns(subject, device)]
        self.today = today

    def _living(self, severity: str) -> list[KnownFailure]:
        return [entry for entry in self.entries if entry.severity == severity and self.today < entry.expires]

    def crash(self, spec: Spec, variant: str) -> KnownFailure | None:
        """The entry by which a case must not be launched."""
        return next((entry for entry in self._living("crash") if entry.matches(spec, variant)), None)

    def wrong(self, property_id: str, spec: Spec, variant: str) -> KnownFailure | None:
        """The entry by which a property may be violated on a case."""
        for entry in self._living("wrong"):
            if fnmatchcase(property_id, entry.property) and entry.matches(spec, variant):
                return entry
        return None

    def report(self, counts: Counter[str]) -> list[dict[str, Any]]:
        """What became of each entry.

        Its `state` is `tolerated`, `not launched`, `passes now`, `unmatched` or `expired`.
        """
        rows = []
        for entry in self.entries:
            met, failed = counts[f"{entry.key()} met"], counts[f"{entry.key()} failed"]
            if self.today >= entry.expires:
                state = "expired"
            elif not met:
                state = "unmatched"
            elif entry.severity == "crash":
                state = "not launched"
            else:
                state = "tolerated" if failed else "passes now"
            what = {"property": entry.property} if entry.severity == "wrong" else {"facet": entry.facet}
            row = {"issue": entry.issue, "severity": entry.severity, **what, "variant": entry.variant}
            row |= {"when": dict(entry.when), "expires": entry.expires.isoformat(), "reason": entry.reason}
            rows.append(row | {"state": state, "cases": met, "failed": failed})
        return rows
