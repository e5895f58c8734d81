import pytest

from moegate.conformance.properties.api import BAD_CALLS, judge_bad_call
from moegate.conformance.properties.api_edges import EDGE_CALLS, judge_edge_call
from moegate.conformance.spec import Spec

FACET_OF_FUNCTION = {"moe_align_block_size": "align", "batched_experts": "batched"}
pytestmark = pytest.mark.moegate_facets("api")


def _functions(session, variant, call):
    functions = session.subject.api()
    missing = [name for name in call.needs if name not in functions]
    if missing:
        pytest.skip(f"{session.subject.name} does not declare {missing[0]}")
    facet = FACET_OF_FUNCTION.get(call.function, "api")
    if facet not in session.subject.facets(variant):
        pytest.skip(f"{session.subject.name} ({variant}) does not define {facet}")
    return functions


@pytest.mark.parametrize("call", EDGE_CALLS, ids=str)
def test_the_edge_of_what_is_allowed_is_taken(moegate_session, moegate_variant, call):
    session, functions = moegate_session, _functions(moegate_session, moegate_variant, call)
    session.settle(judge_edge_call(call, functions, session.device), Spec(), f"{session.command()} --select '{call}'")


@pytest.mark.parametrize("call", BAD_CALLS, ids=str)
def test_bad_input_is_refused_by_name(moegate_session, moegate_variant, call):
    session, functions = moegate_session, _functions(moegate_session, moegate_variant, call)
    session.settle(judge_bad_call(call, functions, session.device), Spec(), f"{session.command()} --select '{call}'")
