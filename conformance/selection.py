"""What this run was asked for: set once by the plugin from its options, read by everything below it.

No heavy import: the plugin loads in every pytest run of its environment.
"""

from __future__ import annotations

from dataclasses import dataclass

PROFILES = ("gate", "nightly", "soak")


@dataclass
class Selection:
    """The `--moegate-*` options.

    Attributes:
        subject: name or `FILE.py:CLASS`.
        device: torch device type; None until resolved (the GPU where there is one).
        profile: one of PROFILES.
        spec: the line of a single spec to replay, or None.
        scale: multiplies the number of cases.
        progress: a file to which each execution adds one byte, or None.
        known: a file of known failures beside those that ship here, or None.
        isolate: the subject runs in a process of its own.
        timeout: seconds for one of its calls there.
        python: the interpreter of that process; None: this one's.
        reruns: how often the fixed cases are called again, and nothing else is run; None: the whole suite.
        minutes: of a soak, over all its tests and workers; None: as many cases as the profile says.
        until: when such a soak ends in this process (`time.monotonic`), once the tests are known.
        waiting: its tests that are still to come in this process, about.
    """

    subject: str = "moegate"
    device: str | None = None
    profile: str = "gate"
    spec: str | None = None
    scale: float = 1.0
    progress: str | None = None
    known: str | None = None
    isolate: bool = False
    timeout: float = 120.0
    python: str | None = None
    reruns: int | None = None
    minutes: float | None = None
    until: float | None = None
    waiting: int = 0


SELECTION = Selection()
