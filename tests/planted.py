"""Plant one fault in a copy of `impl` and run part of the suite on it, in a process of its own.

The copy is put before the real package by a finder at the front of `sys.meta_path`; production code has no hooks. An
edit keeps the line count, since Triton's cache key includes the line on which a kernel starts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import moegate.impl.platform

IMPL = Path(moegate.impl.platform.__file__).parent

CHILD = """
import importlib.machinery, importlib.util, json, sys

planted, tests, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "moegate.impl":
            return importlib.util.spec_from_file_location(
                name, planted + "/__init__.py", submodule_search_locations=[planted]
            )
        return None

sys.meta_path.insert(0, Finder())
import pytest
from hypothesis import Phase, settings
from moegate.conformance import profiles

# Nobody reads the case that fails: shrinking it would take most of the time.
gate = settings.get_profile("moegate-gate")
settings.register_profile("moegate-gate", gate, phases=(Phase.explicit, Phase.generate))
sys.exit(pytest.main([*tests, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *options]))
"""


@dataclass(frozen=True)
class Fault:
    """One source edit.

    Attributes:
        id: area and name.
        file: below `impl/`.
        old: text that occurs exactly once there.
        new: what replaces it, with as many lines.
        tests: the suite's files that should see it.
        properties: any of these must be the one that it violates.
    """

    id: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    properties: tuple[str, ...]


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of `impl` with the fault in it.

    Raises:
        ValueError: an edit that matches not once, or that changes the number of lines.
    """
    copy = folder / "impl"
    shutil.copytree(IMPL, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / fault.file).read_text()
    if source.count(fault.old) != 1:
        raise ValueError(f"{fault.id}: expected its text once in {fault.file}, found {source.count(fault.old)} times")
    if fault.old.count("\n") != fault.new.count("\n"):
        raise ValueError(f"{fault.id}: expected as many lines as before")
    (copy / fault.file).write_text(source.replace(fault.old, fault.new))
    return copy


@dataclass(frozen=True)
class Outcome:
    """What the suite said: its exit status, and the properties violated; a death by signal is negative."""

    status: int
    violated: tuple[str, ...]
    output: str


def run_suite(
    planted: Path, tests: tuple[str, ...], folder: Path, scale: float = 0.5, keyword: str = "triton"
) -> Outcome:
    """Run some of the suite's files on a planted copy under Triton's interpreter, the tests that `keyword` selects."""
    report = folder / "report.json"
    suite = IMPL.parent / "conformance"
    files = [str(suite / name) for name in tests]
    options = [f"--moegate-report={report}", "--moegate-device=cpu", f"--moegate-scale={scale}", "-c", os.devnull]
    options += ["--import-mode=importlib", "--rootdir", str(folder), "-k", keyword]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(planted), json.dumps(files), json.dumps(options)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    violated = ()
    if report.exists():
        rows = json.loads(report.read_text())["properties"]
        violated = tuple(row["id"] for row in rows if row["verdict"] == "violated")
    return Outcome(child.returncode, violated, child.stdout[-3000:] + child.stderr[-2000:])


def expect_caught(fault: Fault, folder: Path, scale: float = 0.5, keyword: str = "triton") -> None:
    """Plant a fault and check that one of its properties catches it; arguments as `run_suite`'s."""
    outcome = run_suite(plant(fault, folder), fault.tests, folder, scale, keyword)
    assert outcome.status == 1, outcome.output
    assert set(outcome.violated) & set(fault.properties), (outcome.violated, outcome.output)
