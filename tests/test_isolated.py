"""A subject in a process of its own gives the same results, and what ends it ends one call."""

import stat
import sys
from dataclasses import replace

import pytest
import torch

from moegate.conformance.cases import build_experts
from moegate.conformance.device_errors import DeviceGoneError
from moegate.conformance.guarded import CallError
from moegate.conformance.isolated import Isolated, LoadError
from moegate.conformance.loading import load_subject
from moegate.conformance.spec import ExpertsSpec

MINE = """
import ctypes, os, time

import moegate
import torch

from moegate.conformance.subject import Subject

print("noise at import")
FAULTS = {
    "illegal": torch.AcceleratorError("CUDA error: an illegal memory access was encountered\\nCUDA"),
    "full": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
    "gone": RuntimeError("CUDA error: no CUDA-capable device is detected"),
}


class Mine(Subject):
    name = "mine"
    last_run = str(moegate.__path__[0])
    variants = ("honest", "crashes", "exits", "hangs", "writes", "aliases", "raises", "counts", "poison", *FAULTS)

    def __init__(self):
        self.calls = 0

    def prepare(self, case, variant):
        return {"w2": case.w2.double(), "pid": os.getpid()}

    def experts(self, case, variant):
        print("noise in a call")
        self.calls += 1
        if variant == "crashes":
            ctypes.string_at(0)
        if variant == "exits":
            os._exit(3)
        if variant == "hangs":
            time.sleep(1000)
        if variant in FAULTS:
            raise FAULTS[variant]
        if variant == "raises":
            raise ValueError("no such layer")
        if variant == "writes":
            case.hidden_states[0, 0] = 9.0
        if variant == "aliases":
            return case.hidden_states[1:]
        if variant == "counts":
            return torch.tensor([self.calls, os.getpid()])
        if variant == "poison":
            return torch.empty(5)
        return case.hidden_states @ case.prepared["w2"].float().sum(0).T.sum(0, keepdim=True).T * 1.0
"""
SPEC = ExpertsSpec(M=5, H=16, I=8, E=3, top_k=2, dtype="float32", padded_rows=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("user") / "mine.py"
    file.write_text(MINE)
    return file


@pytest.fixture(scope="module")
def subject(file):
    subject = Isolated(f"{file}:Mine", "cpu", 20.0)
    yield subject
    subject.close()


@pytest.fixture
def case():
    return build_experts(SPEC)


def call(subject, case, variant):
    return subject.experts(replace(case, prepared=subject.prepare(case, variant)), variant)


def test_the_same_bits_come_back_with_what_was_prepared_there(subject, file, case):
    assert torch.equal(call(subject, case, "honest"), call(load_subject(f"{file}:Mine"), case, "honest"))
    assert case.arena.changed() == []


def test_what_it_declares_is_known_here_and_calls_that_do_not_travel_are_not_defined(subject):
    assert (subject.name, subject.variants[0]) == ("mine", "honest")
    assert subject.facets("honest") == ("experts",)
    assert "custom" not in subject.capabilities.scorings


@pytest.mark.parametrize(
    ("variant", "id", "words"),
    [
        ("crashes", "SUBJECT-02", "experts: the process died by SIGSEGV"),
        ("exits", "SUBJECT-02", "experts: the process exited with 3"),
        ("raises", "SUBJECT-01", "experts raised ValueError: no such layer (mine.py:"),
        ("illegal", "SUBJECT-02", "experts left its device unusable: AcceleratorError: CUDA error: an illegal memory"),
        ("full", "SUBJECT-05", "experts asked for 20.00 GiB: OutOfMemoryError: CUDA out of memory. Tried to"),
    ],
)
def test_what_ends_a_call_is_its_verdict_and_the_next_call_runs(subject, case, variant, id, words):
    with pytest.raises(CallError) as caught:
        call(subject, case, variant)
    assert caught.value.verdict.property.id == id
    assert words in caught.value.verdict.detail
    assert call(subject, case, "honest").shape == (5, 1)


def test_a_worker_whose_device_is_broken_is_replaced_and_a_lost_device_is_no_verdict(subject, case):
    first = call(subject, case, "counts")[1]
    with pytest.raises(CallError):
        call(subject, case, "full")
    assert call(subject, case, "counts")[1] == first
    with pytest.raises(CallError):
        call(subject, case, "illegal")
    second = call(subject, case, "counts")[1]
    assert second != first
    with pytest.raises(DeviceGoneError, match="experts: RuntimeError: CUDA error: no CUDA-capable device"):
        call(subject, case, "gone")
    assert call(subject, case, "counts")[1] != second


def test_a_hang_ends_with_its_time_and_the_next_call_runs(file, case):
    subject = Isolated(f"{file}:Mine", "cpu", 1.5)
    with pytest.raises(CallError, match=r"experts: no result after 1\.5 s"):
        subject.experts(case, "hangs")
    assert subject.prepare(case, "honest").number == 1
    subject.close()


def test_what_a_call_writes_and_what_its_result_shares_is_seen_here(subject, case):
    call(subject, case, "writes")
    assert case.arena.changed() == ["hidden_states"]
    assert case.hidden_states[0, 0] == 9
    output = call(subject, case, "aliases")
    assert output.untyped_storage().data_ptr() == case.hidden_states.untyped_storage().data_ptr()
    assert torch.equal(output, case.hidden_states[1:])


def test_a_fresh_subject_was_asked_nothing(subject, case):
    first = call(subject, case, "counts")
    assert torch.equal(call(subject, case, "counts"), first + torch.tensor([1, 0]))
    again = call(subject.fresh(), case, "counts")
    assert again[0] == 1
    assert again[1] != first[1]


def test_allocations_are_poisoned_there_where_they_are_here(subject, case):
    from moegate.conformance.properties.hygiene import poisoned_allocations

    with poisoned_allocations():
        assert call(subject, case, "poison").isnan().all()


def test_another_python_finds_this_moegate_and_nothing_else_of_ours(file, case, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    subject = Isolated(f"{file}:Mine", "cpu", 20.0, str(python))
    assert subject.last_run.startswith(subject._folder.name)
    assert call(subject, case, "honest").shape == (5, 1)
    subject.close()


def test_a_file_that_does_not_load_there_says_why(tmp_path):
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(LoadError, match="does not import: ModuleNotFoundError"):
        Isolated(f"{tmp_path}/broken.py:Mine", "cpu", 5.0)
    (tmp_path / "dies.py").write_text("import os\nos._exit(4)\n")
    with pytest.raises(LoadError, match="its process ended while loading it"):
        Isolated(f"{tmp_path}/dies.py:Mine", "cpu", 5.0)
