import os
from tempfile import TemporaryDirectory

import pytest

from moegate.conformance.properties.public import judge_public_call
from moegate.conformance.spec import Spec

# The calls in their order, cut in so many parts: a fault is then looked for among few of them.
PARTS = 24


@pytest.mark.moegate_facets("public")
@pytest.mark.parametrize("part", range(PARTS))
def test_public_calls_are_taken_answered_and_refused_by_name(moegate_session, part):
    session, subject = moegate_session, moegate_session.subject
    facets = subject.facets(subject.variants[0])
    if "public" not in facets:
        reason = f"{subject.name} does not define public"
        session.ledger.skipped[reason] += 1
        pytest.skip(reason)
    trace = subject.trace if "trace" in facets else None
    before = os.getcwd()
    calls = subject.public()
    for call in calls[part * len(calls) // PARTS : (part + 1) * len(calls) // PARTS]:
        # What a call writes below the working directory is seen there.
        with TemporaryDirectory(prefix="moegate-") as folder:
            os.chdir(folder)
            try:
                verdicts = judge_public_call(call, trace)
            finally:
                os.chdir(before)
        session.settle(verdicts, Spec(), f"{session.command()} --select public_calls")
