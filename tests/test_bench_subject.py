"""Anybody's layer in `moegate bench`, and installed engines beside it."""

import importlib.metadata
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from moegate.bench import __main__ as command
from moegate.bench.gate.timed_subject import TimedSubject
from moegate.bench.peers import load_peer
from moegate.bench.workloads import SMALL_MODELS, Workload
from moegate.impl.fused_moe import fused_experts

EXAMPLE = (Path(__file__).parents[1] / "docs/examples/my_moe.py").read_text()
SMALL = ["--models", "mixtral-8x7b/64", "--tokens", "1", "--device", "cpu", "--budget", "0.01"]
CPU = torch.device("cpu")


@pytest.fixture
def example(tmp_path):
    (tmp_path / "mine.py").write_text(EXAMPLE)
    return f"{tmp_path / 'mine.py'}:MyMoE"


@pytest.fixture
def vllm(monkeypatch):
    """A package of that name whose experts are ours; its calls are kept."""
    calls = []
    module = types.ModuleType("vllm.model_executor.layers.fused_moe.fused_moe")

    def experts(hidden_states, w1, w2, topk_weights, topk_ids, inplace=True, expert_map=None, global_num_experts=-1):
        calls.append(inplace)
        return fused_experts(
            hidden_states, w1, w2, topk_weights, topk_ids, expert_map=expert_map, global_num_experts=global_num_experts
        )

    module.fused_experts = experts
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.fused_moe"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.0" if name == "vllm" else known(name))
    return calls


def test_a_subject_is_timed_beside_an_installed_engine(example, vllm, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert command.main([*SMALL, "--subject", example, "--peer", "vllm", "--json", str(file)]) == 0
    records = json.loads(file.read_text())["records"]
    assert [record["subject"] for record in records] == [example, "vllm 0.33.0"]
    assert records[0]["verdict"]["holds"]
    assert "vllm 0.33.0" in records[0]["versus"]
    assert set(vllm) == {False}  # inputs are read again and again


def test_a_subject_that_is_wrong_is_not_timed(example, tmp_path, capsys):
    file = Path(example.rpartition(":")[0])
    file.write_text(file.read_text().replace("return out.to(", "return 1.1 * out.to("))
    assert command.main([*SMALL, "--subject", example]) == 1
    assert "is wrong and is not timed" in capsys.readouterr().out


def test_what_a_subject_does_not_declare_is_skipped_with_that_reason(example):
    subject = TimedSubject(example)
    why = {
        "mixtral-8x7b/64": None,
        "gpt-oss-120b/16": "my-moe declares activations ['silu'], not swigluoai",
        "minimax-m2.5-ep4/32": "my-moe declares maps ['none'], not contiguous",
    }
    for model, reason in why.items():
        assert subject.unsupported(Workload(SMALL_MODELS[model], 1, dtype="fp32", cache_state="warm"), CPU) == reason
    fp16 = Workload(SMALL_MODELS["mixtral-8x7b/64"], 1, dtype="fp16", cache_state="warm")
    assert subject.unsupported(fp16, CPU) == "my-moe declares dtypes ['bfloat16', 'float32'], not float16"


def test_a_function_with_the_signature_of_fused_experts_is_a_subject_too(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from moegate.impl.fused_moe import fused_experts\ndef experts(*a, **k):\n    return fused_experts(*a, **k)\n"
    )
    assert command.main([*SMALL, "--subject", f"{tmp_path / 'mine.py'}:experts"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subject", "nowhere.py:MyMoE"], "subject: expected a file, got 'nowhere.py'"),
        (["--peer", "vllm"], "peer: expected vllm installed here"),
        (["--peer", "flashinfer"], "peer: expected flashinfer installed here"),
        (["--peer", "other"], "peer: expected vllm, flashinfer or path/to/file.py:callable, got 'other'"),
    ],
)
def test_what_is_not_there_is_said_so(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*SMALL, *arguments])
    assert stop.value.code == 4
    assert message in capsys.readouterr().err


def test_a_subject_has_no_overlap_of_its_own(example, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*SMALL, "--subject", example, "--overlap"])
    assert stop.value.code == 4
    assert "--overlap: expected none with --subject" in capsys.readouterr().err


def test_vllm_is_not_asked_for_what_it_may_call_otherwise(vllm):
    _, experts = load_peer("vllm")
    ids = torch.zeros((1, 1), dtype=torch.int32)
    with pytest.raises(ValueError, match="vllm is timed with silu and plain weights, got gelu"):
        experts(
            torch.zeros(1, 4),
            torch.zeros(1, 8, 4),
            torch.zeros(1, 4, 4),
            torch.ones(1, 1),
            ids,
            activation="gelu",
            expert_map=None,
            global_num_experts=1,
        )
