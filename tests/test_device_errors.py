"""What a GPU does to a run: a case that breaks it is named, a full memory is a verdict, a lost GPU is none."""

from types import SimpleNamespace
from unittest import SkipTest

import pytest
import torch

from moegate import exit_codes
from moegate.check import _exit_code
from moegate.conformance import report as reports
from moegate.conformance.device_errors import DeviceGoneError, Trouble, asked_for, trouble_of
from moegate.conformance.gpu_watch import GpuWatch, visible_gpus
from moegate.conformance.guarded import CallError, guarded
from moegate.conformance.judge import Finding, Ledger
from moegate.conformance.properties.num import ELEMENT
from moegate.conformance.report_formats import as_junit, as_markdown
from moegate.conformance.session import Session
from moegate.conformance.spec import ExpertsSpec
from moegate.conformance.subject import Subject

ADVICE = "\nCUDA kernel errors might be asynchronously reported at some other API call.\nFor debugging consider"
ILLEGAL = torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{ADVICE}")
FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB, 1.75 GiB is free."
)
GONE = torch.AcceleratorError(f"CUDA error: uncorrectable ECC error encountered{ADVICE}")
SPECS = tuple(ExpertsSpec(M=m, H=16, I=8, E=3, top_k=2, dtype="float32") for m in (1, 2, 3, 4))


class Raises(Subject):
    """Raises an error on the second case that it is given, and on all after it where the error is one of a context."""

    name = "raises"

    def __init__(self, error, lasts=False):
        self.error, self.lasts, self.calls = error, lasts, 0

    def experts(self, case, variant):
        self.calls += 1
        if self.calls == 2 or (self.lasts and self.calls > 2):
            raise self.error
        return case.hidden_states


class AlwaysRaises(Raises):
    def experts(self, case, variant):
        raise self.error


def explored(subject, judge=None):
    """A session that ran four cases, and what the run raised."""
    session = Session(subject, "cpu")
    run = judge or (lambda spec: [ELEMENT.verdict(session.subject.experts(case_of(spec), "default") is not None)])
    raised = None
    try:
        session.explore(None, run, name="DEVICE", variant="default", examples=0, pinned=SPECS)
    except (Finding, SkipTest) as error:
        raised = error
    return session, raised


def case_of(spec):
    return SimpleNamespace(hidden_states=torch.zeros(spec.M, spec.H))


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (ILLEGAL, Trouble.BROKEN),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Trouble.BROKEN),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), Trouble.BROKEN),
        (RuntimeError("CUDA error: device-side assert triggered"), Trouble.BROKEN),
        (RuntimeError("HIP error: unspecified launch failure"), Trouble.BROKEN),
        (FULL, Trouble.FULL),
        (RuntimeError("CUDA error: out of memory"), Trouble.FULL),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"), Trouble.FULL),
        (GONE, Trouble.GONE),
        (RuntimeError("CUDA error: no CUDA-capable device is detected"), Trouble.GONE),
        (RuntimeError("No CUDA GPUs are available"), Trouble.GONE),
        (DeviceGoneError("experts: …"), Trouble.GONE),
        (RuntimeError("CUDA error: invalid argument"), None),
        (RuntimeError("an illegal memory access is what I would call this"), None),
        (ValueError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_an_error_says_what_happened_to_the_device(error, trouble):
    assert trouble_of(error) is trouble


def test_the_size_asked_for_is_read_from_the_error():
    assert asked_for(FULL) == "20.00 GiB"
    assert asked_for(MemoryError("Unable to allocate 7.45 GiB for an array")) == "7.45 GiB"
    assert asked_for(RuntimeError("CUDA error: out of memory")) == "an unknown size"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)  # no machine has it
    assert trouble_of(caught.value) is Trouble.FULL
    assert asked_for(caught.value) == "4503599627370496 bytes"


def test_a_full_memory_is_a_verdict_with_the_size_and_the_next_case_runs():
    session, raised = explored(Raises(FULL))
    assert "SUBJECT-05: a call finds the memory that it asks for\n  experts asked for 20.00 GiB: " in str(raised)
    assert "1.75 GiB is free" in str(raised)
    assert repr(SPECS[1]) in str(raised)
    assert session.ledger.tallies["NUM-01"].cases == 3
    assert not session.lost


def test_an_illegal_access_names_its_case_and_no_other_is_blamed_for_it():
    subject = Raises(ILLEGAL, lasts=True)
    session, raised = explored(subject)
    assert "SUBJECT-02" in str(raised)
    assert "experts left its device unusable: AcceleratorError: CUDA error: an illegal memory" in str(raised)
    assert ADVICE not in str(raised)
    assert session.ledger.tallies["SUBJECT-02"].violated == 1
    assert session.ledger.tallies["SUBJECT-02"].spec == repr(SPECS[1])
    assert subject.calls == 2
    with pytest.raises(SkipTest, match="a case left the GPU of its process unusable"):
        session.explore(None, lambda spec: [], name="LATER", variant="default", examples=0, pinned=SPECS)
    assert session.ledger.skipped[session.lost] == 1


def test_an_illegal_access_that_shows_when_the_suite_reads_the_result_is_of_that_case():
    def judge(spec):
        if spec.M == 3:
            raise ILLEGAL
        return [ELEMENT.verdict(True)]

    session, raised = explored(Raises(None), judge)
    assert "SUBJECT-02" in str(raised)
    assert repr(SPECS[2]) in str(raised)
    assert "the device was unusable after the call" in str(raised)
    assert session.ledger.tallies["NUM-01"].cases == 2


def test_a_gpu_that_is_gone_leaves_no_verdict_and_the_run_inconclusive():
    session, raised = explored(Raises(GONE))
    assert isinstance(raised, SkipTest)
    assert "the device is lost: " in str(raised)
    assert session.ledger.tallies["NUM-01"].cases == 1
    assert not any(tally.violated for tally in session.ledger.tallies.values())
    assert list(session.ledger.inconclusive.values()) == [1]
    assert Ledger.from_dict(session.ledger.as_dict()).inconclusive == session.ledger.inconclusive


def test_operands_of_the_suite_that_do_not_fit_are_no_fault_of_the_subject():
    def judge(spec):
        if spec.M == 2:
            raise FULL
        return [ELEMENT.verdict(True)]

    session, raised = explored(Raises(None), judge)
    assert raised is None
    assert session.ledger.tallies["NUM-01"].cases == 3
    assert session.ledger.inconclusive == {"the suite's own operands did not fit into memory: 20.00 GiB asked for": 1}


def test_other_errors_of_the_suite_stay_what_they_are():
    def judge(spec):
        raise KeyError(spec.M)

    with pytest.raises(KeyError):
        explored(Raises(None), judge)


def test_a_lost_gpu_is_no_error_of_a_guarded_call():
    with pytest.raises(DeviceGoneError, match="experts: AcceleratorError: CUDA error: uncorrectable ECC error"):
        guarded(AlwaysRaises(GONE)).experts(None, "default")
    with pytest.raises(CallError):
        guarded(AlwaysRaises(ILLEGAL)).experts(None, "default")


@pytest.mark.parametrize(("violated", "code"), [(False, exit_codes.INCONCLUSIVE), (True, exit_codes.FINDING)])
def test_an_inconclusive_run_is_never_green_and_hides_no_finding(monkeypatch, violated, code):
    session, _ = explored(Raises(GONE))
    monkeypatch.setattr(reports, "current_session", lambda: session)
    if violated:
        session.ledger.tallies["NUM-01"].violated = 1
    report = reports.as_json(session.ledger, [], [])
    assert report["verdict"] == ("violated" if violated else "inconclusive")
    assert _exit_code(report, 0) == code
    assert "the device is lost: " in report["inconclusive"][0]
    assert 'type="inconclusive"' in as_junit(report)
    assert "**inconclusive**: the device is lost" in as_markdown(report)


class Nvml:
    """Answers as pynvml does; `reasons` by the number of the look, an exception where one is due."""

    class NVMLError_GpuIsLost(Exception):  # noqa: N801 pynvml's name
        pass

    def __init__(self, *reasons):
        self.reasons = iter(reasons)

    def nvmlDeviceGetHandleByIndex(self, number):
        return number

    def nvmlDeviceGetHandleByUUID(self, name):
        raise ValueError(name)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        reason = next(self.reasons)
        if isinstance(reason, Exception):
            raise reason
        return reason


@pytest.mark.parametrize(
    ("reasons", "complaints"),
    [
        ((0x1, 0x4, 0), []),  # idle, and a cap on power: how these GPUs always run
        ((0, 0x40, 0x40), ["GPU 0 slowed itself down: heat (hardware)"]),
        ((0x88, 0, 0), ["GPU 0 slowed itself down: hardware slowdown", "GPU 0 slowed itself down: power brake"]),
        ((0, Nvml.NVMLError_GpuIsLost("GPU is lost"), 0), ["GPU 0 is no longer there (GPU is lost)"]),
        ((0, RuntimeError("Insufficient Permissions"), 0), []),
    ],
)
def test_a_gpu_that_slows_itself_down_or_goes_is_seen_once(reasons, complaints):
    watch = GpuWatch(Nvml(*reasons), ["0"])
    for _ in range(3):
        watch.look()
    assert watch.complaints() == complaints


def test_where_nobody_knows_nothing_is_complained_of():
    for watch in (GpuWatch(None, ["0"]), GpuWatch(Nvml(), ["MIG-1"]), GpuWatch.of_this_machine([])):
        watch.look()
        assert watch.complaints() == []


def test_the_gpus_watched_are_those_that_the_run_may_use(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-1")
    assert visible_gpus(2) == ["3", "GPU-1"]
