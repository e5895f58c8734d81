"""`moegate tune`: its arguments, its exit codes, what it prints and writes."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_tune_search import FASTER, FakeBench
from typer.testing import CliRunner

from moegate.bench import selection, tune_device
from moegate.impl.platform import Platform
from moegate.impl.tuning.names import ConfigKey
from moegate.main import app

HOPPER = replace(Platform.parse("cuda:9.0"), name="NVIDIA H200", num_sms=132)


def invoke(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])


@pytest.fixture
def fake_gpu(monkeypatch):
    bench = FakeBench(FASTER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selection, "choose_device", torch.device)
    monkeypatch.setattr(Platform, "of", staticmethod(lambda device: HOPPER))
    monkeypatch.setattr(tune_device, "Remote", lambda device: nullcontext(bench))
    return bench


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--model", []),
        ("--model", ["--model", "no-such-model"]),
        ("--model", ["--model", "gpt-oss-120b"]),
        ("--tokens", ["--model", "qwen3-30b-a3b", "--tokens", "1,zero"]),
        ("--tokens", ["--model", "qwen3-30b-a3b", "--tokens", "0"]),
        ("--tokens", ["--model", "qwen3-30b-a3b", "--tokens", ""]),
        ("--minutes", ["--model", "qwen3-30b-a3b", "--minutes", "0"]),
        ("--minutes", ["--model", "qwen3-30b-a3b", "--minutes", "nan"]),
        ("--minutes", ["--model", "qwen3-30b-a3b", "--minutes", "soon"]),
        ("--limit", ["--model", "qwen3-30b-a3b", "--limit", "0"]),
        ("--dtype", ["--model", "qwen3-30b-a3b", "--dtype", "fp8_w8a8"]),
        ("--dtype", ["--model", "qwen3-30b-a3b", "--dtype", "fp8-channel"]),
        ("--shape", ["--shape", "E=8,N=64"]),
        ("--shape", ["--shape", "E=8,N=64,H=64,top_k=9"]),
        ("--device", ["--model", "qwen3-30b-a3b", "--device", "tpu"]),
        ("--output", ["--model", "qwen3-30b-a3b", "--output", __file__]),
        ("--no-such-option", ["--no-such-option"]),
    ],
)
def test_bad_arguments_exit_with_four_and_name_the_option(option, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 4
    assert option in result.output


def test_a_format_that_is_not_tuned_is_refused_with_those_that_are():
    result = invoke("--model", "qwen3-30b-a3b", "--dtype", "fp8-channel")
    assert "--dtype: expected bf16, fp16, fp32 or fp8-block, got 'fp8-channel'" in result.output


def test_without_a_gpu_nothing_can_be_measured(tmp_path):
    for device in ("cuda", "cpu"):
        result = invoke("--model", "qwen3-30b-a3b", "--device", device, "--output", str(tmp_path / "tuned"))
        assert result.exit_code == 3
        assert "--device" in result.output
    assert not (tmp_path / "tuned").exists()


def test_it_writes_files_prints_a_table_and_json(fake_gpu, tmp_path):
    out = tmp_path / "out.json"
    options = ["--model", "qwen3-30b-a3b", "--tokens", "8,64", "--output", str(tmp_path / "tuned"), "--json", str(out)]
    result = invoke(*options)
    assert result.exit_code == 0
    for expected in ("default us", "qwen3-30b-a3b", "16x64x256 w4 s3", "33.3%", "written: "):
        assert expected in result.output
    data = json.loads(out.read_text())
    assert data["schema"] == 1
    assert [entry["num_tokens"] for entry in data["tuned"]] == [8, 64]
    assert data["tuned"][0]["w2"]["swap_ab"] is True
    again = invoke(*options)
    assert again.exit_code == 0
    assert "already tuned: 2" in again.output


def test_json_to_standard_output_is_all_that_stands_there(fake_gpu, tmp_path):
    result = invoke("--model", "qwen3-30b-a3b", "--tokens", "8", "--output", str(tmp_path), "--json", "-")
    assert json.loads(result.stdout)["device"] == "NVIDIA H200"


@pytest.mark.parametrize(("dtype", "block_shape"), [(None, None), ("float32", None), ("fp8_w8a8", (128, 128))])
def test_the_command_that_the_lookup_gives_makes_the_file_that_it_looks_for(fake_gpu, tmp_path, dtype, block_shape):
    key = ConfigKey(16, 64, "NVIDIA_H200", dtype, block_shape, hidden_size=128, top_k=4)
    command = (key.tune_command() or "").split()
    assert command[:2] == ["moegate", "tune"]
    result = invoke(*command[2:], "--tokens", "8", "--output", str(tmp_path))
    assert result.exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == [key.file_name]


def test_where_everything_fails_the_exit_code_says_so(fake_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(fake_gpu, "layer", lambda *_: 1 / 0)
    result = invoke("--model", "qwen3-30b-a3b", "--tokens", "8", "--output", str(tmp_path))
    assert result.exit_code == 3
    assert "nothing measured: qwen3-30b-a3b M=8: ZeroDivisionError" in result.output


def test_a_file_that_cannot_be_read_is_refused_by_name(fake_gpu, tmp_path):
    name = "E=128,N=768,H=2048,top_k=8,device_name=NVIDIA_H200.json"
    (tmp_path / name).write_text("[]")
    result = invoke("--model", "qwen3-30b-a3b", "--tokens", "8", "--output", str(tmp_path))
    assert result.exit_code == 4
    assert name in result.output
