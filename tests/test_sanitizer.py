"""What compute-sanitizer prints is read and named; what it cannot do is never clean. On a GPU: the tools themselves.

The outputs are in the tool's own form, written down here; `python -m pytest -m sanitizer` runs the real one.
"""

import json
import os
import sys
import time
from itertools import product

import pytest
import torch

from moegate.conformance import interpreter, sanitizer
from moegate.conformance.bounds import CHECKED, OutOfBoundsError
from moegate.conformance.loading import load_subject
from moegate.conformance.sanitized import CASES, SUBJECTS, is_defined, plant, run_case
from moegate.conformance.sanitizer import MARK, TOOLS, Ended, check, check_all, main, parse, prove
from moegate.conformance.session import Session
from moegate.impl.platform import Platform

needs_interpreter = pytest.mark.skipif(
    not Platform.of("cpu").interpreted, reason="kernels are compiled here: TRITON_INTERPRET=1"
)
MEMCHECK = f"""\
========= COMPUTE-SANITIZER
{MARK}few pairs, naive blocks (triton)
{{"case": "few pairs, naive blocks", "variant": "triton", "judged": 5, "violated": []}}
{MARK}aligned blocks with tails (triton)
========= Invalid __global__ write of size 4 bytes
=========     at grouped_gemm_kernel+0x1a20 in /opt/moegate/impl/kernels/grouped_gemm.py:118
=========     by thread (31,0,0) in block (2,0,0)
=========     Access to 0x7f2b5a000200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2b5a000000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx [0x30b1b4] in libcuda.so.1
=========
========= Invalid __shared__ read of size 16 bytes
=========     at 0x120 in /opt/old/file.cu:34:unaligned_kernel(float4 *)
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7 is misaligned
=========
========= Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "unspecified launch failure" on CUDA API call to x.
=========     Saved host backtrace up to driver entry point at error
=========
========= Target application returned an error
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = f"""\
========= COMPUTE-SANITIZER
{MARK}adapters (triton)
========= Error: Race reported between Write access at lora_shrink_kernel(float *, int)+0x50 in lora_shrink.py:12
=========     and Read access at lora_shrink_kernel(float *, int)+0xa0 in lora_shrink.py:19 [508 hazards]
=========
========= Warning: Race reported between Read access at other<int>(int *)+0x50 in other.cu:1
=========     and Write access at other<int>(int *)+0xa0 in other.cu:2 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
INITCHECK = f"""\
========= COMPUTE-SANITIZER
{MARK}slabs (triton)
========= Uninitialized __global__ memory read of size 2 bytes
=========     at activation_kernel+0x70 in activation.py:88
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f2b5a000000
=========
========= ERROR SUMMARY: 1 error
"""
COPIED = f"""\
========= COMPUTE-SANITIZER
{MARK}slabs (triton)
========= Host API memory access error at host access to 0x7f2511b45400 of size 3,072 bytes
=========     Uninitialized access to 0x7f2511b454a0 on access by cudaMemcpy source
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: cudaMemcpyAsync [0x70eec] in libcudart.so.13
=========
========= ERROR SUMMARY: 1 error
"""
SYNCCHECK = f"""\
========= COMPUTE-SANITIZER
{MARK}routing (triton)
========= Barrier error detected. Divergent thread(s) in block
=========     at topk_routing_kernel+0x310 in topk_routing.py:40
=========     by thread (32,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
CLEAN = f"""\
========= COMPUTE-SANITIZER
{MARK}routing (triton)
{{"case": "routing", "variant": "triton", "judged": 8, "violated": []}}
========= ERROR SUMMARY: 0 errors
"""
UNSUPPORTED = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
=========
"""
PLANTED = f"""\
========= COMPUTE-SANITIZER
{MARK}planted
========= Invalid __global__ write of size 4 bytes
=========     at planted_kernel+0x90 in sanitized.py:208
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x7f2b5a000200 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""


def runs(*outputs):
    """A stand-in for children: each output, or (output, status), in turn; the commands are kept."""
    queue, commands = list(outputs), []

    def run(command, environment, seconds):
        commands.append((command, environment))
        output, status = queue.pop(0) if isinstance(queue[0], tuple) else (queue.pop(0), 0)
        return Ended(output, status, 1.0)

    run.commands = commands
    return run


def test_invalid_accesses_have_their_kernel_line_and_case():
    first, second, third = parse(MEMCHECK, "memcheck").findings
    assert (first.kind, first.kernel, first.where) == ("invalid access", "grouped_gemm_kernel", "grouped_gemm.py:118")
    assert first.case == "aligned blocks with tails (triton)"
    assert "and is 1 bytes after the nearest allocation at 0x7f2b5a000000 of size 512 bytes" in first.text
    assert "Host Frame" not in first.text
    assert (second.kind, second.kernel, second.where) == ("invalid access", "unaligned_kernel", "file.cu:34")
    assert (third.kind, third.kernel) == ("error of the driver", "")
    assert str(first).startswith(
        "memcheck: invalid access in grouped_gemm_kernel (grouped_gemm.py:118), case 'aligned blocks with tails"
    )


@pytest.mark.parametrize(
    ("output", "tool", "expected"),
    [
        (
            RACECHECK,
            "racecheck",
            [("race", "lora_shrink_kernel", "lora_shrink.py:12"), ("race", "other", "other.cu:1")],
        ),
        (INITCHECK, "initcheck", [("uninitialised read", "activation_kernel", "activation.py:88")]),
        (COPIED, "initcheck", [("copy of uninitialised memory", "", "")]),
        (SYNCCHECK, "synccheck", [("barrier", "topk_routing_kernel", "topk_routing.py:40")]),
        (CLEAN, "memcheck", []),
    ],
    ids=("racecheck", "initcheck", "initcheck of a copy", "synccheck", "memcheck"),
)
def test_each_tools_findings_are_read(output, tool, expected):
    parsed = parse(output, tool)
    assert [(each.kind, each.kernel, each.where) for each in parsed.findings] == expected
    assert not parsed.failed
    assert not parsed.unsupported


def test_errors_in_a_form_that_nobody_knows_still_count():
    (finding,) = parse(
        "========= Something new in block (0,0,0)\n=========\n========= ERROR SUMMARY: 2 errors\n", "memcheck"
    ).findings
    assert finding.text == "2 errors in the tool's summary, in a form that is not known here"


def test_a_violated_property_under_a_tool_is_a_finding():
    row = {"case": "slabs", "variant": "triton", "judged": 5, "violated": ["NUM-01: token 0"]}
    outcome = check("cs", "memcheck", (), 60, runs((f"{MARK}slabs\n{json.dumps(row)}\n", 1), CLEAN))
    assert outcome.violated == ["memcheck: slabs (triton): NUM-01: token 0"]
    assert outcome.code == sanitizer.FINDING


def test_a_clean_run_counts_its_cases_and_is_proved_first():
    run = runs((PLANTED, sanitizer.FOUND), *[CLEAN] * 8)
    outcome = check_all("cs", TOOLS, ("mine.py:Mine",), 60, run)
    assert outcome.code == sanitizer.HOLDS
    assert outcome.cases == dict.fromkeys(TOOLS, 2)
    (proof, _), *others = run.commands
    assert "--planted" in proof
    # The tools run side by side: whose child is started first is chance.
    started = {tool: ["--caching" in command for command, _ in others if command[2] == tool] for tool in TOOLS}
    assert started == {tool: [False, True] for tool in TOOLS}
    for command, environment in others:
        assert ("--caching" in command) != (environment.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1")
        assert environment["TRITON_INTERPRET"] == "0"


CRASHED = (CLEAN + "Segmentation fault", 11)


def test_a_tool_that_crashes_beside_the_others_is_run_once_more_alone(capsys):
    run = runs((PLANTED, sanitizer.FOUND), CRASHED, CLEAN, CLEAN, CLEAN)
    outcome = check_all("cs", TOOLS[:1], (), 60, run)
    assert outcome.code == sanitizer.HOLDS
    assert outcome.cases == {TOOLS[0]: 2}
    assert outcome.seconds == {TOOLS[0]: 4.0}
    sanitizer.report(outcome)
    assert "memcheck was run again, alone, after this: memcheck: ended with 11 in case" in capsys.readouterr().out


def test_a_tool_that_crashes_again_is_inconclusive():
    run = runs((PLANTED, sanitizer.FOUND), CRASHED, CLEAN, CRASHED, CLEAN)
    assert check_all("cs", TOOLS[:1], (), 60, run).code == sanitizer.INCONCLUSIVE


def test_what_a_tool_found_before_it_crashed_is_not_asked_again():
    run = runs((PLANTED, sanitizer.FOUND), (RACECHECK, 11), CLEAN)
    assert check_all("cs", TOOLS[:1], (), 60, run).code == sanitizer.FINDING
    assert len(run.commands) == 3


def test_findings_are_exit_code_1():
    outcome = check("cs", "racecheck", (), 60, runs((RACECHECK, sanitizer.FOUND), CLEAN))
    assert outcome.code == sanitizer.FINDING
    assert len(outcome.findings) == 2


def test_a_tool_that_does_not_see_what_is_planted_proves_nothing():
    outcome = check_all("cs", TOOLS, (), 60, runs(CLEAN))
    assert outcome.code == sanitizer.INCONCLUSIVE
    assert "memcheck does not see a planted write: it ended with 0" in outcome.inconclusive[0]
    assert not outcome.cases


def test_a_device_that_is_not_supported_is_nothing_done():
    outcome = prove("cs", 60, runs((UNSUPPORTED, 1)))
    assert outcome.code == sanitizer.NOTHING_DONE
    assert "Device not supported" in outcome.unsupported["memcheck"]
    assert check_all("cs", TOOLS, (), 60, runs((UNSUPPORTED, 1))).code == sanitizer.NOTHING_DONE


def test_one_tool_of_several_that_is_not_supported_is_a_hole():
    run = runs((PLANTED, sanitizer.FOUND), CLEAN, CLEAN, (UNSUPPORTED, 1))
    assert check_all("cs", TOOLS[:2], (), 60, run).code == sanitizer.INCONCLUSIVE


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ([(CLEAN, None)], "memcheck: its time of 60 s was over in case 'routing (triton)'"),
        ([("========= Internal Sanitizer Error\n", 255), CLEAN], "Internal Sanitizer Error before the first case"),
        ([(CLEAN + "Segmentation fault", -11), CLEAN], "memcheck: ended with -11 in case 'routing (triton)'"),
        ([(CLEAN, sanitizer.FOUND), CLEAN], "memcheck: ended with 86 in case"),
        (["nothing\n", CLEAN], "memcheck: ran no case: nothing"),
    ],
)
def test_a_tool_that_does_not_do_its_work_is_inconclusive(outputs, words):
    outcome = check("cs", "memcheck", (), 60, runs(*outputs))
    assert outcome.code == sanitizer.INCONCLUSIVE
    assert words in outcome.inconclusive[0]


def test_a_child_that_hangs_is_ended_with_what_it_started():
    program = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    started = time.monotonic()
    ended = sanitizer.run_child([sys.executable, "-c", program], dict(os.environ), 2.0)
    assert ended.status is None
    assert ended.output == "begun\n"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "arguments",
    [["--tools", "memcheck,nosuch"], ["--tools", ""], ["--timeout", "0"], ["--timeout", "nan"], ["--nosuch"]],
)
def test_bad_arguments_are_exit_code_4(arguments, capsys):
    assert main(arguments) == sanitizer.BAD_ARGUMENTS
    assert arguments[0] in capsys.readouterr().err


def test_without_a_tool_or_a_gpu_nothing_is_done_and_the_reason_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: None)
    assert main([]) == sanitizer.NOTHING_DONE
    assert "compute-sanitizer is not installed" in capsys.readouterr().err
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == sanitizer.NOTHING_DONE
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_what_came_of_it_is_printed_and_written(monkeypatch, tmp_path, capsys):
    run = runs((PLANTED, sanitizer.FOUND), (MEMCHECK, sanitizer.FOUND), CLEAN)
    monkeypatch.setattr(sanitizer, "why_not", lambda: "")
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: "cs")
    monkeypatch.setattr(sanitizer, "check_all", lambda *given: check_all(*given, run))
    assert main(["--tools", "memcheck", "--json", str(tmp_path / "found.json")]) == sanitizer.FINDING
    said = capsys.readouterr().out
    assert "memcheck: 3 cases, 3 findings, 2 s\n" in said
    assert said.endswith("verdict: findings\n")
    written = json.loads((tmp_path / "found.json").read_text())
    assert [row["kernel"] for row in written["findings"]] == ["grouped_gemm_kernel", "unaligned_kernel", ""]
    assert written["code"] == 1


@needs_interpreter
def test_the_cases_reach_every_kernel_family_and_hold_where_no_tool_looks():
    interpreter.install()
    before, sessions = CHECKED.copy(), [Session(load_subject(name), "cpu") for name in SUBJECTS]
    for session, case in product(sessions, CASES):
        is_there = is_defined(session, case, "triton")
        assert is_there or session is not sessions[0], case.name
        if is_there and not case.needs_gpu:
            assert all(verdict.holds for verdict in run_case(session, case, "triton")), case.name
    launched = {kernel for kernel, count in CHECKED.items() if count > before[kernel]}
    families = ("topk", "align", "grouped_gemm", "batched_gemm", "activation", "combine", "quantize", "lora_shrink")
    families += ("gate_up_rows", "down_rows", "gated_gemm", "sorted_gemm", "scaled_gated_gemm", "scaled_sorted_gemm")
    families += ("plan_travel", "pack_rows", "sum_ranks")
    missing = [family for family in families if not any(kernel.startswith(family) for kernel in launched)]
    assert not missing, sorted(launched)


@needs_interpreter
def test_the_planted_kernel_leaves_its_memory():
    interpreter.install()
    with pytest.raises(OutOfBoundsError, match=r"planted_kernel writes 4 bytes .* up to 4 bytes behind the end of out"):
        plant("cpu")


@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", TOOLS)
def test_the_cases_are_clean_under_the_tool(tool):
    reason = sanitizer.why_not()
    if reason:
        pytest.skip(reason)
    outcome = check_all(sanitizer.find_sanitizer(), [tool], (), 240.0)
    if outcome.code == sanitizer.NOTHING_DONE:
        pytest.skip(str(outcome.unsupported))
    assert outcome.code == sanitizer.HOLDS, "\n".join(map(str, (*outcome.findings, *outcome.inconclusive)))
