"""Log a message once in a process: a warning on every layer of every step hides the one that matters."""

from __future__ import annotations

import logging

_said: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log `message` unless this logger has logged the same one before; it is one string, with nothing to format."""
    key = (logger.name, message)
    if key not in _said:
        _said.add(key)
        logger.log(level, "%s", message)


def forget() -> None:
    """Forget what was said, so that it is said again (tests, a new session in one process)."""
    _said.clear()
