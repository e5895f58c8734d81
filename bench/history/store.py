"""The store: a folder of files that are added and never changed, by any number of writers.

    STORE/runs/2026-11/20261128T232300Z-1f037b0c-3f9a0c51d2e7.json    a run: pytest-benchmark's JSON
    STORE/promotions/3f9a0c51d2e7.json                               that run may be a baseline
    STORE/gates/20261128T232300Z-1f037b0c-77aa01b2c3d4.json           a gate's verdicts

A file's name ends with its content's SHA-256. So two writers of one run write the same file, writers of different runs
never meet, and a file that was changed or cut off afterwards no longer bears its own name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...impl.whole_file import PART, write_whole
from .run import ForeignFileError, parse_json, read_run, to_utc

RUNS, PROMOTIONS, GATES = "runs", "promotions", "gates"
GATE_SCHEMA = "moegate-gate/1"
PROMOTION_SCHEMA = "moegate-promotion/1"
_DIGITS = 12
_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}-([0-9a-f]{12})\.json")
_PROMOTION_NAME = re.compile(r"([0-9a-f]{12})\.json")


@dataclass(frozen=True)
class Entry:
    """A file below the store.

    Attributes:
        path: relative to the store, with forward slashes.
        size: bytes.
        mtime_ns: when it was written.
    """

    path: str
    size: int
    mtime_ns: int

    @property
    def kind(self) -> str:
        """The folder right below the store: what the file should be."""
        return self.path.split("/", maxsplit=1)[0]


class Store:
    """A history on disk.

    Args:
        folder: made by the first `add`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, document: Mapping[str, Any]) -> tuple[str, Path, bool]:
        """Store a run.

        Args:
            document: as `run.read_run` reads it; `document.py` makes one of what a run wrote.

        Returns:
            The run's id, its file, and whether it is new here.

        Raises:
            ForeignFileError: not such a document. OSError: the store cannot be written.
        """
        run = read_run("", document)
        return self._add(RUNS, document, run.time, run.commit)

    def add_gate(self, record: Mapping[str, Any]) -> tuple[str, Path, bool]:
        """Store what a gate run found (`GateRecord.as_dict`); returns and raises as `add`."""
        time, commit = check_gate(record)
        return self._add(GATES, record, time, commit)

    def promote(self, id: str, why: Mapping[str, Any]) -> bool:
        """Say that a run may be a baseline; whether it may is `promotion.py`'s to judge.

        Returns:
            Whether that is new.
        """
        path = self.folder / PROMOTIONS / f"{id}.json"
        if path.exists():
            return False
        write_whole(path, _as_bytes({"schema": PROMOTION_SCHEMA, "run": id, **why}), make_folders=True)
        return True

    def entries(self) -> Iterator[Entry]:
        """Every file of the store, in no order; files that are being written are passed over."""
        # Promotions first: each was written behind its run, which a later look at the runs cannot miss.
        for kind in (PROMOTIONS, RUNS, GATES):
            yield from _walk(self.folder / kind, kind)

    def read(self, entry: Entry) -> tuple[str, dict[str, Any]]:
        """A file's id and content, found to be what its name says.

        Raises:
            ForeignFileError: it is not. OSError: it cannot be read.
        """
        name = entry.path.rsplit("/", maxsplit=1)[1]
        match = (_PROMOTION_NAME if entry.kind == PROMOTIONS else _NAME).fullmatch(name)
        if match is None:
            raise ForeignFileError("not a name that `moegate history` gives")
        content = (self.folder / entry.path).read_bytes()
        if entry.kind == PROMOTIONS:
            data = parse_json(content)
            if data.get("schema") != PROMOTION_SCHEMA or data.get("run") != match[1]:
                raise ForeignFileError(f"expected {PROMOTION_SCHEMA} for run {match[1]}")
        else:
            if _digest(content) != match[1]:
                raise ForeignFileError("its content is not what was stored: it was changed, or cut off")
            data = parse_json(content)
        return match[1], data

    def _add(self, kind: str, data: Mapping[str, Any], time: str, commit: str) -> tuple[str, Path, bool]:
        content = _as_bytes(data)
        id = _digest(content)
        stamp = time[:19].replace("-", "").replace(":", "")
        folder = self.folder / kind / time[:7]
        path = folder / f"{stamp}Z-{commit[:8] or '0' * 8}-{id}.json"
        # One that stands there has these very bytes, unless it was damaged, and then it is to be whole again.
        if path.exists() and _digest(path.read_bytes()) == id:
            return id, path, False
        write_whole(path, content, make_folders=True)
        return id, path, True


def check_gate(record: Mapping[str, Any]) -> tuple[str, str]:
    """A gate record's time and head commit.

    Raises:
        ForeignFileError: no gate record.
    """
    if record.get("schema") != GATE_SCHEMA:
        raise ForeignFileError(f"schema: expected {GATE_SCHEMA}, got {record.get('schema')!r}")
    head = record.get("head")
    if not isinstance(head, Mapping) or not isinstance(record.get("workloads"), list):
        raise ForeignFileError("gate: expected its head and its workloads")
    return to_utc(record.get("started")), str(head.get("commit") or "")


def _walk(folder: Path, kind: str) -> Iterator[Entry]:
    try:
        found = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{kind}/{entry.name}")
        elif not entry.name.endswith(PART):
            try:
                stat = entry.stat()
            except FileNotFoundError:  # moved away since the folder was read
                continue
            yield Entry(f"{kind}/{entry.name}", stat.st_size, stat.st_mtime_ns)


def _as_bytes(data: Mapping[str, Any]) -> bytes:
    try:
        # NaN is no JSON; a document that holds one is refused here rather than by its next reader.
        return (json.dumps(data, sort_keys=True, allow_nan=False, separators=(",", ":")) + "\n").encode()
    except ValueError as error:
        raise ForeignFileError(f"not JSON: {error}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]
