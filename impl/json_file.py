"""JSON files that somebody else wrote: read whole or refused, with the file and the key at fault.

Python's reader takes more than JSON: NaN, the last of two equal keys, numbers of any length. What is taken here means
one thing, is of a sensible size, and comes from a plain file.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20


class JsonFileError(ValueError):
    """A file that cannot be believed.

    Attributes:
        file: the file.
        key: where in it, such as `16` or `16/w2/num_warps`; empty for the file as a whole.
    """

    def __init__(self, file: Path, key: str, message: str) -> None:
        # A key is the file's own text: escaped, so that no terminal obeys it.
        where = f", key {ascii(key)[1:-1]:.100}" if key else ""
        super().__init__(f"{ascii(str(file))[1:-1]}{where}: {message}")
        self.file = file
        self.key = key


def read_bytes(path: Path, error: type[JsonFileError] = JsonFileError, *, most: int = MAX_BYTES) -> bytes | None:
    """A file's bytes, `most` of them; None where there is none.

    Raises:
        JsonFileError: something is there that cannot be read as a plain file of sensible size: a symlink loop, a
            dangling link, a folder, a pipe, no permission. `error` is the class to raise.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as cause:  # a NUL in the name is a ValueError
        raise error(path, "", f"cannot be read: {getattr(cause, 'strerror', cause)}") from cause
    try:
        # Not blocking: a pipe of this name must not stop the process.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as cause:
        raise error(path, "", f"cannot be read: {cause.strerror}") from cause
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(path, "", "expected a plain file")
    with os.fdopen(handle, "rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise error(path, "", f"expected at most {most} bytes")
    return content


def parse_object(path: Path, content: bytes, error: type[JsonFileError] = JsonFileError) -> dict[str, Any]:
    """The JSON object that a file's content is.

    Raises:
        JsonFileError: it is empty, no UTF-8, no JSON, no object, nested too deeply, has a key twice, or numbers that
            are none or thousands of digits long. `error` is the class to raise.
    """
    if not content.strip():
        raise error(path, "", "is empty")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise error(path, key, "stands twice")
            found[key] = value
        return found

    def no_constant(name: str) -> Any:
        raise error(path, "", f"expected numbers, got {name}")

    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except UnicodeDecodeError as cause:
        raise error(path, "", f"expected UTF-8, got byte {content[cause.start]:#04x}") from cause
    except json.JSONDecodeError as cause:
        raise error(path, "", f"expected JSON: {cause.msg} in line {cause.lineno}") from cause
    except RecursionError as cause:
        raise error(path, "", "is nested too deeply") from cause
    except JsonFileError:
        raise
    except ValueError as cause:  # an integer of thousands of digits
        raise error(path, "", f"expected numbers of sensible size: {cause}") from cause
    if not isinstance(found, dict):
        raise error(path, "", f"expected a JSON object, got {type(found).__name__}")
    return found
