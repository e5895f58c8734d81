"""A console that prints text as it is: names come from users' files, and neither markup nor escapes in them act."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

# Of a table in a log file, which has no width of its own.
LOG_WIDTH = 140


def printable(text: str) -> str:
    """The text with every control character but line ends and tabs spelled out."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


class PlainConsole(Console):
    """rich's console without markup, emoji codes and colours that a text would choose for itself."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, printable."""
        return super().render_str(printable(text), **options)


def wide_console(*, stderr: bool = False, log_width: int = LOG_WIDTH) -> PlainConsole:
    """A console that a log file does not squeeze into 80 columns."""
    console = PlainConsole(stderr=stderr)
    return console if console.is_terminal else PlainConsole(stderr=stderr, width=log_width)
