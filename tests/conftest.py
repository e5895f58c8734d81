"""One thread a process, children included, and one worker for the tests that share runs in processes of their own."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the operands are small, and xdist brings the processes

# Their module fixtures start the processes, and each worker with a test of such a file would start them again.
SHARED_RUNS = (
    "test_bench_comparison.py",
    "test_bench_suite.py",
    "test_cli.py",
    "test_packaging.py",
    "test_plugin.py",
    "test_report_browser.py",
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
