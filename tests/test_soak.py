"""The soak: time shared out, growth seen, failures kept once; and a check that is interrupted says what it had."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st

from moegate import check, exit_codes
from moegate.conformance.console import PlainConsole
from moegate.conformance.profiles import explore
from moegate.conformance.selection import SELECTION, Selection
from moegate.conformance.soak import (
    BATCH,
    COMPILED,
    FEWEST_BATCHES,
    GrowthError,
    Usage,
    growth,
    keep_failure,
    soak,
    without_compilers,
)
from moegate.conformance.spec import AlignSpec
from moegate.impl import once
from moegate.impl.once import log_once

SPECS = st.builds(AlignSpec, M=st.integers(1, 1000), E=st.just(8), top_k=st.just(2))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes a second, however busy the machine is."""
    seconds = itertools.count()
    monkeypatch.setattr("moegate.conformance.soak.time", SimpleNamespace(monotonic=lambda: next(seconds)))


@pytest.fixture
def soaking(clock: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SELECTION, "profile", "soak")
    monkeypatch.setattr(SELECTION, "until", 4.0)
    monkeypatch.setattr(SELECTION, "waiting", 1)
    return tmp_path / ".moegate" / "soak"


def test_a_share_of_the_time_is_filled_with_batches_of_new_cases(soaking: Path) -> None:
    seen, facts = [], Counter()
    explore(SPECS, lambda spec: seen.append(spec.M), name="x", examples=1, facts=facts)
    assert facts[f"soak: batches of {BATCH} cases"] == 4
    assert len(set(seen)) > BATCH
    assert not soaking.exists()


def test_tests_share_what_is_left_and_those_without_time_are_counted(clock: None) -> None:
    batches, selection, facts = [], Selection(until=40.0, waiting=3), Counter()
    for _ in range(4):
        soak(lambda: batches.append(1), selection, facts)
    assert 30 <= len(batches) <= 40
    assert facts["soak: tests for which no time was left"] == 1


def test_a_failure_is_shrunk_and_kept_once(soaking: Path) -> None:
    def finds(spec: AlignSpec) -> None:
        assert spec.M < 77, "too many"

    for new in (1, 0):
        SELECTION.until, SELECTION.waiting = 1000.0, 1
        facts = Counter()
        with pytest.raises(AssertionError, match="too many"):
            explore(SPECS, finds, name="x", examples=1, facts=facts)
        assert facts["soak: new failures"] == new
        (failed,) = (name for name in facts if name.startswith("soak: failed: "))
        assert "AlignSpec(M=77, " in failed
    (file,) = soaking.iterdir()
    kept = json.loads(file.read_text())
    assert "M=77" in kept["spec"]
    assert "too many" in kept["text"]


def test_two_failures_are_two_files(tmp_path: Path) -> None:
    assert keep_failure("NUM_01", "A(M=1)", "x", tmp_path)
    assert keep_failure("NUM_01", "A(M=2)", "x", tmp_path)
    assert not keep_failure("NUM_01", "A(M=2)", "y", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def usages(memory: list[int]) -> list[Usage]:
    return [Usage(each << 20, 10, 0) for each in memory]


@pytest.mark.parametrize(
    ("memory", "grows"),
    [
        ([100] * 30, False),
        (list(range(100, 400, 10)), True),
        ([100 + 200 * (number > 4) for number in range(30)], False),  # warm-up
        ([100 + 50 * (number % 2) for number in range(30)], False),  # to and fro
        (list(range(100, 130)), False),  # within what is allowed
        (list(range(100, 200, 10))[: FEWEST_BATCHES - 2], False),  # too short to say
    ],
)
def test_growth_is_what_goes_on_after_the_warm_up(memory: list[int], grows: bool) -> None:
    assert bool(growth(usages(memory))) == grows


def test_memory_that_leaks_a_batch_is_a_finding(clock: None) -> None:
    # Over 32 MiB the allocator never hands out again what other tests of this process have freed.
    gc.collect()
    leaked = []
    with pytest.raises(GrowthError, match="memory from"):
        soak(lambda: leaked.append(b"x" * (40 << 20)), Selection(until=24.0, waiting=1), Counter())


def test_what_a_compiler_sets_up_late_is_no_growth_and_the_same_without_one_is() -> None:
    samples = usages([100 + 47 * (number > 13) for number in range(22)])
    assert growth(without_compilers(samples, [7] * 22))
    assert not growth(without_compilers(samples, [7 + (number > 13) for number in range(22)]))


def test_a_leak_is_seen_between_batches_that_compile() -> None:
    leak = usages(list(range(100, 400, 10)))
    assert growth(without_compilers(leak, [number // 3 for number in range(30)]))


def test_memory_that_a_batch_gives_back_while_it_compiles_counts() -> None:
    samples = usages([100, 150, 60, 60])
    kept = without_compilers(samples, [0, 1, 2, 2])
    assert [each.memory >> 20 for each in kept] == [100, 100, 10, 10]


def test_a_soak_knows_which_batches_compiled(clock: None) -> None:
    gc.collect()
    kept, facts = [], Counter()

    def compiles_now_and_then() -> None:
        if len(kept) == 15:
            facts[COMPILED] += 1
        kept.append(b"x" * ((47 << 20) if len(kept) == 15 else 0))

    soak(compiles_now_and_then, Selection(until=24.0, waiting=1), facts)


def test_what_is_logged_in_a_soak_is_kept_by_nobody(clock: None, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("moegate.test")
    soak(lambda: logger.warning("of a batch"), Selection(until=24.0, waiting=1), Counter())
    assert not caplog.records
    logger.warning("of afterwards")
    assert [record.message for record in caplog.records] == ["of afterwards"]


def test_messages_that_are_said_once_are_not_remembered_without_end() -> None:
    logger = logging.getLogger("moegate.test")
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(20_000):
            log_once(logger, logging.DEBUG, f"{number:01000}")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        once.forget()
    assert held < 10 << 20


def test_handles_that_leak_are_a_finding(clock: None) -> None:
    leaked = []
    try:
        with pytest.raises(GrowthError, match="handles from"):
            soak(lambda: leaked.append(os.open("/dev/null", os.O_RDONLY)), Selection(until=24.0, waiting=1), Counter())
    finally:
        for file in leaked:
            os.close(file)


# --- an interrupted check ----------------------------------------------------------------------------------------

CHILD = """
import pathlib, signal, sys, time
def stop(*_):
    print("what was judged until here")
    sys.exit(2)
signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1]).write_text("xxx")
time.sleep(60)
"""


def test_an_interrupted_check_ends_its_child_and_says_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = tmp_path / "progress"
    progress.touch()
    children = []
    popen = subprocess.Popen

    def sleep(seconds: float) -> None:
        if progress.read_text():
            raise KeyboardInterrupt

    def start(*arguments, **options):
        children.append(popen(*arguments, **options))
        return children[-1]

    monkeypatch.setattr(check.subprocess, "Popen", start)
    monkeypatch.setattr(check, "time", SimpleNamespace(sleep=sleep))
    command = [sys.executable, "-c", CHILD, str(progress)]
    output, status = check._run(command, {}, str(tmp_path), progress, PlainConsole(width=100))
    assert children[0].poll() is not None
    assert "what was judged until here" in output
    assert "interrupted after 3 executions" in capsys.readouterr().out
    report = {"verdict": "holds", "properties": [1]}
    assert check._exit_code(report, status) == exit_codes.INCONCLUSIVE
    assert check._exit_code(report | {"verdict": "violated"}, status) == exit_codes.FINDING


ENDED = """
import os, signal
from moegate import main
def told_to_end():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        print("interrupted")
main.app = told_to_end
main.run()
"""


def test_a_command_that_is_told_to_end_is_interrupted_and_can_say_what_it_had() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "interrupted"), ended.stderr
