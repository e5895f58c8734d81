"""The checked-in decision table: a change of a rule or a predicate has to show in review."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from moegate.impl.experts.flashinfer_trtllm import FlashInferTrtllmExperts
from moegate.impl.oracle import rules
from moegate.impl.oracle.backends import UnquantizedMoeBackend as Backend
from moegate.impl.platform import Platform

_PATH = Path(__file__).parent / "oracle_snapshot.py"


@pytest.fixture(scope="module")
def table():
    return SimpleNamespace(**runpy.run_path(str(_PATH)))


def test_the_decision_table_is_the_checked_in_one(table):
    assert table.snapshot() == table.FILE.read_text(), (
        "decisions changed: review them, then run tests/oracle_snapshot.py"
    )


def test_a_capability_switched_on_for_one_activation_shows_in_the_table(table, monkeypatch):
    original = FlashInferTrtllmExperts.refusal.__func__

    def refusal(cls, config, platform):
        words = original(cls, config, platform)
        return None if words is not None and "got gelu" in words else words

    monkeypatch.setattr(FlashInferTrtllmExperts, "refusal", classmethod(refusal))
    assert table.snapshot() != table.FILE.read_text()


def test_a_changed_default_backend_shows_in_the_table(table, monkeypatch):
    monkeypatch.setattr(Platform, "is_hopper", property(lambda self: False))
    changed = table.snapshot()
    assert changed != table.FILE.read_text()
    assert "flashinfer_cutlass: cuda:8.9,9.0" in changed


def test_a_longer_line_shows_in_the_table(table, monkeypatch):
    scheme, vendor = next(iter(rules.PRIORITIES)), Platform.parse("rocm:gfx942").vendor
    unquantised = {**rules.PRIORITIES[scheme], vendor: (Backend.TRITON, Backend.AITER, Backend.BATCHED_TRITON)}
    monkeypatch.setattr(rules, "PRIORITIES", {**rules.PRIORITIES, scheme: unquantised})
    assert table.snapshot() != table.FILE.read_text()
