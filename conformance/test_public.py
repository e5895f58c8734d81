import os
import zlib
from tempfile import TemporaryDirectory

import pytest

from moegate.conformance.properties.public import judge_public_call
from moegate.conformance.spec import Spec

# A fault is looked for among few calls; a call's part is its name's, so that one that joins moves no other.
PARTS = 64


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
    for call in subject.public():
        if zlib.crc32(call.name.encode()) % PARTS != part:
            continue
        # What a call writes below the working directory is seen there.
        with TemporaryDirectory(prefix="moegate-") as folder:
            os.chdir(folder)
            try:
                verdicts = judge_public_call(call, trace)
            finally:
                os.chdir(before)
        session.settle(verdicts, Spec(), f"{session.command()} --select public_calls")
