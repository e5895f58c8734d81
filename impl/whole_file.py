"""Files that are written whole or not at all: an interruption, a kill or a full disk leaves the old one, or none."""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .once import log_once

logger = logging.getLogger(__name__)

PART = ".part"
"""The suffix of a file that is being written; readers pass them over."""


def write_whole(path: Path | str, content: str | bytes, *, make_folders: bool = False) -> Path:
    """Write a file; once this returns, it is on the disk under its name.

    The content goes to a file beside it, which takes the name when it is complete: readers see the old one or the new
    one, and of several writers the last one wins. What is no plain file (`/dev/stdout`, a pipe) is written to directly.

    Args:
        path: the file; links are followed.
        content: text becomes UTF-8.
        make_folders: make the folders that are not there.

    Returns:
        The file, links followed.

    Raises:
        OSError: the folder is not there, is read-only or full; with the file's name.
    """
    target = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:
            stream.write(data)
        return target
    try:
        if make_folders:
            target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=PART)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync(target.parent)
    except OSError as error:
        # The file beside it is nobody's business.
        raise OSError(error.errno, error.strerror, str(target)) from error
    return target


def _sync(folder: Path) -> None:
    """The folder's entry too must be on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def folder_locked(folder: Path | str) -> Iterator[None]:
    """Let one process at a time change a folder's files: what is read inside is what is written upon.

    The lock is on the folder itself, leaves no file behind, and ends with its process, however that ends. Where a
    file system has no locks, that is logged, and writers must be kept apart otherwise.

    Raises:
        OSError: no such folder.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            log_once(logger, logging.WARNING, f"{folder}: cannot be locked against other writers: {error.strerror}")
        yield
    finally:
        os.close(handle)


def expect_writable(name: str, path: Path | str, *, make_folders: bool = False) -> None:
    """Check that a file can be written, before the work whose result it is to hold.

    Args:
        name: the argument's, for the message.
        path: the file; there or not.
        make_folders: folders that are not there will be made, as by `write_whole`.

    Raises:
        ValueError: no file that can be written there, with the reason.
    """
    said = ascii(str(path))
    if not str(path) or "\0" in str(path):
        raise ValueError(f"{name}: expected a file, got {said:.300}")
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode if target.exists() else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise ValueError(f"{name}: expected a file, got the folder {said:.300}")
        if not stat.S_ISREG(mode):
            if not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        folder = target.parent
        while make_folders and not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"{name}: expected a file in a folder that is there, got {said:.300}")
        handle, probe = tempfile.mkstemp(dir=folder, prefix=".", suffix=PART)
        os.close(handle)
        os.unlink(probe)
        if len(os.fsencode(target.name)) > os.pathconf(folder, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise ValueError(f"{name}: expected a file that can be written, got {said:.300}: {error.strerror}") from error
