import os
from tempfile import TemporaryDirectory

import pytest

from moegate.conformance.properties.public import judge_public_call
from moegate.conformance.spec import Spec


@pytest.mark.moegate_facets("public")
def test_public_calls_are_taken_answered_and_refused_by_name(moegate_session, moegate_variant):
    session, subject = moegate_session, moegate_session.subject
    if moegate_variant != next(v for v in session.variants() if "public" in subject.facets(v)):
        pytest.skip("public calls are the same whatever computes the experts")
    trace = subject.trace if "trace" in subject.facets(moegate_variant) else None
    before = os.getcwd()
    for call in subject.public():
        # What a call writes below the working directory is seen there.
        with TemporaryDirectory(prefix="moegate-") as folder:
            os.chdir(folder)
            try:
                verdicts = judge_public_call(call, trace)
            finally:
                os.chdir(before)
        session.settle(verdicts, Spec(), f"{session.command()} --select public_calls")
