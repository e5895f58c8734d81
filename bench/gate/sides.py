"""The two sides of a gate run: a revision checked out beside the head, prepared, with the head's harness carried to it.

What measures must be the same on both sides, or a changed benchmark looks like a changed kernel. So where moegate gates
itself, a side is its own `impl/` beneath the head's `bench/`, `conformance/` and `reference/`. Any other project's
layer is a file in its own repository, measured by the moegate that runs the gate.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..history.provenance import GitError, git
from .record import SideRecord

MOEGATE = "moegate"
WORKING_TREE = "working tree"
_OWN_ROOM, _HARNESS = "impl", ("reference", "conformance", "bench")
_MOST_OUTPUT = 3000


class SideError(RuntimeError):
    """A side cannot be measured: it does not check out, does not build, or lacks what is measured."""


class BadSidesError(ValueError):
    """What was asked for makes no comparison: an unknown revision, one side twice, a dirty tree."""


@dataclass(frozen=True)
class Side:
    """One side, ready to be measured.

    Attributes:
        name: "base" or "head".
        tree: its files.
        record: for the report.
        python_path: where a process of this side finds modules first.
        subject: "moegate", or PATH.py:CLASS with an absolute path into `tree`.
    """

    name: str
    tree: Path
    record: SideRecord
    python_path: tuple[Path, ...]
    subject: str

    def environment(self) -> dict[str, str]:
        """Of this side's processes."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        inherited = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
        variables["PYTHONPATH"] = os.pathsep.join([*(str(path) for path in self.python_path), *inherited])
        variables["PYTHONDONTWRITEBYTECODE"] = "1"  # the head's tree may be the user's own
        variables["TRITON_INTERPRET"] = "0"
        return variables


class Repository:
    """A git repository, seen from one of its folders.

    Raises:
        BadSidesError: no repository, or no git; `--base-tree` takes a folder instead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder
        self.root = Path(self.git("rev-parse", "--show-toplevel"))

    def git(self, *arguments: str) -> str:
        """The output of a git command.

        Raises:
            BadSidesError: it failed; with its message.
        """
        try:
            return git(self.root, *arguments)
        except GitError as error:
            raise BadSidesError(str(error)[:_MOST_OUTPUT]) from error

    def commit_of(self, revision: str) -> str:
        """The full id of a revision's commit.

        Raises:
            BadSidesError: no such revision.
        """
        try:
            return self.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        except BadSidesError as error:
            raise BadSidesError(f"revision: expected a commit of {self.root}, got {revision!r}") from error

    def changed_files(self) -> list[str]:
        """Tracked files that differ from the commit, and untracked ones that git does not ignore."""
        entries = self.git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=normal").split("\0")
        return [entry[3:] for entry in entries if entry]

    def commit_time(self, commit: str) -> str:
        """ISO 8601, with its offset."""
        return self.git("show", "--no-patch", "--format=%cI", commit)

    def check_out(self, commit: str, folder: Path) -> Path:
        """The commit's files in a worktree at `folder`, which is kept from run to run.

        Raises:
            SideError: git cannot.
        """
        if folder.is_dir():
            try:
                at = Repository(folder)
                if at.root == folder.resolve() and at.commit_of("HEAD") == commit and not at.changed_files():
                    return folder
            except BadSidesError:
                pass
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.git("worktree", "prune")
            self.git("worktree", "add", "--detach", "--force", str(folder), commit)
        except BadSidesError as error:
            raise SideError(f"{commit[:12]} cannot be checked out: {error}") from error
        return folder

    def cache(self) -> Path:
        """Where this repository's checkouts and unfinished runs lie: in git's own folder, so nobody commits them."""
        return Path(self.git("rev-parse", "--path-format=absolute", "--git-common-dir")) / "moegate-gate"


@dataclass(frozen=True)
class Sides:
    """Both sides, and where the run keeps what it has measured."""

    base: Side
    head: Side
    cache: Path

    def key(self, *parts: str) -> str:
        """A name for a run of these sides: the same for the same files and the same `parts`."""
        words = [*parts]
        for side in (self.base, self.head):
            words += [side.record.commit, side.subject, _digest(side) if side.record.dirty else ""]
        return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def _digest(side: Side) -> str:
    """Of a tree that no commit names: its Python files, by name, size and time."""
    seen = hashlib.sha256()
    for path in sorted(side.tree.rglob("*.py")):
        if not any(part.startswith(".") for part in path.relative_to(side.tree).parts):
            status = path.stat()
            seen.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return seen.hexdigest()


def choose_sides(
    folder: Path,
    base: str,
    head: str | None = None,
    *,
    subject: str = MOEGATE,
    prepare: str | None = None,
    allow_dirty: bool = False,
) -> Sides:
    """Two revisions of the repository around `folder`, checked out and prepared.

    Args:
        folder: in the repository.
        base: the revision to compare with.
        head: the revision to judge; None: the checkout as it stands.
        subject: "moegate", or FILE.py:CLASS within the repository.
        prepare: a shell command that builds a side, run in its tree.
        allow_dirty: the checkout may differ from its commit.

    Raises:
        BadSidesError: an unknown revision, the base is the head, or a dirty tree.
        SideError: a side cannot be checked out, does not build, or has no such subject.
    """
    repository = Repository(folder)
    cache = repository.cache()
    base_commit, head_commit = repository.commit_of(base), repository.commit_of(head or "HEAD")
    changed = repository.changed_files() if head is None else []
    if changed and not allow_dirty:
        shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise BadSidesError(
            f"head: expected a clean working tree, got changes in {shown}; commit them, or pass --allow-dirty"
        )
    if base_commit == head_commit and not changed:
        raise BadSidesError(
            f"base: expected another commit than the head's, got {base!r}, which is {base_commit[:12]} as the head is "
            "(--self-test compares a commit with itself)"
        )
    base_tree = repository.check_out(base_commit, cache / "trees" / base_commit[:16])
    head_tree = repository.root
    if head is not None:
        head_tree = repository.check_out(head_commit, cache / "trees" / head_commit[:16])
    times = {commit: repository.commit_time(commit) for commit in (base_commit, head_commit)}
    records = (
        SideRecord(base, base_commit, False, times[base_commit], subject),
        SideRecord(head or WORKING_TREE, head_commit, bool(changed), times[head_commit], subject),
    )
    subject = _relative(subject, repository.root)
    return make_sides(base_tree, head_tree, records, cache, subject=subject, prepare=prepare)


def trees_as_sides(
    base_tree: Path, head_tree: Path, cache: Path, *, subject: str = MOEGATE, prepare: str | None = None
) -> Sides:
    """Two folders that hold the sides' files already, where there is no git, or one folder twice for an A/A run.

    Raises:
        BadSidesError: no such folder.
        SideError: as `choose_sides`.
    """
    for name, tree in (("base", base_tree), ("head", head_tree)):
        if not tree.is_dir():
            raise BadSidesError(f"{name}-tree: expected a folder, got {tree}")
    records = [SideRecord(str(tree), "", True, "", subject) for tree in (base_tree, head_tree)]
    subject = _relative(subject, head_tree.resolve())
    return make_sides(base_tree.resolve(), head_tree.resolve(), tuple(records), cache, subject=subject, prepare=prepare)


def make_sides(
    base_tree: Path,
    head_tree: Path,
    records: tuple[SideRecord, ...],
    cache: Path,
    *,
    subject: str,
    prepare: str | None,
) -> Sides:
    """Build both sides, and carry the harness.

    Raises:
        SideError: one of them does not build, or lacks what is measured.
    """
    sides = []
    for name, tree, record in zip(("base", "head"), (base_tree, head_tree), records, strict=True):
        if prepare is not None and not (name == "head" and head_tree == base_tree):
            _prepare(name, tree, prepare)
        if subject == MOEGATE:
            paths = (_carry_harness(name, tree, head_tree, cache),)
            sides.append(Side(name, tree, record, paths, subject))
            continue
        file, _, attribute = subject.rpartition(":")
        if not (tree / file).is_file():
            raise SideError(f"the {name} has no {file}")
        paths = tuple(path for path in (tree, tree / "src") if path.is_dir())
        sides.append(Side(name, tree, record, paths, f"{tree / file}:{attribute}"))
    return Sides(sides[0], sides[1], cache)


def _prepare(name: str, tree: Path, command: str) -> None:
    done = subprocess.run(command, shell=True, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        output = (done.stdout + done.stderr).strip()[-_MOST_OUTPUT:]
        raise SideError(f"the {name} does not build: {command!r} ended with code {done.returncode}\n{output}")


def _carry_harness(name: str, tree: Path, head_tree: Path, cache: Path) -> Path:
    """A folder with a package `moegate` of this tree's `impl` and the head's other rooms; goes on PYTHONPATH."""
    if not (tree / _OWN_ROOM / "__init__.py").is_file():
        raise SideError(
            f"the {name} has no {_OWN_ROOM}/, so it is no checkout of moegate; name your own layer with --subject"
        )
    site = cache / "sites" / hashlib.sha256(f"{tree}\0{head_tree}".encode()).hexdigest()[:16]
    package = site / MOEGATE
    shutil.rmtree(site, ignore_errors=True)
    package.mkdir(parents=True)
    for file in (head_tree / "cli").glob("*.py"):
        (package / file.name).symlink_to(file)
    for room in _HARNESS:
        (package / room).symlink_to(head_tree / room)
    (package / _OWN_ROOM).symlink_to(tree / _OWN_ROOM)
    return site


def own_site(sides: Sides) -> Path:
    """A folder like that of `_carry_harness` with the base's own harness, to ask it for its workloads."""
    return _carry_harness("base", sides.base.tree, sides.base.tree, sides.cache)


def _relative(subject: str, root: Path) -> str:
    """FILE.py:CLASS with the file relative to the repository, so that both sides have their own.

    Raises:
        BadSidesError: not that form, or a file outside of the repository.
    """
    if subject == MOEGATE:
        return subject
    file, separator, attribute = subject.rpartition(":")
    if not separator or not attribute.isidentifier() or not file.endswith(".py"):
        raise BadSidesError(f"subject: expected moegate or FILE.py:CLASS, got {subject!r}")
    path = Path(file)
    absolute = path.resolve() if path.is_absolute() or path.exists() else (root / path).resolve()
    if not absolute.is_relative_to(root.resolve()):
        raise BadSidesError(f"subject: expected a file within {root}, got {absolute}")
    return f"{absolute.relative_to(root.resolve())}:{attribute}"
