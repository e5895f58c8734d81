"""Loads the benchmarks' plugin where the environment has not: a checkout that was not installed anew."""

from __future__ import annotations

import pytest

PLUGIN = "moegate.bench.plugin"


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Runs before the command line is parsed, since pytest reads the conftest.py of the folders named on it first."""
    if not pluginmanager.hasplugin(PLUGIN):
        pluginmanager.import_plugin(PLUGIN)
