"""QUANT tells a wrong quantiser by the property that it breaks, and leaves honest ones alone."""

import pytest
import torch

from moegate.conformance.cases import build_quantize
from moegate.conformance.properties.quant import judge_quantized
from moegate.conformance.strategies import pinned_quantizers
from moegate.conformance.subjects.eager import EagerSubject

SUBJECT = EagerSubject()
SPECS = pinned_quantizers("cpu", SUBJECT.capabilities)


def by_reciprocal(case, values, scales):
    """As honest as a division: x times the rounded reciprocal of the scale."""
    of_elements = _of_elements(case, scales)
    scaled = case.x.float() * (1 / of_elements)
    return _cast(case, scaled), scales


def _of_elements(case, scales):
    if case.how.granularity == "group" and scales.ndim == 2:
        scales = scales.repeat_interleave(case.how.group, dim=1)[:, : case.x.shape[1]]
    return scales.expand(case.x.shape)


def _cast(case, scaled):
    largest = 448 if case.how.dtype == torch.float8_e4m3fn else 127
    scaled = scaled.clamp(-largest, largest)
    return (scaled.round() if case.how.dtype == torch.int8 else scaled).to(case.how.dtype)


def half_away_from_zero(case, values, scales):
    scaled = case.x.float() / _of_elements(case, scales)
    return _cast(case, scaled * (1 + 2.0**-20) + scaled.sign() * 2.0**-12), scales


def one_percent_wide(case, values, scales):
    return values, scales * 1.01


def scale_zero_for_zeros(case, values, scales):
    return values, torch.where(scales == 1, 0.0, scales)


def minus_128(case, values, scales):
    return torch.where(values.float() == values.float().min(), -128.0, values.float()).to(values.dtype), scales


def transposed_scales(case, values, scales):
    return values, scales.reshape(1, -1)


FAULTS = {
    half_away_from_zero: ("QUANT-05", lambda spec: spec.values == "ties"),
    one_percent_wide: ("QUANT-02", lambda spec: True),
    scale_zero_for_zeros: ("QUANT-03", lambda spec: spec.values == "zero_rows" and "group" in spec.quantizer),
    minus_128: ("QUANT-04", lambda spec: spec.quantizer.startswith("int8")),
    transposed_scales: ("QUANT-01", lambda spec: "token" in spec.quantizer),
}


def violated(spec, change):
    case = build_quantize(spec)
    return {v.property.id for v in judge_quantized(case, *change(case, *SUBJECT.quantize(case, ""))) if not v.holds}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_quantiser_is_told_by_its_property(fault):
    property_id, shows = FAULTS[fault]
    specs = [spec for spec in SPECS if shows(spec)]
    assert specs
    for spec in specs:
        assert property_id in violated(spec, fault), spec


@pytest.mark.parametrize("change", [lambda case, *result: result, by_reciprocal], ids=["division", "reciprocal"])
def test_an_honest_quantiser_violates_nothing(change):
    assert [spec for spec in SPECS if violated(spec, change)] == []
