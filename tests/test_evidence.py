"""Evidence names the token, the expert, the column and the tile, and says what the numbers are."""

import json
import math

import pytest
import torch

from moegate.conformance.cases import build_experts
from moegate.conformance.evidence import evidence_of
from moegate.conformance.properties.num import ELEMENT, budget_of, judge_values, reference_of
from moegate.conformance.spec import ExpertsSpec
from moegate.conformance.subjects.eager import EagerSubject

SPEC = ExpertsSpec(M=40, H=64, I=32, E=3, top_k=2, dtype="float32", weights="softmax")
CASE = build_experts(SPEC)
TRACE = reference_of(CASE)


def evidence(output):
    subject = EagerSubject()
    verdicts = judge_values(CASE, output, TRACE, budget_of(CASE, TRACE, subject.numerics))
    found = next(verdict for verdict in verdicts if verdict.property is ELEMENT).evidence
    assert found is not None
    return found


def without(expert, times=0.0):
    """The right output, but for one expert's share, which is there `times` times."""
    mine = (TRACE.local_ids == expert)[..., None]
    shares = TRACE.output_weights[..., None] * TRACE.expert_output
    return (TRACE.output + (times - 1) * (shares * mine).sum(dim=1)).float()


@pytest.mark.parametrize("expert", range(3))
def test_a_lost_expert_is_named_with_the_tile_among_its_tokens(expert):
    found = evidence(without(expert))
    blame = found.blame
    assert blame is not None
    assert expert in found.experts[1]
    assert blame.expert == expert
    assert blame.share == pytest.approx(-1, abs=1e-3)
    mine = (TRACE.local_ids == expert).any(dim=1)
    row = int(mine[: found.token].sum())
    assert (blame.row, blame.first_row) == (row, row // 16 * 16)
    assert blame.first_column == found.column // 16 * 16
    assert f"local {expert}, which is lost" in found.text()


def test_an_expert_counted_one_and_a_half_times_is_said_so():
    assert "whose share is 1.5 times there" in evidence(without(1, times=1.5)).text()


def test_noise_is_blamed_on_no_expert():
    noise = torch.randn(TRACE.output.shape, generator=torch.Generator().manual_seed(1))
    assert "no single one explains the row's error" in evidence((TRACE.output + noise).float()).text()


def test_not_a_number_infinities_zeros_and_the_rows_gain_are_counted():
    output = 2 * TRACE.output.float()
    output[3, :5] = 0
    assert evidence(output).zero == 5
    assert evidence(2 * TRACE.output.float()).row_gain == pytest.approx(2)
    output[7, 11], output[8, 12] = math.nan, math.inf
    found = evidence(output)
    assert (found.nan, found.infinite) == (1, 1)
    assert (found.token, found.column) in ((7, 11), (8, 12))
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_row_that_should_be_zero_has_no_gain_and_no_expert_to_blame():
    zero = torch.zeros(2, 4)
    found = evidence_of(zero + 1, zero, torch.full((2, 4), 9.0))
    assert (found.row_gain, found.blame) == (None, None)
    assert "gain of the row -" in found.text()
