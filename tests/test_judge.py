"""Verdicts and the ledger: every property under its own id and exception, and two workers' counts are a sum."""

import shlex
from collections import Counter

import pytest

from moegate.conformance.catalogue import PROPERTIES
from moegate.conformance.judge import Finding, Ledger, Tally, declare, first_violated
from moegate.conformance.selection import SELECTION
from moegate.conformance.session import Session
from moegate.conformance.spec import AlignSpec, ExpertsSpec, parse_spec
from moegate.conformance.subjects.eager import EagerSubject

SPEC = AlignSpec(M=3, E=4, top_k=2, routing="tile")
ONE, TWO = list(PROPERTIES.values())[:2]


def violate(prop):
    with pytest.raises(Finding) as finding:
        Ledger().settle([prop.verdict(False, "got 3")], SPEC, "moegate check --spec x")
    return finding.value


def test_every_property_raises_a_class_of_its_own():
    classes = {id: type(violate(prop)) for id, prop in PROPERTIES.items()}
    assert len(set(classes.values())) == len(PROPERTIES) > 20
    assert classes["ROUTE-03"].__name__ == "ROUTE_03_Violated"


def test_a_findings_text_holds_id_sentence_detail_spec_and_replay():
    text = str(violate(ONE))
    for part in (ONE.id, ONE.sentence, "got 3", repr(SPEC), "replay: moegate check --spec x"):
        assert part in text


def test_a_taken_id_is_refused():
    sentence = ONE.sentence
    with pytest.raises(ValueError, match=f"id: {ONE.id} is declared twice"):
        declare(ONE.id, "something else", "experts")
    assert PROPERTIES[ONE.id].sentence == sentence


def test_sentences_and_ids_are_told_apart():
    assert len({prop.sentence for prop in PROPERTIES.values()}) == len(PROPERTIES)
    assert all(id == prop.id for id, prop in PROPERTIES.items())
    # How a subject's calls end is judged whatever they are of.
    assert {id.partition("-")[0] for id, prop in PROPERTIES.items() if not prop.facets} == {"SUBJECT"}


def test_all_verdicts_of_an_execution_count_and_the_first_violated_is_raised():
    ledger = Ledger()
    verdicts = [ONE.verdict(True, budget_used=0.5), TWO.verdict(False, "got 3", budget_used=1.5)]
    with pytest.raises(Finding, match=TWO.id):
        ledger.settle(verdicts, SPEC, "replay")
    ledger.settle([ONE.verdict(True, budget_used=0.25)], SPEC, "replay")
    assert ledger.tallies[ONE.id] == Tally(cases=2, violated=0, budget_used=0.5, used=Counter({"50": 1, "25": 1}))
    assert (ledger.tallies[TWO.id].violated, ledger.tallies[TWO.id].budget_used) == (1, 1.5)
    assert first_violated(verdicts) is verdicts[1]
    assert first_violated(verdicts[:1]) is None


def filled(cases, used, finding=""):
    ledger = Ledger({ONE.id: Tally(cases, bool(finding), used, finding)})
    ledger.ran("triton", SPEC, cases)
    ledger.skipped["no GPU"] += 1
    ledger.facts["kernel variants compiled"] += cases
    return ledger


def test_two_workers_ledgers_merge_to_their_sum():
    merged = Ledger()
    merged.merge(filled(3, 0.25))
    merged.merge(Ledger.from_dict(filled(4, 0.5, "the finding").as_dict()))
    merged.merge(filled(5, None))
    assert merged.tallies == {ONE.id: Tally(12, 1, 0.5, "the finding")}
    assert merged.executions == {"triton": 12}
    assert merged.pairs == {"expert_map=none & routing=tile": 3}
    assert merged.skipped == {"no GPU": 3}
    assert merged.facts == {"kernel variants compiled": 12}


def test_the_replay_line_survives_a_shell(monkeypatch):
    monkeypatch.setattr(SELECTION, "subject", "my kernels/mine.py:Mine")
    spec = ExpertsSpec(M=1, H=16, I=8, E=2, top_k=1, dtype="float16", weight_on_input=True)
    words = shlex.split(Session(EagerSubject(), "cpu").replay(spec))
    assert words[:2] == ["moegate", "check"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--subject"] == "my kernels/mine.py:Mine"
    assert options["--device"] == "cpu"
    assert parse_spec(options["--spec"]) == spec
