"""Known failures: entries are refused by name, tolerate what they say and no more, and are never forgotten."""

from collections import Counter
from datetime import date

import pytest

from moegate.conformance.judge import Finding, Ledger
from moegate.conformance.known import KnownFailures, load_known, parse_known
from moegate.conformance.properties.num import ELEMENT, ROW_RMS
from moegate.conformance.spec import ExpertsSpec, RoutingSpec

WRONG = """
[[failure]]
subject = "mine*"
property = "NUM-01"
severity = "wrong"
when = {dtype = "float16", M = [1, 2]}
issue = "https://example.com/1"
reason = "it overflows"
expires = 2027-01-31
"""
CRASH = """
[[failure]]
subject = "mine"
facet = "experts"
severity = "crash"
variant = "fast"
issue = "https://example.com/2"
reason = "an illegal access"
expires = 2027-01-31
"""
SPEC = ExpertsSpec(M=1, H=16, I=8, E=2, top_k=1, dtype="float16")
OTHER = ExpertsSpec(M=3, H=16, I=8, E=2, top_k=1, dtype="float16")
BEFORE, AFTER = date(2027, 1, 30), date(2027, 1, 31)


def known(text=WRONG + CRASH, *, subject="mine", device="cpu", today=BEFORE):
    return KnownFailures(parse_known(text, "known.toml"), subject, device, today)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("issue = ", "issues = "), "failure 1: no such key: issues"),
        (('issue = "https://example.com/1"\n', ""), "failure 1: issue is missing"),
        (("https://example.com/1", "see the tracker"), "failure 1: issue: expected a link"),
        (("expires = 2027-01-31\n", ""), "failure 1: expires is missing"),
        (("2027-01-31", '"soon"'), "failure 1: expires: expected a date such as 2027-03-31, got 'soon'"),
        (('"wrong"', '"bad"'), "failure 1: severity: expected wrong or crash, got 'bad'"),
        (('property = "NUM-01"', 'facet = "experts"'), "failure 1: property: expected it beside severity 'wrong'"),
        (("M = [1, 2]", "colour = 1"), "failure 1: when: no spec has a field colour"),
        (('reason = "it overflows"', 'reason = ""'), "failure 1: reason: expected a text, got ''"),
        (("[[failure]]", "[failure]"), r"expected \[\[failure\]\] tables alone"),
        (("[[failure]]", "[[failure"), "known.toml is no TOML"),
    ],
    ids=str,
)
def test_an_entry_that_says_too_little_or_what_nobody_knows_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        parse_known(WRONG.replace(*change), "known.toml")


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="which does not exist"):
        load_known("nowhere.toml")


def test_an_entry_speaks_of_its_subject_its_property_its_variant_and_its_cases_alone():
    entries = known()
    assert entries.wrong("NUM-01", SPEC, "fast") is not None
    assert entries.wrong("NUM-02", SPEC, "fast") is None
    assert entries.wrong("NUM-01", OTHER, "fast") is None
    assert entries.wrong("NUM-01", RoutingSpec(M=1, E=2, top_k=1, dtype="float16"), "fast") is not None
    assert entries.crash(OTHER, "fast") is not None
    assert entries.crash(OTHER, "slow") is None
    assert entries.crash(RoutingSpec(M=1, E=2, top_k=1), "fast") is None
    assert not known(subject="yours").entries
    assert known(subject="mine2").wrong("NUM-01", SPEC, "fast") is not None


def test_from_the_day_of_expiry_on_nothing_is_tolerated():
    entries = known(today=AFTER)
    assert entries.wrong("NUM-01", SPEC, "fast") is None
    assert entries.crash(SPEC, "fast") is None
    assert {row["state"] for row in entries.report(Counter())} == {"expired"}


def settled(ledger, entries, spec, verdicts):
    def tolerated(id):
        entry = entries.wrong(id, spec, "fast")
        return None if entry is None else entry.key()

    ledger.settle(verdicts, spec, "replay", tolerated=tolerated)


def test_a_tolerated_wrong_answer_runs_counts_and_does_not_raise_but_others_do():
    ledger, entries = Ledger(), known()
    settled(ledger, entries, SPEC, [ELEMENT.verdict(False, "off", budget_used=7.0)])
    tally = ledger.tallies["NUM-01"]
    assert (tally.cases, tally.known, tally.violated, tally.budget_used, tally.finding) == (1, 1, 0, None, "")
    with pytest.raises(Finding, match="NUM-02"):
        settled(ledger, entries, SPEC, [ELEMENT.verdict(False, "off"), ROW_RMS.verdict(False, "off")])
    with pytest.raises(Finding, match="NUM-01"):
        settled(ledger, entries, OTHER, [ELEMENT.verdict(False, "off")])


def test_an_entry_that_passes_now_and_one_that_matched_nothing_are_told_apart():
    ledger, entries = Ledger(), known()
    assert [row["state"] for row in entries.report(ledger.known)] == ["unmatched", "unmatched"]
    settled(ledger, entries, SPEC, [ELEMENT.verdict(True)])
    assert entries.report(ledger.known)[0]["state"] == "passes now"
    settled(ledger, entries, SPEC, [ELEMENT.verdict(False)])
    row = entries.report(ledger.known)[0]
    assert (row["state"], row["cases"], row["failed"]) == ("tolerated", 2, 1)


def test_what_ships_here_is_well_formed_and_none_of_it_has_expired_unnoticed_for_a_year():
    for entry in load_known():
        assert (date.today() - entry.expires).days < 366, entry.key()
