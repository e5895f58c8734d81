"""What a broken kernel does to a run on a real GPU, where the subject has a process of its own.

`python -m pytest tests/test_isolated_gpu.py -q`
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEADLY = '''
import torch
import triton
import triton.language as tl

from moegate.conformance.subject import Capabilities
from moegate.conformance.subjects.eager import EagerSubject


@triton.jit
def far_store(pointer, distance):
    tl.store(pointer + distance, 1.0)


@triton.jit
def never_ends(flag):
    value = tl.load(flag, volatile=True)
    while value == 0:
        value = tl.load(flag, volatile=True)


class Deadly(EagerSubject):
    """Right for three tokens and fewer, and for more it does what its variant says."""

    name = "deadly"
    variants = ("honest", "illegal", "full", "hangs")
    capabilities = Capabilities(("cuda",), ("float32",), maps=("none",), weight_on_input=False)

    def facets(self, variant):
        return ("experts",)

    def unavailable(self, variant, device):
        return None

    def experts(self, case, variant):
        if variant != "honest" and case.num_tokens > 3:
            if variant == "illegal":
                far_store[(1,)](case.hidden_states, 1 << 42)
            if variant == "full":
                torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
            if variant == "hangs":
                never_ends[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
        return super().experts(case, "honest")
'''
FATAL = {
    "illegal": ("SUBJECT-02", "an illegal memory access"),
    "full": ("SUBJECT-05", "asked for 32768.00 GiB"),
    "hangs": ("SUBJECT-03", ""),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of a run on all variants; each broken case is one of many."""
    folder = tmp_path_factory.mktemp("deadly")
    Path(folder, "deadly.py").write_text(DEADLY)
    command = [sys.executable, "-m", "moegate", "check", "--device", "cuda", "--subject", "deadly.py:Deadly"]
    command += ["--isolate", "--timeout", "20", "--scale", "0.05", "-n", "1", "-k", "stay and float32 and many"]
    done = subprocess.run(
        [*command, "--json", "report.json"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return json.loads(Path(folder, "report.json").read_text())


@pytest.mark.parametrize("variant", FATAL)
def test_a_broken_kernel_ends_its_case_and_is_named(report: dict, variant: str) -> None:
    id, words = FATAL[variant]
    (row,) = [row for row in report["properties"] if row["id"] == id]
    assert row["verdict"] == "violated"
    assert words in row["finding"]
    assert "deadly.py:Deadly" in row["replay"]


def test_the_run_goes_on_after_each_of_them(report: dict) -> None:
    assert report["verdict"] == "violated"
    assert report["inconclusive"] == []
    ran = report["executions_by_variant"]
    assert set(ran) == {"honest", *FATAL}
    rows = {row["id"]: row for row in report["properties"]}
    # Cases of few tokens and those of the honest variant are judged, whatever ended before them.
    assert rows["NUM-01"]["verdict"] == "holds"
    assert 2 * rows["NUM-01"]["cases"] > ran["honest"]  # each case runs twice
