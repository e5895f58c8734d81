import pytest

from moegate.conformance.cases import build_quantize
from moegate.conformance.properties.hygiene import poisoned_allocations
from moegate.conformance.properties.quant import judge_quantized
from moegate.conformance.strategies import pinned_quantizers, quantize_specs

EXAMPLES = 100
pytestmark = [pytest.mark.moegate_facets("quantize"), pytest.mark.moegate_executions(EXAMPLES, 1)]


def test_activations_are_quantised_as_their_format_says(moegate_session, moegate_variant):
    session, variant = moegate_session, moegate_variant
    capabilities = session.subject.capabilities
    if not capabilities.quantizers:
        pytest.skip(f"{session.subject.name} declares no scheme that quantises activations")

    def judge(spec):
        case = build_quantize(spec, session.device)
        with poisoned_allocations():
            values, scales = session.subject.quantize(case, variant)
        return judge_quantized(case, values, scales)

    session.explore(
        quantize_specs(session.device, capabilities),
        judge,
        name=f"QUANT/{variant}",
        variant=variant,
        examples=EXAMPLES,
        pinned=pinned_quantizers(session.device, capabilities),
    )
