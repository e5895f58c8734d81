"""What the history is asked: runs, two runs side by side, a range of them, and series over commits."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

from .answers import Compared, Comparison, Filter, Listed, Series, SeriesKey, SeriesPoint, UnknownRunError
from .index import Aside, Index, Watch
from .run import parse_json
from .store import Store

LATEST, BASELINE = "latest", "baseline"


_KEY_COLUMNS = ", ".join(f"points.{field.name}" for field in fields(SeriesKey))


class History:
    """Queries over a store.

    Args:
        store: the folder.
        index: the database's file; None: in this machine's cache.
        watch: told how many of how many new files are read.

    Raises:
        FileNotFoundError: no such folder.
    """

    def __init__(self, store: Path, index: Path | None = None, watch: Watch | None = None) -> None:
        if not store.is_dir():
            raise FileNotFoundError(f"store: expected a folder, got {store}")
        self.store = Store(store)
        self.index = Index(self.store, index, watch)

    def __enter__(self) -> History:
        return self

    def __exit__(self, *exception: object) -> None:
        self.index.close()

    def aside(self) -> list[Aside]:
        """The files that are not part of the history, and why."""
        return self.index.aside()

    def runs(
        self, which: Filter | None = None, *, commit: str = "", promoted: bool = False, limit: int | None = None
    ) -> list[Listed]:
        """The runs with a point that `which` selects, the newest first; without a filter those of failures alone too.

        Args:
            which: of their points.
            commit: the beginning of a commit id; "": any.
            promoted: only those that may be a baseline.
            limit: at most so many.
        """
        which = which or Filter()
        where, values = which.where()
        clauses, arguments = [], []
        if which != Filter():
            clauses.append(f"runs.id IN (SELECT run FROM points WHERE {where})")
            arguments += values
        if commit:
            clauses.append("runs.\"commit\" LIKE ? || '%'")
            arguments.append(commit)
        if promoted:
            clauses.append("runs.id IN (SELECT run FROM promotions)")
        condition = " AND ".join(clauses) or "1"
        query = f"{_LISTED} WHERE {condition} ORDER BY runs.time DESC, runs.id LIMIT ?"
        rows = self.index.database.execute(query, [*arguments, -1 if limit is None else limit])
        return [_listed(row) for row in rows]

    def find(self, name: str, which: Filter | None = None) -> Listed:
        """The run of a name: an id's or a commit's beginning, `latest` or `baseline` (the newest promoted one).

        Args:
            name: at least four letters of an id or a commit.
            which: a commit may have runs on several devices; this says which is meant.

        Raises:
            UnknownRunError: none, or several.
        """
        if name in (LATEST, BASELINE):
            found = self.runs(which, promoted=name == BASELINE, limit=1)
            if not found:
                raise UnknownRunError(f"{name}: no {'promoted ' if name == BASELINE else ''}run is stored")
            return found[0]
        if len(name) < 4 or any(letter not in "0123456789abcdef" for letter in name):
            raise UnknownRunError(
                f"run: expected four letters or more of a run or commit, {LATEST} or {BASELINE}, got {name!r}"
            )
        by_id = self.index.database.execute(f"{_LISTED} WHERE runs.id LIKE ? || '%'", [name]).fetchall()
        runs = [_listed(row) for row in by_id] or self.runs(which, commit=name)
        if not runs:
            raise UnknownRunError(f"run: no run or commit {name!r} is stored")
        if by_id and len(runs) > 1:
            raise UnknownRunError(f"run: {name!r} begins several: {', '.join(run.id for run in runs[:8])}")
        commits = {run.commit for run in runs}
        if len(commits) > 1 and not by_id:
            raise UnknownRunError(f"run: {name!r} begins several commits: {', '.join(sorted(commits)[:8])}")
        devices = {run.device for run in runs}
        if len(devices) > 1:
            raise UnknownRunError(f"run: commit {name!r} ran on {'; '.join(sorted(devices))}: say which device")
        return next((run for run in runs if run.counts), runs[0])

    def compare(self, before: Listed, after: Listed, which: Filter | None = None) -> Comparison:
        """Two runs side by side; what only one of them has is named, with the reason."""
        ours, theirs = (self._points_of(run.id, which or Filter()) for run in (before, after))
        rows = tuple(Compared(key, ours[key], theirs[key]) for key in ours if key in theirs)
        unmatched = [*_unmatched(ours, theirs, before.id), *_unmatched(theirs, ours, after.id)]
        return Comparison(before, after, rows, tuple(unmatched))

    def between(self, first: Listed, last: Listed, which: Filter | None = None) -> list[Listed]:
        """The runs from one to another, both included, that may be drawn: on the first one's device, oldest first.

        Raises:
            UnknownRunError: the last one is older, or of another device.
        """
        if first.device != last.device:
            raise UnknownRunError(f"range: expected runs of one device, got {first.device} and {last.device}")
        if (last.time, last.id) < (first.time, first.id):
            raise UnknownRunError(f"range: expected the older run first, got {first.time} and {last.time}")
        runs = [run for run in self.runs(which) if first.time <= run.time <= last.time and run.device == first.device]
        return [run for run in reversed(runs) if run.counts or run.id in (first.id, last.id)]

    def series(
        self,
        which: Filter | None = None,
        *,
        promoted: bool = True,
        runs: Sequence[str] | None = None,
        newest: int | None = None,
    ) -> list[Series]:
        """Every series that `which` selects, over clean commits whose run passed.

        Args:
            which: of the points.
            promoted: only runs that may be a baseline.
            runs: only these; None: all.
            newest: only so many runs of each device, the newest; None: all.
        """
        where, values = (which or Filter()).where()
        only, arguments = "runs.exit_code = 0 AND NOT runs.dirty", []
        if promoted:
            only += " AND runs.id IN (SELECT run FROM promotions)"
        if runs is not None:
            only += " AND runs.id IN (SELECT value FROM json_each(?))"
            arguments.append(json.dumps(list(runs)))
        query = (
            f"WITH placed AS (SELECT id, row_number() OVER (PARTITION BY device ORDER BY {_WHEN} DESC, time DESC, id) "
            f"AS place FROM runs WHERE {only}) "
            f'SELECT {_KEY_COLUMNS}, runs.id, runs.time, runs."commit", runs.commit_time, points.seconds, points.low, '
            "points.high, points.floor_seconds, points.sm_mhz, points.path, runs.driver, runs.torch, runs.triton "
            "FROM placed JOIN runs ON runs.id = placed.id JOIN points ON points.run = runs.id "
            f"WHERE (? IS NULL OR placed.place <= ?) AND {where} "
            f'ORDER BY {_KEY_COLUMNS}, {_WHEN}, runs."commit", runs.time, runs.id'
        )
        rows = self.index.database.execute(query, [*arguments, newest, newest, *values])
        return [
            Series(SeriesKey(*key), tuple(_commits(list(group))))
            for key, group in groupby(rows, key=lambda row: row[:_KEYS])
        ]

    def gates(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Stored gates' records, the newest first."""
        query = "SELECT path FROM gates ORDER BY time DESC, id LIMIT ?"
        rows = self.index.database.execute(query, [-1 if limit is None else limit]).fetchall()
        return [parse_json((self.store.folder / path).read_bytes()) for (path,) in rows]

    def _points_of(self, run: str, which: Filter) -> dict[SeriesKey, float]:
        where, values = which.where()
        query = f"SELECT {_KEY_COLUMNS}, points.seconds FROM points WHERE points.run = ? AND {where} ORDER BY rowid"
        return {SeriesKey(*row[:-1]): row[-1] for row in self.index.database.execute(query, [run, *values])}


_KEYS = len(fields(SeriesKey))
# Of a commit; of the run where its commit's time is not known.
_WHEN = "coalesce(nullif(runs.commit_time, ''), runs.time)"
_LISTED = (
    'SELECT runs.id, runs.time, runs."commit", runs.commit_time, runs.branch, runs.dirty, runs.exit_code, runs.device, '
    "runs.driver, runs.torch, runs.triton, runs.origin, runs.path, "
    "EXISTS(SELECT 1 FROM promotions WHERE promotions.run = runs.id), "
    "(SELECT count(*) FROM points WHERE points.run = runs.id), "
    "(SELECT count(*) FROM failures WHERE failures.run = runs.id) FROM runs"
)


def _listed(row: tuple[Any, ...]) -> Listed:
    values = dict(zip((field.name for field in fields(Listed)), row, strict=True))
    return Listed(**{**values, "dirty": bool(values["dirty"]), "promoted": bool(values["promoted"])})


def _commits(rows: list[tuple[Any, ...]]) -> Iterator[SeriesPoint]:
    """A point for each commit; a run whose commit is not known stands alone."""
    for _, group in groupby(rows, key=lambda row: row[_KEYS + 2] or row[_KEYS]):
        same = list(group)
        run, time, commit, commit_time, *_ = same[-1][_KEYS:]
        floor_seconds, sm_mhz, path, driver, torch, triton = same[-1][_KEYS + 7 :]
        yield SeriesPoint(
            run=run,
            time=time,
            commit=commit,
            commit_time=commit_time,
            seconds=statistics.median(row[_KEYS + 4] for row in same),
            low=min(row[_KEYS + 5] for row in same),
            high=max(row[_KEYS + 6] for row in same),
            runs=len(same),
            floor_seconds=floor_seconds,
            sm_mhz=sm_mhz,
            path=path,
            driver=driver,
            torch=torch,
            triton=triton,
        )


def _unmatched(
    these: dict[SeriesKey, float], others: dict[SeriesKey, float], run: str
) -> Iterator[tuple[str, str, str, str]]:
    for key in these:
        if key not in others:
            near = [other for other in others if (other.workload, other.subject) == (key.workload, key.subject)]
            names = ("device", "cache_state", "method")
            differs = [
                f"{name.replace('_', ' ')} {getattr(key, name)} here, {getattr(near[0], name)} there"
                for name in names
                if near and getattr(near[0], name) != getattr(key, name)
            ]
            yield key.workload, key.subject, run, "; ".join(differs) or "the other run has no time of it"
