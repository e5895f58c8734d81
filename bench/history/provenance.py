"""Where a run comes from: the commit, whether it is on the main branch, and who ran it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 60


class GitError(ValueError):
    """git does not answer, or says no; the message is git's own."""


def git(repository: Path, *arguments: str) -> str:
    """What `git` prints, without the last newline.

    Raises:
        GitError: git is absent, too slow, or fails.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GitError(f"git {arguments[0]}: {error}") from None
    if done.returncode:
        raise GitError(f"git {arguments[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.removesuffix("\n")


def commit_info(repository: Path) -> dict[str, object]:
    """The checkout's commit as pytest-benchmark writes it: `{id, time, author_time, dirty, project, branch}`.

    Raises:
        GitError: no git repository.
    """
    branch = git(repository, "rev-parse", "--abbrev-ref", "HEAD")
    id, time, author_time = git(repository, "show", "-s", "--format=%H%n%cI%n%aI", "HEAD").split("\n")
    return {
        "id": id,
        "time": time,
        "author_time": author_time,
        "dirty": bool(git(repository, "status", "--porcelain", "--untracked-files=no")),
        "project": Path(git(repository, "rev-parse", "--show-toplevel")).name,
        "branch": "(detached head)" if branch == "HEAD" else branch,
    }


@dataclass(frozen=True)
class MainCommit:
    """A commit of the main branch.

    Attributes:
        ref: the branch, as it was found.
        tip: its commit then.
    """

    ref: str
    tip: str


def on_main(repository: Path, commit: str, main: str) -> MainCommit:
    """The main branch that holds a commit: the remote's where there is one, since that is what was pushed.

    Args:
        repository: a checkout with the branch's history.
        commit: a full commit id.
        main: the branch's name, or a ref such as `upstream/trunk`.

    Raises:
        GitError: no such branch, a commit that is not in this clone, or one that is not on the branch.
    """
    for ref in (f"refs/remotes/origin/{main}", f"refs/remotes/{main}", f"refs/heads/{main}", main):
        try:
            tip = git(repository, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        except GitError:
            continue
        break
    else:
        raise GitError(f"main: expected a branch of {repository}, got {main!r}")
    try:
        git(repository, "cat-file", "-e", f"{commit}^{{commit}}")
    except GitError:
        raise GitError(
            f"commit {commit[:12]} is not in this clone; a shallow one has to be fetched whole (fetch-depth: 0)"
        ) from None
    try:
        git(repository, "merge-base", "--is-ancestor", commit, tip)
    except GitError:
        raise GitError(f"commit {commit[:12]} is not on {ref} (at {tip[:12]})") from None
    return MainCommit(ref, tip)


def origin(environment: Mapping[str, str] | None = None) -> str:
    """The address of the CI run that this process is part of, else the host's name."""
    env = os.environ if environment is None else environment
    if env.get("GITHUB_RUN_ID"):
        server, repository = env.get("GITHUB_SERVER_URL", ""), env.get("GITHUB_REPOSITORY", "")
        return f"{server}/{repository}/actions/runs/{env['GITHUB_RUN_ID']}"
    return env.get("CI_JOB_URL") or env.get("BUILDKITE_BUILD_URL") or platform.node()
