"""A failure's line is its replay, and nothing in it is run."""

import dataclasses
import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moegate.conformance.cases import build_routing
from moegate.conformance.spec import AlignSpec, ExpertsSpec, RoutingSpec, parse_spec
from moegate.conformance.strategies import align_specs, experts_specs, routing_specs
from moegate.conformance.subject import ROUTING_METHODS, Capabilities

STRATEGIES = product((routing_specs, align_specs, experts_specs), ("cpu", "cuda"))


@given(st.one_of(*(draw(device, Capabilities(**ROUTING_METHODS)) for draw, device in STRATEGIES)))
def test_the_line_of_a_spec_reads_back_as_the_spec(spec):
    assert parse_spec(repr(spec)) == spec
    assert parse_spec(f"  {spec!r}\n") == spec


def test_what_a_line_leaves_out_has_its_default():
    assert parse_spec("AlignSpec(M=1, E=2, top_k=1)") == AlignSpec(M=1, E=2, top_k=1)


def test_a_line_of_a_kind_of_another_module_is_read_before_anything_else_is_imported():
    line = "LoraSpec(M=9, H=96, I=16, E=5, top_k=2)"
    read = f"from moegate.conformance.spec import parse_spec; print(type(parse_spec({line!r})).__name__)"
    found = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == line.partition("(")[0], found.stderr


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("__import__('os').system('true')", "__import__"),
        ("AlignSpec(M=__import__('os').getpid(), E=2, top_k=1)", "M"),
        ("AlignSpec(M=n, E=2, top_k=1)", "got n"),
        ("AlignSpec(M=1 if True else 2, E=2, top_k=1)", "M"),
        ("AlignSpec(M=1, E=2, top_k=1, colour='red')", "colour"),
        ("AlignSpec(**{'M': 1})", "None"),
        ("AlignSpec(1, 2, 1)", "named fields"),
        ("AlignSpec(M=1)", "top_k"),
        ("AlignSpec(M=1, M=2, E=2, top_k=1)", "M again"),
        ("OtherSpec(M=1)", "ExpertsSpec"),
        ("os.AlignSpec(M=1, E=2, top_k=1)", "AlignSpec"),
        ("M=1", "M=1"),
        ("", "spec"),
        ("[1, 2]", "RoutingSpec"),
    ],
)
def test_whatever_is_no_spec_is_refused_by_name(line, named):
    with pytest.raises(ValueError, match="spec: ") as refusal:
        parse_spec(line)
    assert named in str(refusal.value)


@pytest.mark.parametrize("cls", [RoutingSpec, AlignSpec, ExpertsSpec])
def test_a_spec_is_small_frozen_and_plain(cls):
    spec = cls(**{f.name: 1 for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING})
    assert hash(spec) == hash(dataclasses.replace(spec))
    assert all(isinstance(value, int | str | bool) for value in vars(spec).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.M = 2


def test_feature_pairs_are_pairs_of_features_and_not_of_sizes():
    pairs = set(AlignSpec(M=3, E=4, top_k=2, routing="tile", expert_map="linear").feature_pairs())
    assert pairs == {("expert_map=linear", "routing=tile")}


@pytest.mark.parametrize(
    ("groups", "num_experts", "counts", "most"),
    [
        ("none", 257, (1, 1), 257),
        ("some", 128, (8, 4), 64),
        ("some", 60, (6, 3), 30),
        ("one_kept", 60, (6, 1), 10),
        ("all_kept", 8, (4, 4), 8),
        ("some", 257, (0, 0), 0),
        ("singletons", 5, (5, 3), 3),
        ("one_group", 7, (1, 1), 7),
    ],
)
def test_the_names_of_groups_mean_numbers_of_groups(groups, num_experts, counts, most):
    spec = RoutingSpec(M=1, E=num_experts, top_k=1, groups=groups)
    assert (spec.group_counts(), spec.most_choices()) == (counts, most)


@pytest.mark.parametrize(
    "method",
    [
        {"groups": "singletons", "group_ranking": "top2_sum"},
        {"groups": "none", "group_ranking": "top2_sum"},
        {"scoring": "custom", "groups": "some"},
        {"scoring": "custom", "correction_bias": "unit"},
        {"groups": "one_kept", "top_k": 3},
    ],
)
def test_a_routing_whose_features_do_not_go_together_is_refused(method):
    with pytest.raises(ValueError, match="spec: expected top_k of at most"):
        build_routing(RoutingSpec(**({"M": 1, "E": 8, "top_k": 1} | method)))
