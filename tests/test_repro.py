"""A finding becomes a script that needs no moegate, on the smallest case that still fails."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from moegate.conformance.cases import build_experts
from moegate.conformance.loading import SHIPPED
from moegate.conformance.repro import RECORDED, SCRIPT, emit_repro
from moegate.conformance.session import Session
from moegate.conformance.spec import ExpertsSpec
from moegate.conformance.subjects.eager import EagerSubject
from moegate.conformance.subjects.flashinfer_experts import FlashinferSubject
from moegate.conformance.subjects.vllm_experts import VllmSubject

SPEC = ExpertsSpec(M=9, H=16, I=8, E=5, top_k=2, dtype="float32")
MARK = build_experts(SPEC).w2[3, 0, 0]
RIGHT = """gate, up = (hidden_states @ w13[topk_ids[:, 0].long()].transpose(1, 2)).chunk(2, dim=-1)
    y = (torch.nn.functional.silu(gate) * up) @ w2[topk_ids[:, 0].long()].transpose(1, 2)
    return y[:, 0] * topk_weights"""


class Loses(EagerSubject):
    """Loses whatever goes to expert 3."""

    name = "loses"

    def experts(self, case, variant):
        lost = case.w2.clone()
        # By its weights: its id changes when others leave.
        lost[(case.w2[:, 0, 0] == MARK).nonzero()] = 0
        return super().experts(replace(case, w2=lost), variant)


def rows(spec=SPEC, verdict="violated"):
    return [{"verdict": verdict, "spec": repr(spec)}, {"verdict": "violated", "spec": "Spec()"}]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("repro") / "bad.py"
    assert "bad.py shows NUM-01 without moegate" in emit_repro(Session(Loses(), "cpu"), rows(), str(path))
    return path


def run(path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_case_is_one_token_one_slot_and_one_expert(script):
    tensors = load_file(script.with_suffix(".safetensors"))
    assert tensors["topk_ids"].tolist() == [[0]]
    assert tensors["w13"].shape == (1, 16, 16)
    assert tensors["w2"][0, 0, 0] == MARK
    assert torch.equal(tensors["got"], torch.zeros(1, 16))


def test_the_script_shows_what_was_returned_and_fails_without_moegate(script):
    text = script.read_text()
    assert len(text.splitlines()) < 60
    assert "import moegate" not in text
    assert "from moegate" not in text
    code, said = run(script)
    assert code == 1, said
    assert "16 of 16 elements, 1 of 1 rows are over" in said


def test_a_right_implementation_in_its_place_passes(script):
    path = script.with_name("good.py")
    path.write_text(script.read_text().replace(RECORDED, RIGHT))
    path.with_suffix(".safetensors").write_bytes(script.with_suffix(".safetensors").read_bytes())
    code, said = run(path)
    assert code == 0, said
    assert "0 of 16 elements, 0 of 1 rows are over" in said


def test_what_is_no_finding_of_the_experts_writes_nothing_and_says_so(tmp_path):
    path = tmp_path / "none.py"
    assert "is not written" in emit_repro(Session(Loses(), "cpu"), rows(verdict="holds"), str(path))
    assert "is not written" in emit_repro(Session(EagerSubject(), "cpu"), rows(), str(path))
    assert not path.exists()


@pytest.mark.parametrize("subject", [VllmSubject, FlashinferSubject])
def test_an_engines_own_call_stands_in_its_script(subject):
    assert subject.name in SHIPPED
    body = "\n    ".join(subject.standalone.strip().splitlines())
    names = dict.fromkeys(("id", "subject", "variant", "device", "sentence", "detail", "spec"), "x")
    text = SCRIPT.substitute(**names, options="{}", body=body)
    compile(text, "script.py", "exec")
    assert len(text.splitlines()) < 60
