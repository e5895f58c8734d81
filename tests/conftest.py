"""One thread a process, children included, and one worker for the tests that share runs in processes of their own."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the operands are small, and xdist brings the processes

# Each of their cases is one bad input.
BAD_INPUT = ("test_bad_input.py", "test_bad_options.py", "test_hostile_files.py")

# Their module fixtures start the processes, and each worker with a test of such a file would start them again.
SHARED_RUNS = (
    "test_bench_comparison.py",
    "test_bench_suite.py",
    "test_cli.py",
    "test_faults.py",
    "test_packaging.py",
    "test_plugin.py",
    "test_report_browser.py",
    "test_crashes.py",
)


@pytest.fixture(scope="session", autouse=True)
def _repaired_interpreter():
    """Whatever test comes first in a process, Triton's interpreter is repaired where it is used."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        from moegate.conformance import interpreter

        interpreter.install()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests go to whichever worker is free, but those of a file with shared runs stay together."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file.endswith(SHARED_RUNS) else nodeid

    return Scheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_terminal_summary(terminalreporter):
    """How many bad inputs were given, by what they were given to."""
    counts = {}
    for report in terminalreporter.stats.get("passed", ()):
        file, _, name = report.nodeid.partition("::")
        if file.endswith(BAD_INPUT) and "is_refused" in name and "[" in name:
            test, _, to = name.partition("[")
            # Of files and names a test says what was given; of calls and options the first part of its parameters.
            to = test.removeprefix("test_").replace("_", " ") if "hostile" in file else to.split("-")[0].strip("'")
            counts[to] = counts.get(to, 0) + 1
    if counts:
        terminalreporter.section("bad inputs")
        listed = ", ".join(f"{to} {count}" for to, count in sorted(counts.items()))
        terminalreporter.write_line(f"{sum(counts.values())} distinct bad inputs refused: {listed}")
