"""Hypothesis profiles, and the one way in which properties are explored.

`moegate-gate`: every family seeded from its name, no database: each subject, folder and runner sees the same cases.
`moegate-nightly`: random, with the example database. `moegate-soak`: random, high counts.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, example, given, seed, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from hypothesis.strategies import SearchStrategy

from .judge import Finding
from .selection import SELECTION
from .soak import BATCH, soak
from .spec import Spec, parse_spec

# No explain phase: under Triton's interpreter it costs five times the shrink.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)
# Kernels compile on first use, and a case is a whole layer: neither says anything about the strategy.
_SLOW = (HealthCheck.too_slow,)

# Where it finds the variable CI, Hypothesis starts from a profile with which all runs are the same and no example is
# kept: ours start from its other one, wherever they run.
_PARENT = settings.get_profile("default")

settings.register_profile(
    "moegate-gate",
    _PARENT,
    derandomize=False,
    database=None,
    deadline=None,
    phases=_PHASES,
    suppress_health_check=_SLOW,
    print_blob=False,
    verbosity=Verbosity.normal,
)
settings.register_profile(
    "moegate-nightly",
    _PARENT,
    derandomize=False,
    deadline=None,
    phases=_PHASES,
    suppress_health_check=_SLOW,
    print_blob=True,
)
settings.register_profile("moegate-soak", settings.get_profile("moegate-nightly"))

_SCALE = {"gate": 1.0, "nightly": 4.0, "soak": 40.0}


def examples_of(gate_examples: float) -> int:
    """How many cases the selected profile draws where `gate` draws `gate_examples`."""
    return max(1, round(gate_examples * _SCALE[SELECTION.profile] * SELECTION.scale))


def profile(**changes: Any) -> settings:
    """Hypothesis settings of the selected profile, with changes."""
    return settings(settings.get_profile(f"moegate-{SELECTION.profile}"), **changes)


def seeded(test: Any, name: str) -> Any:
    """A test or state machine whose cases are given by `name` under the gate, and new in each run elsewhere."""
    return seed(zlib.crc32(name.encode()))(test) if SELECTION.profile == "gate" else test


@contextmanager
def _only_our_constants() -> Iterator[None]:
    """Keep Hypothesis from mixing in constants of whatever local modules happen to be loaded.

    It harvests them from every module outside site-packages: a checkout would draw other cases than an installed
    wheel, and one worker other cases than the next. There is no public switch for it.
    """
    harvest = providers._get_local_constants
    nothing = Constants()
    providers._get_local_constants = lambda: nothing
    providers.CONSTANTS_CACHE.cache.clear()
    try:
        yield
    finally:
        providers._get_local_constants = harvest
        providers.CONSTANTS_CACHE.cache.clear()


def explore(
    strategy: SearchStrategy[Any] | None,
    body: Callable[[Any], None],
    *,
    name: str,
    examples: int,
    pinned: Iterable[Spec] = (),
    facts: Counter[str] | None = None,
) -> None:
    """Run `body` on drawn specs under the selected profile; on the one spec that the run was asked for, if any.

    Args:
        strategy: draws specs; None: the pinned ones are all.
        body: runs the subject on a spec and settles the verdicts.
        name: seeds the gate; the family and whatever parametrises it.
        examples: cases to draw.
        pinned: specs that are always run first.
        facts: counts what a soak did.
    """
    if SELECTION.spec is not None:
        body(parse_spec(SELECTION.spec))
        return

    def judged(spec: Any) -> None:  # whatever `body` calls its argument, the strategy is given by this name
        try:
            body(spec)
        except Exception as error:
            error.moegate_spec = repr(spec)
            raise

    if strategy is None:
        # Nothing is shrunk here, so that every case has its verdict before the first finding is raised.
        findings = []
        for spec in pinned:
            try:
                judged(spec)
            except Finding as finding:
                findings.append(finding)
        if findings:
            raise findings[0]
        return

    def run(examples: int, pinned: Iterable[Spec]) -> None:
        test = given(spec=strategy)(judged)
        for spec in pinned:
            test = example(spec=spec)(test)
        test = seeded(profile(max_examples=examples)(test), name)
        with _only_our_constants() if SELECTION.profile == "gate" else nullcontext():
            test()

    if SELECTION.until is None:
        run(examples, pinned)
    else:  # what is pinned is the gate's: here every case is a new one
        soak(lambda: run(BATCH, ()), SELECTION, Counter() if facts is None else facts)
