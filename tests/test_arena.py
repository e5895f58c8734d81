"""Hostile memory: what surrounds an operand is poison, and every write to it is seen."""

import pytest
import torch

from moegate.conformance.arena import MARGIN_BYTES, Arena, poison
from moegate.conformance.cases import build_experts
from moegate.conformance.spec import ExpertsSpec

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.int8, torch.uint8]


def whole_of(view):
    """The arena behind an operand, flat."""
    return torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())


def is_poison(values):
    return values.isnan() if values.is_floating_point() else values == poison(values.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_margins_and_row_padding_are_poison_and_the_operand_is_not(dtype):
    values = torch.arange(3 * 4 * 5).view(3, 4, 5).to(dtype)
    view = Arena().place("w13", values, row_padding=8)
    assert torch.equal(view, values)
    margin = MARGIN_BYTES // view.element_size()
    whole = whole_of(view)
    assert whole.numel() == 2 * margin + 3 * (4 + 16) * 13
    assert is_poison(whole[:margin]).all()
    assert is_poison(whole[-margin:]).all()
    rows = whole[margin:-margin].view(3, 20, 13)
    assert torch.equal(rows[:, :4, :5], values)
    assert is_poison(rows[:, :4, 5:]).all()
    assert is_poison(rows[:, 4:]).all()


def test_the_poison_of_fp8_is_its_nan():
    view = Arena().place("w13", torch.ones(2, 3).to(torch.float8_e4m3fn), row_padding=16)
    whole = whole_of(view)
    assert (whole[:MARGIN_BYTES].view(torch.uint8) == 0x7F).all()
    assert whole[:MARGIN_BYTES].float().isnan().all()


def test_scales_zero_points_static_scales_and_biases_of_a_case_lie_in_its_arena():
    for scheme, shape in (("int4_group_zp", (32, 32, 0, 16)), ("fp8_tensor_static", (32, 16, 0, 0))):
        h, i, bn, bk = shape
        case = build_experts(
            ExpertsSpec(M=3, H=h, I=i, E=2, top_k=1, scheme=scheme, block_n=bn, block_k=bk, bias="both")
        )
        names = {"w13", "w2", "w13_bias", "w2_bias", "w13_scale", "w2_scale"}
        names |= {"w13_zero_point", "w2_zero_point"} if "zp" in scheme else {"a13_scale", "a2_scale"}
        assert names < set(case.tensors())
        for name in names:
            operand = case.tensors()[name]
            margin = whole_of(operand)[: MARGIN_BYTES // operand.element_size()]
            assert is_poison(margin.float() if operand.is_floating_point() else margin).all(), name
            operand.view(torch.uint8).flatten()[0] ^= 1
        assert set(case.arena.changed()) == names


@pytest.mark.parametrize(("shape", "padding", "strides"), [
    ((7,), 0, (1,)),
    ((3, 5), 0, (5, 1)),
    ((3, 5), 24, (29, 1)),
    ((2, 3, 5), 0, (15, 5, 1)),
    ((2, 3, 5), 24, (19 * 29, 29, 1)),
])  # fmt: skip
def test_strides_are_those_of_rows_of_the_padded_width_with_more_rows_a_matrix(shape, padding, strides):
    view = Arena().place("x", torch.zeros(shape), row_padding=padding)
    assert view.stride() == strides
    assert view.is_contiguous() == (padding == 0)


@pytest.mark.parametrize(
    "offset",
    [0, 1, -1, 5, -MARGIN_BYTES // 4, 3 * 13 + MARGIN_BYTES // 4 - 1],
    ids=["operand", "its_second_value", "just_before", "row_padding", "first_of_the_arena", "last_of_the_arena"],
)
def test_a_write_anywhere_in_the_arena_is_seen(offset):
    arena = Arena()
    view = arena.place("hidden_states", torch.zeros(3, 5), row_padding=8)
    arena.place("w2", torch.zeros(2, 2))
    assert arena.changed() == []
    whole_of(view)[MARGIN_BYTES // 4 + offset] = 1.0
    assert arena.changed() == ["hidden_states"]


def test_another_nan_in_the_margin_is_a_write_too():
    arena = Arena()
    view = arena.place("x", torch.zeros(4))
    whole_of(view).view(torch.int32)[0] = 0x7FC0_0001
    assert arena.changed() == ["x"]


def test_a_buffer_that_is_meant_to_be_written_is_not_held():
    arena = Arena()
    arena.place("out", torch.zeros(4), fixed=False).fill_(1)
    assert arena.changed() == []


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (2, 0, 4)], ids=str)
def test_an_operand_without_elements_still_has_its_margins(shape):
    arena = Arena()
    view = arena.place("x", torch.zeros(shape), row_padding=8)
    assert view.shape == shape
    assert whole_of(view).numel() >= 2 * MARGIN_BYTES // 4
    assert is_poison(whole_of(view)).all()
    whole_of(view)[0] = 0
    assert arena.changed() == ["x"]


def test_every_operand_of_a_case_lies_in_an_arena():
    case = build_experts(ExpertsSpec(M=3, H=16, I=8, E=4, top_k=2, expert_map="linear", padded_rows=True))
    for name in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "expert_map"):
        operand = getattr(case, name)
        assert is_poison(whole_of(operand)[: MARGIN_BYTES // operand.element_size()]).all(), name
        if name in ("hidden_states", "w13", "w2"):
            assert operand.stride(-2) > operand.shape[-1], name
    case.w13[0, 0, 0] += 1
    assert case.arena.changed() == ["w13"]
