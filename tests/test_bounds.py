"""An access outside a kernel's arguments is reported, each time in the same words, as a property of the subject."""

import numpy
import pytest
import torch

from moegate.conformance import interpreter
from moegate.conformance.bounds import Memory, OutOfBoundsError, cause_of
from moegate.conformance.cases import build_experts
from moegate.conformance.guarded import CallError, guarded
from moegate.conformance.loading import load_subject
from moegate.conformance.spec import ExpertsSpec
from moegate.conformance.subject import Subject
from moegate.impl.platform import Platform

# A subject whose second kernel writes one row more than there are, as a fault of a mask does.
PLANTED = """
import torch
import triton
import triton.language as tl

from moegate.conformance.numerics import Numerics
from moegate.conformance.subject import Capabilities, Subject


@triton.jit
def planted_kernel(x, out, rows, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + tl.minimum(row, rows - 1) * H + column, mask=column < H)
    tl.store(out + row * H + column, value, mask=column < H)


class Planted(Subject):
    name = "planted"
    capabilities = Capabilities(dtypes=("float32",), maps=("none",), padded_rows=False)
    numerics = Numerics()

    def experts(self, case, variant):
        x = case.hidden_states.contiguous()
        out = torch.empty_like(x)
        rows, width = x.shape
        planted_kernel[(rows + 1,)](x, out, rows, H=width, BLOCK=triton.next_power_of_2(width))
        return out
"""


@pytest.fixture
def memory():
    """Two arguments of 64 bytes, 64 bytes apart, and one inside the first."""
    whole = numpy.zeros(192, numpy.uint8)
    first, second = torch.from_numpy(whole[:64]), torch.from_numpy(whole[128:])
    return Memory("kernel", {"first": first, "second": (second, 3), "again": torch.from_numpy(whole[16:32])}), whole


def addresses(whole, *offsets):
    return whole.ctypes.data + numpy.array(offsets, dtype=numpy.uint64)


def test_lanes_in_several_arguments_are_allowed_and_one_between_them_is_not(memory):
    memory, whole = memory
    memory.check("reads", addresses(whole, 0, 60, 128, 188), None, 4)
    with pytest.raises(OutOfBoundsError, match="1 of 2 active lanes"):
        memory.check("reads", addresses(whole, 0, 64), None, 4)
    with pytest.raises(OutOfBoundsError, match=r"up to 3 bytes before the start of second\[0\]"):
        memory.check("writes", addresses(whole, 0, 125), None, 1)


def test_an_element_that_begins_inside_and_ends_outside_is_outside(memory):
    memory, whole = memory
    memory.check("writes", addresses(whole, 62), None, 2)
    with pytest.raises(OutOfBoundsError, match="up to 2 bytes behind the end of first, whose memory has 64 bytes; one"):
        memory.check("writes", addresses(whole, 62), None, 4)


def test_only_active_lanes_count(memory):
    memory, whole = memory
    lanes = addresses(whole, 0, 64, 100, 4)
    memory.check("reads", lanes, numpy.array([True, False, False, True]), 4)
    memory.check("reads", lanes, numpy.zeros(4, dtype=bool), 4)
    with pytest.raises(OutOfBoundsError, match=r"up to 28 bytes before the start of second.*1 of 3 active lanes"):
        memory.check("reads", lanes, numpy.array([True, False, True, True]), 4)


def test_what_has_an_unknown_length_silences_the_check():
    class Pointer:
        def data_ptr(self):
            return 4096

    memory = Memory("kernel", {"x": torch.zeros(4), "y": Pointer()})
    memory.check("writes", numpy.array([8], dtype=numpy.uint64), None, 4)


def test_the_cause_is_found_through_other_errors():
    outside = OutOfBoundsError("there")
    wrapped = RuntimeError("a layer's own")
    wrapped.__cause__ = outside
    assert cause_of(wrapped) is outside
    assert cause_of(ValueError("here")) is None


def test_a_call_that_leaves_its_memory_violates_the_property_of_that():
    class Outside(Subject):
        name = "outside"

        def experts(self, case, variant):
            raise OutOfBoundsError("kernel writes 4 bytes outside its arguments")

    with pytest.raises(CallError) as caught:
        guarded(Outside()).experts(None, "default")
    assert caught.value.verdict.property.id == "SUBJECT-06"
    assert caught.value.verdict.detail == "experts: kernel writes 4 bytes outside its arguments"


@pytest.mark.skipif(not Platform.of("cpu").interpreted, reason="kernels are compiled here: TRITON_INTERPRET=1")
def test_a_planted_store_out_of_bounds_is_reported_each_time_in_the_same_words(tmp_path):
    interpreter.install()
    (tmp_path / "planted.py").write_text(PLANTED)
    subject = guarded(load_subject(f"{tmp_path}/planted.py:Planted"))
    case = build_experts(ExpertsSpec(M=3, H=40, I=8, E=3, top_k=2, dtype="float32"))
    said = set()
    for _ in range(20):
        with pytest.raises(CallError) as caught:
            subject.experts(case, "default")
        assert caught.value.verdict.property.id == "SUBJECT-06"
        said.add(caught.value.verdict.detail)
    assert said == {
        "experts: planted_kernel writes 4 bytes outside its arguments: up to 160 bytes behind the end of out, whose "
        "memory has 480 bytes; 40 of 40 active lanes (planted.py:15)"
    }
