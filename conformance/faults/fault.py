"""A fault: a small edit to the source of an implementation, and the properties that must see it.

`docs/faults.md` documents the files (TOML) that faults are read from; `Fault` has their fields.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).parent / "catalogue"
# What a machine may lack. A fault that needs one of them is run where it is there.
MACHINE_NEEDS = ("cuda",)


class CatalogueError(ValueError):
    """A catalogue that cannot be read, or an edit that does not fit the source."""


@dataclass(frozen=True)
class Edit:
    """One replacement.

    Attributes:
        file: below the package's folder.
        old: text that occurs exactly once there.
        new: what replaces it, with as many lines: Triton's cache key holds the line on which a kernel starts.
    """

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Fault:
    """One fault of a catalogue.

    Attributes:
        id: unique; says what is wrong.
        area: of the layer (`routing`, `align`, ...).
        edits: to the package's source, all at once.
        expect: what may kill it: properties' ids, `error:TYPE` (the call raises it) or `signal:NAME` (the process
            dies of it).
        tests: the suite's files, each with an optional `::PART_OF_A_NAME`, in the order in which they are run.
        variants: of the subject, which are run.
        needs: of the machine, from MACHINE_NEEDS; and features of a case without which the fault cannot show, as
            `name=value` or `name=value|value` by the fields of its spec: a search runs no others.
        threads: public issue threads that report this fault: URLs, or ids of `public.toml`.
        note: what else a reader should know.
        added: what the suite gained to kill it, where it survived when it was first planted.
        equivalent: why no observer can tell it from the original; such a fault is listed and never run.
        subject: the subject that is put under the suite.
        package: whose source is edited.
    """

    id: str
    area: str
    edits: tuple[Edit, ...]
    expect: tuple[str, ...]
    tests: tuple[str, ...]
    variants: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    threads: tuple[str, ...] = ()
    note: str = ""
    added: str = ""
    equivalent: str = ""
    subject: str = "moegate"
    package: str = "moegate.impl"

    def sources(self, folder: Path | None = None) -> dict[str, str]:
        """The edited files' new text by their names below the package's folder.

        Args:
            folder: the package's; found where None.

        Raises:
            CatalogueError: an edit that matches not once, or that changes the number of lines.
        """
        folder = folder or folder_of(self.package)
        texts: dict[str, str] = {}
        for edit in self.edits:
            path = folder / edit.file
            if edit.file not in texts and not path.is_file():
                raise CatalogueError(f"{self.id}: expected a file of {self.package}, got {edit.file!r}")
            text = texts.get(edit.file) or path.read_text()
            if (times := text.count(edit.old)) != 1:
                shown = edit.old.strip().splitlines()[0] if edit.old.strip() else repr(edit.old)
                raise CatalogueError(
                    f"{self.id}: expected its `old` once in {edit.file}, found it {times} times: {shown}"
                )
            if edit.old == edit.new:
                raise CatalogueError(f"{self.id}: its `new` is its `old`")
            if edit.old.count("\n") != edit.new.count("\n"):
                raise CatalogueError(
                    f"{self.id}: expected a `new` of as many lines as its `old` "
                    f"({edit.old.count(chr(10))}), got {edit.new.count(chr(10))}"
                )
            texts[edit.file] = text.replace(edit.old, edit.new)
        for name, text in texts.items():
            try:
                compile(text, name, "exec", dont_inherit=True)
            except SyntaxError as error:
                raise CatalogueError(f"{self.id}: {edit_place(name, error)} is no Python once edited") from error
        return texts

    @property
    def features(self) -> tuple[str, ...]:
        """What it needs of a case."""
        return tuple(need for need in self.needs if "=" in need)

    def may_show(self, spec: Any) -> bool:
        """Whether a case has the features that the fault needs; a spec of a kind without such a field has."""
        for name, _, values in (feature.partition("=") for feature in self.features):
            if hasattr(spec, name) and str(getattr(spec, name)) not in values.split("|"):
                return False
        return True

    def digest(self) -> str:
        """Of the edits and of what judges them: a result stands for as long as this does."""
        parts = (self.edits, self.expect, self.tests, self.variants, self.needs, self.subject, self.package)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def edit_place(name: str, error: SyntaxError) -> str:
    """File and line of a syntax error."""
    return f"{name}:{error.lineno}"


def folder_of(package: str) -> Path:
    """The folder of a package's source, which is not imported.

    Raises:
        CatalogueError: no such package.
    """
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise CatalogueError(f"package: expected a package that can be imported, got {package!r}")
    return Path(next(iter(spec.submodule_search_locations)))


_DEFAULTS = ("area", "tests", "variants", "expect", "subject", "package")
_LISTS = ("expect", "tests", "variants", "needs", "threads")
_FIELDS = {"id", "area", "note", "added", "equivalent", "subject", "package", "file", "old", "new", "also", *_LISTS}


def load_catalogue(paths: Iterable[Path] | None = None) -> list[Fault]:
    """The faults of some files, in their order; of the catalogue that comes with the suite where None.

    Raises:
        CatalogueError: a file that is no catalogue, or two faults of one id.
    """
    faults: dict[str, Fault] = {}
    for path in sorted(CATALOGUE.glob("*.toml")) if paths is None else paths:
        for fault in _load(path):
            if fault.id in faults:
                raise CatalogueError(f"{path}: {fault.id}: this id is taken")
            faults[fault.id] = fault
    return list(faults.values())


def _load(path: Path) -> list[Fault]:
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise CatalogueError(f"catalogue: expected a file, got {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogueError(f"catalogue: {path}: expected TOML: {error}") from error
    rows = data.pop("fault", [])
    if unknown := set(data) - {*_DEFAULTS, "about"}:
        raise CatalogueError(f"{path}: expected {', '.join(_DEFAULTS)} and [[fault]] tables, got {sorted(unknown)}")
    if not rows:
        raise CatalogueError(f"catalogue: {path}: expected at least one [[fault]]")
    data.pop("about", None)
    return [_fault(path, {**data, **row}) for row in rows]


def _fault(path: Path, row: dict[str, Any]) -> Fault:
    name = row.get("id")
    if not isinstance(name, str) or not name:
        raise CatalogueError(f"{path}: expected an id for every fault, got {name!r}")
    where = f"{path}: {name}"
    if unknown := set(row) - _FIELDS:
        raise CatalogueError(f"{where}: expected the fields {sorted(_FIELDS)}, got {sorted(unknown)}")
    for key in ("file", "old", "new", "area"):
        if not isinstance(row.get(key), str):
            raise CatalogueError(f"{where}: expected a string for {key}, got {row.get(key)!r}")
    for key in _LISTS:
        if not isinstance(row.get(key, []), list) or not all(isinstance(item, str) for item in row.get(key, [])):
            raise CatalogueError(f"{where}: expected a list of strings for {key}, got {row[key]!r}")
    if not row.get("equivalent") and not (row.get("expect") and row.get("tests")):
        raise CatalogueError(f"{where}: expected `tests` and `expect`, in the file's head or with the fault")
    if unknown := [need for need in row.get("needs", []) if need not in MACHINE_NEEDS and "=" not in need]:
        raise CatalogueError(f"{where}: expected needs from {list(MACHINE_NEEDS)} or feature=value, got {unknown}")
    edits = [row, *row.get("also", [])]
    try:
        edits = tuple(Edit(edit["file"], edit["old"], edit["new"]) for edit in edits)
    except (KeyError, TypeError) as error:
        raise CatalogueError(f"{where}: expected file, old and new in every [[fault.also]]") from error
    rest = {key: tuple(row.get(key, ())) for key in _LISTS}
    texts = ("id", "area", "note", "added", "equivalent", "subject", "package")
    return Fault(edits=edits, **rest, **{key: row[key] for key in texts if key in row})
