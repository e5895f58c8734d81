"""What earlier hunts left: the witnesses that are checked in, and a file from which an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .fault import CatalogueError, Fault, folder_of
from .job import Outcome, Witness

WITNESSES = Path(__file__).parent / "witnesses.json"
MATRIX = Path(__file__).parent / "matrix.json"
SCHEMA = 1


@dataclass(frozen=True)
class Killed:
    """How a fault was killed by a search.

    Attributes:
        digest: of the fault, while which the witness stands.
        witness: the case.
        by: what was violated in it.
        cases: that the search needed.
    """

    digest: str
    witness: Witness
    by: tuple[str, ...]
    cases: int


def read_witnesses(path: Path = WITNESSES) -> dict[str, Killed]:
    """By the fault's id; empty where there is no file.

    Raises:
        CatalogueError: a file of another form.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        rows = data["witnesses"] if data["schema"] == SCHEMA else {}
        return {
            id: Killed(row["digest"], Witness(row["unit"], row["spec"]), tuple(row["by"]), row["cases"])
            for id, row in rows.items()
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CatalogueError(f"{path}: expected witnesses of schema {SCHEMA}: {error!r}") from error


def write_witnesses(faults: Iterable[Fault], outcomes: Mapping[str, Outcome], path: Path = WITNESSES) -> None:
    """Keep what a search found; witnesses of faults that it did not hunt stay, those of faults that are gone do not."""
    faults = list(faults)
    known = read_witnesses(path)
    rows = []
    for fault in faults:
        outcome, old = outcomes.get(fault.id), known.get(fault.id)
        if outcome is not None and outcome.expected and not outcome.from_witness and outcome.witness is not None:
            old = Killed(fault.digest(), outcome.witness, tuple(outcome.by), outcome.cases)
        if old is not None:
            row = {"digest": old.digest, "unit": old.witness.unit, "spec": old.witness.spec}
            rows.append(f"  {json.dumps(fault.id)}: {json.dumps(row | {'by': list(old.by), 'cases': old.cases})}")
    path.write_text(f'{{"schema": {SCHEMA}, "witnesses": {{\n' + ",\n".join(rows) + "\n}}\n")


def read_matrix(faults: Iterable[Fault], path: Path = MATRIX) -> dict[str, dict[str, list[int]]]:
    """What properties saw of each of these faults: by fault and property, cases in which it did, and cases in all.

    Rows of faults that have changed since are left out.

    Raises:
        CatalogueError: a file of another form.
    """
    if not path.exists():
        return {}
    digests = {fault.id: fault.digest() for fault in faults}
    try:
        data = json.loads(path.read_text())
        rows = data["faults"] if data["schema"] == SCHEMA else {}
        return {id: row["kills"] for id, row in rows.items() if digests.get(id) == row["digest"]}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CatalogueError(f"{path}: expected a matrix of schema {SCHEMA}: {error!r}") from error


def write_matrix(faults: Iterable[Fault], outcomes: Mapping[str, Outcome], path: Path = MATRIX) -> None:
    """Keep what properties saw; rows of faults that were not hunted stay, as `read_matrix` gives them."""
    faults = list(faults)
    known = read_matrix(faults, path)
    for id, outcome in outcomes.items():
        known[id] = {prop: list(count) for prop, count in outcome.kills.items() if count[0]}
    rows = [
        f"  {json.dumps(fault.id)}: {json.dumps({'digest': fault.digest(), 'kills': known[fault.id]})}"
        for fault in faults
        if fault.id in known
    ]
    path.write_text(f'{{"schema": {SCHEMA}, "faults": {{\n' + ",\n".join(rows) + "\n}}\n")


def state_of(packages: Iterable[str]) -> str:
    """A digest of what decides on an outcome beside the fault: the suite, its reference, the sources of packages."""
    digest = hashlib.sha256()
    for package in ("moegate.conformance", "moegate.reference", *sorted(set(packages))):
        for path in sorted(folder_of(package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Journal:
    """A file of outcomes, a line each: what stands there need not be hunted again.

    Args:
        path: of the file, which may not exist yet; None keeps nothing.
        mode: of the run, and the state of what judges; outcomes of another mode are left alone.
    """

    def __init__(self, path: Path | None, mode: str) -> None:
        self._path, self._mode = path, mode

    def read(self, faults: Iterable[Fault]) -> dict[str, Outcome]:
        """The outcomes of these faults, as they are now.

        Raises:
            CatalogueError: a file that is no journal.
        """
        if self._path is None or not self._path.exists():
            return {}
        digests = {fault.id: fault.digest() for fault in faults}
        found = {}
        for number, line in enumerate(self._path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                if row["mode"] == self._mode and digests.get(row["outcome"]["id"]) == row["digest"]:
                    found[row["outcome"]["id"]] = Outcome.from_dict(row["outcome"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if number == len(self._path.read_text().splitlines()):
                    break  # a run was interrupted while it wrote
                raise CatalogueError(f"{self._path}:{number}: expected an outcome of this journal") from error
        return found

    def add(self, fault: Fault, outcome: Outcome) -> None:
        """Write one outcome down."""
        if self._path is None or outcome.broken:
            return
        row = {"mode": self._mode, "digest": fault.digest(), "outcome": outcome.as_dict()}
        with self._path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
