"""`moegate explain`, the thin wrapper that asks for a process, and what they say."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from moegate.explain import explain
from moegate.impl import once
from moegate.impl.config import Activation, MoEConfig, QuantScheme
from moegate.impl.experts.readiness import READY
from moegate.impl.oracle import choose
from moegate.impl.oracle.available import every_kernel, installed_kernels
from moegate.impl.oracle.backends import UnquantizedMoeBackend as Backend
from moegate.impl.oracle.choose import choose_backend
from moegate.impl.oracle.decision import BackendRefusedError
from moegate.impl.oracle.select import select_backend
from moegate.impl.platform import Platform

LAYER = MoEConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.delenv("MOEGATE_BACKEND", raising=False)
    app = typer.Typer()
    app.command("explain")(explain)
    app.callback()(lambda: None)
    runner = CliRunner()

    def invoke(*arguments):
        return runner.invoke(app, ["explain", *arguments])

    return invoke


def _candidates(output):
    lines = [line.split() for line in output.splitlines()]
    return [(words[0], "taken" in words[:2]) for words in lines if words and words[0] in {b.value for b in Backend}]


def test_hopper_prefers_triton_and_says_why(run):
    result = run("--platform", "cuda:9.0")
    assert result.exit_code == 0
    assert _candidates(result.output) == [
        ("triton", True),
        ("batched_triton", False),
        ("flashinfer_trtllm", False),
        ("flashinfer_cutlass", False),
    ]
    assert "vllm #44220" in result.output
    assert "decision: triton (TritonExperts)" in result.output


def test_data_parallelism_moves_flashinfer_cutlass_to_the_back(run):
    result = run("--platform", "cuda:10.0", "--dp", "2")
    assert [name for name, _ in _candidates(result.output)] == [
        "flashinfer_trtllm",
        "triton",
        "batched_triton",
        "flashinfer_cutlass",
    ]
    assert "data_parallel" in result.output


def test_lora_takes_triton_on_rocm(run):
    result = run("--platform", "rocm:gfx942", "--lora")
    assert result.exit_code == 0
    assert "decision: triton (TritonExperts)" in result.output
    assert "vllm #40273" in result.output


def test_biases_leave_triton_alone_where_others_add_none(run):
    assert "decision: flashinfer_trtllm" in run("--platform", "cuda:10.0").output
    assert "decision: triton" in run("--platform", "cuda:10.0", "--bias").output


def test_a_refused_request_says_why_and_exits_with_a_finding(run):
    result = run("--platform", "cuda:9.0", "--backend", "flashinfer_trtllm")
    assert result.exit_code == 1
    assert "refused: backend: flashinfer_trtllm was asked for" in result.output
    assert "10.0 and 10.3" in result.output


def test_a_request_that_lora_overrides_is_warned_about(run):
    result = run("--platform", "cuda:10.0", "--lora", "--backend", "flashinfer_cutlass")
    assert result.exit_code == 0
    assert "warning: backend: flashinfer_cutlass was asked for" in result.output


def test_the_environment_asks_where_no_argument_does(run, monkeypatch):
    monkeypatch.setenv("MOEGATE_BACKEND", "triton")
    assert "MOEGATE_BACKEND: triton was asked for" in run("--platform", "cuda:10.0").output
    assert "decision: flashinfer_trtllm" in run("--platform", "cuda:10.0", "--backend", "auto").output


def test_json_holds_the_schema_and_the_full_sources(run):
    result = run("--platform", "cuda:9.0", "--json", "-")
    report = json.loads(result.stdout)
    assert report["schema"] == 1
    assert (report["backend"], report["experts"]) == ("triton", "TritonExperts")
    assert [sorted(reason) for reason in report["reasons"]] == [
        ["candidate", "demotions", "source", "taken", "why"]
    ] * 4
    assert report["reasons"][3]["source"] == "https://github.com/vllm-project/vllm/pull/44220"


def test_json_goes_to_a_file_beside_the_table(run, tmp_path):
    file = tmp_path / "decision.json"
    result = run("--platform", "xpu", "--json", str(file))
    assert "decision: xpu" in result.output
    assert json.loads(file.read_text())["backend"] == "xpu"


def test_a_refusal_has_json_too(run):
    result = run("--platform", "tpu", "--lora", "--json", "-")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["backend"] is None
    assert "LoRA" in report["refusal"]
    assert [reason["taken"] for reason in report["reasons"]] == [False]


def test_without_leaves_a_package_out(run):
    result = run("--platform", "cuda:12.0", "--without", "flashinfer")
    assert "decision: triton" in result.output
    assert "decision: flashinfer_cutlass" in run("--platform", "cuda:12.0").output


def test_a_decision_for_another_machine_says_where_this_build_has_no_kernel(run):
    assert "here: declared alone: moegate ships no flashinfer_trtllm kernel" in run("--platform", "cuda:10.0").output
    assert "here:" not in run("--platform", "cuda:9.0").output


def test_this_machine_counts_what_is_installed(run):
    here = Platform.detect()
    result = run("--json", "-")
    report = json.loads(result.stdout)
    assert report["this_machine"]
    assert report["platform"] == str(here)
    batched = run("--batched")
    assert batched.exit_code == 1
    assert "refused" in batched.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--platform", "cuda:9.1"], "platform: expected one of"),
        (["--platform", "rocm:gfx1100"], "platform: expected an architecture"),
        (["--platform", "metal"], "platform: expected one of"),
        (["--backend", "flashinfer"], "backend: expected one of"),
        (["--activation", "relu"], "activation: expected one of"),
        (["--dtype", "fp4"], "--dtype: expected one of"),
        (["--tp", "5"], "tp_size: expected a divisor"),
        (["--ep", "200"], "ep_size: expected at most num_experts"),
        (["--dp", "0"], "dp_size: expected at least 1"),
        (["--top-k", "200"], "top_k: expected at most num_experts"),
        (["--block-shape", "128x128", "--dtype", "fp8_w8a8"], "--block-shape: expected N,K"),
        (["--block-shape", "128,128"], "block_shape: expected None"),
        (["--dtype", "int4_w4a16"], "block_shape: expected (0, group) for scheme int4_w4a16, got None"),
        (["--dtype", "int4_w4a16", "--block-shape", "0,96"], "block_shape: expected groups that divide hidden_size"),
        (["--dtype", "fp8_w8a8", "--block-shape", "128,128", "--tp", "4"], "tp_size: expected shards of whole blocks"),
        (["--without", "cutlass"], "--without: expected one of"),
        (["--weight-on-input", "--top-k", "2"], "apply_router_weight_on_input: expected top_k 1"),
    ],
)
def test_contradictions_and_unknown_names_are_refused_by_name(run, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 4
    assert words in " ".join(result.output.split())


def test_asking_imports_no_flashinfer_and_needs_no_gpu():
    code = (
        "import sys; from moegate.explain import explain; assert 'torch' not in sys.modules;"
        "from moegate.impl.oracle.select import select_backend;"
        "from moegate.impl.oracle.available import every_kernel; from moegate.impl.platform import Platform;"
        "from moegate.impl.config import MoEConfig;"
        "select_backend(MoEConfig(8, 2, 128, 128), Platform.parse('cuda:12.0'), every_kernel(), 'flashinfer_cutlass');"
        "assert 'flashinfer' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def said(caplog):
    once.forget()
    caplog.set_level(logging.INFO, logger="moegate.impl.oracle")
    yield lambda: [(record.levelname, record.getMessage()) for record in caplog.records]
    once.forget()


def test_a_decision_is_logged_once(said, monkeypatch):
    monkeypatch.delenv("MOEGATE_BACKEND", raising=False)
    cpu = Platform.parse("cpu")
    for _ in range(3):
        assert choose_backend(LAYER, cpu).backend is Backend.CPU
    assert [level for level, _ in said()] == ["INFO"]
    assert "experts backend on cpu: cpu (CpuExperts)" in said()[0][1]


def test_a_request_that_lora_overrides_is_warned_about_once_and_logged(said, monkeypatch):
    monkeypatch.setattr(choose, "installed_kernels", lambda config, platform: every_kernel())
    monkeypatch.setenv("MOEGATE_BACKEND", "flashinfer_cutlass")
    config = MoEConfig(8, 2, 128, 128, is_lora_enabled=True)
    for _ in range(3):
        assert choose_backend(config, Platform.parse("cuda:9.0")).backend is Backend.TRITON
    assert [level for level, _ in said()] == ["WARNING", "INFO"]
    assert "flashinfer_cutlass" in said()[0][1]
    assert "triton is used" in said()[0][1]


def test_the_process_environment_is_read_by_the_wrapper_alone(monkeypatch):
    monkeypatch.setenv("MOEGATE_BACKEND", "aiter")
    with pytest.raises(BackendRefusedError, match="MOEGATE_BACKEND: aiter was asked for"):
        choose_backend(LAYER, Platform.parse("cpu"))


def test_this_build_says_what_it_does_not_ship():
    cpu = Platform.parse("cpu")
    adapted = MoEConfig(8, 2, 128, 128, is_lora_enabled=True)
    kernels = installed_kernels(adapted, cpu)
    assert kernels[Backend.TRITON] is kernels[Backend.CPU] is READY
    for declared in (Backend.AITER, Backend.XPU, Backend.FLASHINFER_TRTLLM):
        assert "moegate ships no" in kernels[declared].why


@pytest.mark.parametrize("scheme", QuantScheme)
@pytest.mark.parametrize("activation", Activation)
def test_this_build_ships_every_scheme_activation_and_bias(scheme, activation):
    block_shape = (0, 32) if scheme is QuantScheme.INT4_W4A16 else None
    config = MoEConfig(8, 2, 128, 128, scheme=scheme, block_shape=block_shape, activation=activation, has_bias=True)
    assert choose_backend(config, Platform.parse("cpu")).backend is Backend.CPU


@pytest.mark.parametrize(
    ("backend", "platform"),
    [("aiter", "rocm:gfx942"), ("flashinfer_trtllm", "cuda:10.0"), ("flashinfer_cutlass", "cuda:9.0")],
)
def test_backends_that_add_no_biases_refuse_them(backend, platform):
    where, config = Platform.parse(platform), MoEConfig(8, 2, 128, 128)
    assert select_backend(config, where, every_kernel(), backend).backend == backend
    with pytest.raises(BackendRefusedError, match="biases"):
        select_backend(replace(config, has_bias=True), where, every_kernel(), backend)
    assert select_backend(replace(config, has_bias=True), where, every_kernel()).backend is Backend.TRITON
