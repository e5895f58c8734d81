"""The index: SQLite over the store's files, made from them alone, and made again whenever it is missing or broken.

It lies beside no shared file, in this machine's cache: SQLite's locks are not safe on every network file system, and
each reader needs one of its own. Files that were seen before are told by path, size and time, and are not read again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .run import ForeignFileError, Point, Run, read_run
from .store import GATES, PROMOTIONS, RUNS, Entry, Store, check_gate

VERSION = 1
"""Raised with each change of the tables: an index of another version is made anew."""

_RUN_COLUMNS = tuple(field.name for field in fields(Run) if field.name not in ("points", "failures"))
_POINT_COLUMNS = tuple(field.name for field in fields(Point))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)  # "commit" is a word of SQL


_TABLES = f"""
CREATE TABLE files(path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, kind TEXT, id TEXT, problem TEXT);
CREATE TABLE runs({_quoted(_RUN_COLUMNS)}, path TEXT);
CREATE TABLE points(run TEXT, {_quoted(_POINT_COLUMNS)});
CREATE TABLE failures(run TEXT, workload TEXT, subject TEXT, reason TEXT);
CREATE TABLE promotions(run TEXT PRIMARY KEY, main TEXT, promoted_at TEXT, path TEXT);
CREATE TABLE gates(id TEXT, time TEXT, head TEXT, path TEXT);
CREATE UNIQUE INDEX runs_by_id ON runs(id);
CREATE INDEX runs_by_time ON runs(time);
CREATE INDEX points_by_run ON points(run);
CREATE INDEX points_by_series ON points(device, workload, cache_state, subject, method);
CREATE INDEX failures_by_run ON failures(run);
"""


Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Aside:
    """A file of the store that is not in the index.

    Attributes:
        path: relative to the store.
        reason: why.
    """

    path: str
    reason: str


class Index:
    """An open index, brought up to date with its store.

    Args:
        store: the files.
        path: the database; None: in this machine's cache, or in memory where that cannot be written.
        watch: told how many of how many new files are read.

    Attributes:
        database: for queries.
        refreshed: how many files were read just now.
        rebuilt: why the database was made anew, "" where it was not.
    """

    def __init__(self, store: Store, path: Path | None = None, watch: Watch | None = None) -> None:
        self.store = store
        self._watch = watch
        self.path = default_path(store) if path is None else path
        self.rebuilt = ""
        self.database = self._open()
        try:
            self.refreshed = self._refresh()
        except sqlite3.DatabaseError as error:
            self._start_anew(f"it was damaged ({error})")
            self.refreshed = self._refresh()

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def aside(self) -> list[Aside]:
        """The files that are not in the index, and why, by path."""
        rows = self.database.execute("SELECT path, problem FROM files WHERE problem != '' ORDER BY path").fetchall()
        missing = self.database.execute(
            "SELECT path, run FROM promotions WHERE run NOT IN (SELECT id FROM runs) ORDER BY path"
        ).fetchall()
        rows += [(path, f"it promotes run {run}, which is not here") for path, run in missing]
        return [Aside(path, reason) for path, reason in rows]

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = _connect(str(self.path))
            version = database.execute("PRAGMA user_version").fetchone()[0]
            (health,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if health != "ok":
                database.close()
                return self._start_anew(f"it was damaged ({health})")
        except sqlite3.DatabaseError as error:
            if "unable to open" not in str(error) and "readonly" not in str(error):
                return self._start_anew(f"it was damaged ({error})")
            return self._in_memory(error)
        except OSError as error:
            return self._in_memory(error)
        if version == 0:
            return _create(database)
        if version != VERSION:
            database.close()
            return self._start_anew(f"it was of version {version}, and this is {VERSION}")
        return database

    def _in_memory(self, error: Exception) -> sqlite3.Connection:
        self.rebuilt = f"{self.path} cannot be written ({error}), so it is made anew each time"
        return _create(_connect(":memory:"))

    def _start_anew(self, why: str) -> sqlite3.Connection:
        with suppress(AttributeError, sqlite3.Error):
            self.database.close()
        for suffix in ("", "-wal", "-shm", "-journal"):
            with suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").unlink()
        self.rebuilt = why
        self.database = _create(_connect(str(self.path)))
        return self.database

    def _refresh(self) -> int:
        """Read what is new or changed, forget what is gone; in one transaction, so a second reader waits its turn."""
        database = self.database
        database.execute("BEGIN IMMEDIATE")
        try:
            known = {
                path: (size, mtime) for path, size, mtime in database.execute("SELECT path, size, mtime_ns FROM files")
            }
            entries = {entry.path: entry for entry in self.store.entries()}
            new = [entry for entry in entries.values() if known.get(entry.path) != (entry.size, entry.mtime_ns)]
            gone = [path for path in known if path not in entries]
            self._forget([*gone, *(entry.path for entry in new if entry.path in known)])
            for number, entry in enumerate(new):
                if self._watch is not None:
                    self._watch(number, len(new))
                self._take(entry)
            database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise
        return len(new)

    def _forget(self, paths: Iterable[str]) -> None:
        database = self.database
        for path in paths:
            for (id,) in database.execute("SELECT id FROM runs WHERE path = ?", (path,)).fetchall():
                database.execute("DELETE FROM points WHERE run = ?", (id,))
                database.execute("DELETE FROM failures WHERE run = ?", (id,))
            for table in ("runs", "promotions", "gates", "files"):
                database.execute(f"DELETE FROM {table} WHERE path = ?", (path,))

    def _take(self, entry: Entry) -> None:
        id, problem, mtime_ns = "", "", entry.mtime_ns
        try:
            id, data = self.store.read(entry)
            {RUNS: self._take_run, PROMOTIONS: self._take_promotion, GATES: self._take_gate}[entry.kind](
                id, data, entry.path
            )
        except ForeignFileError as error:
            problem = str(error)
        except OSError as error:
            problem, mtime_ns = str(error), -1  # it is tried again the next time
        except sqlite3.IntegrityError:
            problem = "another file holds the same run"
        values = (entry.path, entry.size, mtime_ns, entry.kind, id, problem)
        self.database.execute("INSERT INTO files VALUES (?,?,?,?,?,?)", values)

    def _take_run(self, id: str, data: dict[str, Any], path: str) -> None:
        run = read_run(id, data)
        _insert(self.database, "runs", [(*(getattr(run, name) for name in _RUN_COLUMNS), path)])
        rows = [(id, *(getattr(point, name) for name in _POINT_COLUMNS)) for point in run.points]
        _insert(self.database, "points", rows)
        _insert(self.database, "failures", [(id, *failure) for failure in run.failures])

    def _take_promotion(self, id: str, data: dict[str, Any], path: str) -> None:
        _insert(self.database, "promotions", [(id, str(data.get("main")), str(data.get("promoted_at")), path)])

    def _take_gate(self, id: str, data: dict[str, Any], path: str) -> None:
        time, head = check_gate(data)
        _insert(self.database, "gates", [(id, time, head, path)])


def default_path(store: Store) -> Path:
    """The index of a store in this machine's cache: `$XDG_CACHE_HOME/moegate` or `~/.cache/moegate`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(store.folder.resolve()).encode()).hexdigest()[:16]
    return cache / "moegate" / f"history-{name}.sqlite"


def _connect(path: str) -> sqlite3.Connection:
    # Autocommit: transactions are begun and ended by hand. A reader waits for another one's refresh.
    return sqlite3.connect(path, timeout=60, isolation_level=None)


def _create(database: sqlite3.Connection) -> sqlite3.Connection:
    database.execute("BEGIN IMMEDIATE")
    if database.execute("PRAGMA user_version").fetchone()[0] == 0:  # else another process was faster
        for statement in _TABLES.strip().split(";\n"):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {VERSION}")
    database.execute("COMMIT")
    return database


def _insert(database: sqlite3.Connection, table: str, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        database.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)
