"""Log a message once in a process: a warning on every layer of every step hides the one that matters."""

from __future__ import annotations

import logging

# A process that meets new shapes for weeks keeps no more; after so many it may say a message again.
_MOST_SAID = 4096
_said: set[tuple[str, str]] = set()


def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log `message` unless this logger has logged the same one before; it is one string, with nothing to format."""
    key = (logger.name, message)
    if key not in _said:
        if len(_said) >= _MOST_SAID:
            _said.clear()
        _said.add(key)
        logger.log(level, "%s", message)


def forget() -> None:
    """Forget what was said, so that it is said again (tests, a new session in one process)."""
    _said.clear()
