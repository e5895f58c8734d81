"""Write a file whole or not at all: no reader sees half of one, and an interruption leaves what was there before."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PART = ".part"
"""The suffix of a file that is being written; readers pass them over."""


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, and move it there in one step; the folders are made where there are none.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
