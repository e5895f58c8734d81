from dataclasses import replace

import pytest
import torch

from moegate.conformance.properties.graph import (
    FIRST,
    Calls,
    judge_eager,
    judge_fewer_tokens,
    judge_replays,
    judge_streams,
)
from moegate.conformance.shared_cases import build_shared, shared_specs

EXAMPLES, EAGER_EXAMPLES = 10, 6


def _calls(subject, variant):
    return Calls(
        prepare=lambda case: subject.capture(case, variant),
        eager=lambda case: subject.shared(case, variant, overlapped=False, hold=None),
    )


def _cases(spec, session, count):
    """Cases of the same sizes with other contents."""
    return [build_shared(replace(spec, seed=(spec.seed + 7 * own) % 256), session.device) for own in range(count)]


def _explore(session, variant, judge, *, name, examples, runs):
    session.explore(
        # A graph without kernels is none, and without two tokens there are no fewer.
        shared_specs(session.device, session.subject.capabilities).map(lambda spec: replace(spec, M=max(2, spec.M))),
        judge,
        name=f"{name}/{variant}",
        variant=variant,
        examples=examples,
        runs=runs,
    )


def _skip_without_graphs(session):
    if session.device not in FIRST.devices:
        pytest.skip("CUDA graphs need a GPU")


@pytest.mark.moegate_facets("capture", "shared")
@pytest.mark.moegate_executions(EXAMPLES, 12)
def test_a_graph_replays_what_lies_in_its_operands(moegate_session, moegate_variant):
    session, calls = moegate_session, _calls(moegate_session.subject, moegate_variant)
    _skip_without_graphs(session)

    def judge(spec):
        case, *donors = _cases(spec, session, 3)
        return judge_replays(case, donors, calls)

    _explore(session, moegate_variant, judge, name="GRAPH", examples=EXAMPLES, runs=12)


@pytest.mark.moegate_facets("capture", "shared")
@pytest.mark.moegate_executions(EXAMPLES, 5)
def test_a_graph_replays_fewer_tokens(moegate_session, moegate_variant):
    session, subject = moegate_session, moegate_session.subject
    _skip_without_graphs(session)

    def judge(spec):
        (case,) = _cases(spec, session, 1)
        return judge_fewer_tokens(
            case,
            max(1, spec.M // 2),
            _calls(subject, moegate_variant),
            subject.numerics,
            takes_invalid="some_invalid" in subject.capabilities.routings,
        )

    _explore(session, moegate_variant, judge, name="PADDED", examples=EXAMPLES, runs=5)


@pytest.mark.moegate_facets("capture", "shared")
@pytest.mark.moegate_executions(EXAMPLES, 18)
def test_two_graphs_replay_on_two_streams(moegate_session, moegate_variant):
    session, calls = moegate_session, _calls(moegate_session.subject, moegate_variant)
    _skip_without_graphs(session)

    def judge(spec):
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        return judge_streams(_cases(spec, session, 2), calls, streams)

    _explore(session, moegate_variant, judge, name="STREAMS", examples=EXAMPLES, runs=18)


@pytest.mark.moegate_facets("capture", "shared")
@pytest.mark.moegate_executions(EAGER_EXAMPLES, 5)
def test_operands_changed_in_place_are_read_anew(moegate_session, moegate_variant):
    session, calls = moegate_session, _calls(moegate_session.subject, moegate_variant)

    def judge(spec):
        case, donor = _cases(spec, session, 2)
        return [judge_eager(case, donor, calls)]

    _explore(session, moegate_variant, judge, name="EAGER", examples=EAGER_EXAMPLES, runs=5)
