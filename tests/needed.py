"""Packages that only some tests need: a machine without them, as one that brings its own torch, skips those."""

import importlib
import os

import pytest


def need(*names):
    """Skip the calling module where a package is missing, with that reason; in CI it is an error."""
    for name in names:
        if os.environ.get("CI"):
            importlib.import_module(name)
        else:
            pytest.importorskip(name)
