"""FlashInfer's CUTLASS experts: found without importing or compiling, and the adapter against a stand-in of its API.

The stand-in computes in torch what flashinfer-python documents: up rows before gate rows, local ids, -1 passed over.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional

from moegate.conformance.verify import verify_experts
from moegate.impl.config import Activation, ActivationFunction, MoEConfig, QuantScheme
from moegate.impl.experts import flashinfer_cutlass
from moegate.impl.experts.base import ExpertsCall
from moegate.impl.experts.cpu import CpuExperts
from moegate.impl.experts.flashinfer_cutlass import FlashInferCutlassExperts, compiled_module, local_expert_ids
from moegate.impl.experts.readiness import State
from moegate.impl.oracle.available import every_kernel, installed_kernels
from moegate.impl.oracle.backends import UnquantizedMoeBackend as Backend
from moegate.impl.oracle.decision import BackendRefusedError
from moegate.impl.oracle.select import select_backend
from moegate.impl.path import record_path
from moegate.impl.platform import Platform
from moegate.impl.quantization import ExpertsQuantization
from moegate.impl.weights import ExpertsWeights

H200 = Platform.parse("cuda:9.0")
LAYER = MoEConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A flashinfer package that is there and would fail if anybody imported it; returns the folders to put files in."""
    site = tmp_path / "site"
    (site / "flashinfer").mkdir(parents=True)
    (site / "flashinfer" / "__init__.py").write_text("raise RuntimeError('imported unasked')\n")
    home = tmp_path / "home"
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(home))
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.2")
    importlib.invalidate_caches()
    return SimpleNamespace(site=site, cache=home / ".cache" / "flashinfer" / "0.7.2")


def _library(folder, name="fused_moe_90"):
    (folder / name).mkdir(parents=True)
    (folder / name / f"{name}.so").write_bytes(b"")


def _readiness(platform=H200):
    return FlashInferCutlassExperts.readiness(LAYER, platform)


def test_absent_is_a_reason_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    readiness = _readiness()
    assert readiness.state is State.ABSENT
    assert "pip install" in readiness.why


def test_installed_but_not_compiled_is_there_on_request_alone(installation):
    readiness = _readiness()
    assert readiness.state is State.ON_REQUEST
    assert "fused_moe_90" in readiness.why
    available = {**every_kernel(), Backend.FLASHINFER_CUTLASS: readiness}
    sm120 = Platform.parse("cuda:12.0")
    assert select_backend(LAYER, sm120, available).backend is Backend.TRITON
    assert select_backend(LAYER, sm120, available, "flashinfer_cutlass").backend is Backend.FLASHINFER_CUTLASS


@pytest.mark.parametrize("place", ["aot", "wheel", "cache"])
def test_a_compiled_module_is_found_wherever_flashinfer_keeps_it(installation, place):
    folders = {
        "aot": installation.site / "flashinfer" / "data" / "aot",
        "wheel": installation.site / "flashinfer_jit_cache" / "jit_cache",
        "cache": installation.cache / "80_90a" / "cached_ops",
    }
    _library(folders[place])
    assert _readiness().state is State.READY
    found = compiled_module("fused_moe_90", (9, 0))
    assert found is not None
    assert found.name == "fused_moe_90.so"


def test_a_module_compiled_for_another_capability_or_version_does_not_count(installation):
    _library(installation.cache / "100a" / "cached_ops")
    _library(installation.cache.parent / "0.6.0" / "90a" / "cached_ops")
    _library(installation.site / "flashinfer" / "data" / "aot", "fused_moe_100")
    assert _readiness().state is State.ON_REQUEST


def test_where_compiling_is_forbidden_a_missing_module_is_absent(installation, monkeypatch):
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    assert _readiness().state is State.ABSENT


def test_a_platform_without_a_module_is_absent(installation):
    assert _readiness(Platform.parse("cuda:8.0")).state is State.ABSENT
    assert _readiness(Platform.parse("rocm:gfx942")).state is State.ABSENT


def test_asking_what_is_installed_imports_nothing(installation):
    installed_kernels(LAYER, H200)
    assert "flashinfer" not in sys.modules


def test_a_request_for_it_where_it_is_absent_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendRefusedError, match="flashinfer-python is not installed"):
        select_backend(LAYER, H200, installed_kernels(LAYER, H200), "flashinfer_cutlass")


class _ActivationType(IntEnum):
    Gelu = 0
    Silu = 2
    Swiglu = 3
    Geglu = 4
    Relu2 = 6
    GegluTanh = 8


def _gated(kind, gate, up, parameters):
    if kind is _ActivationType.Swiglu and parameters:
        alpha, beta, limit = (parameters[f"swiglu_{name}"][0] for name in ("alpha", "beta", "limit"))
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + beta)
    if kind is _ActivationType.Swiglu:
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if kind is _ActivationType.GegluTanh else "none") * up


@pytest.fixture
def stand_in(monkeypatch):
    """`flashinfer.fused_moe` with the documented layout; records its calls."""
    calls = []

    def cutlass_fused_moe(
        hidden, ids, weights, fc1, fc2, output_dtype, quant_scales, *, output, activation_type, use_fused_finalize,
        **parameters,
    ):  # fmt: skip
        calls.append(SimpleNamespace(fc1=fc1, ids=ids, parameters=parameters, kind=activation_type))
        assert quant_scales == []
        assert not use_fused_finalize
        assert ids.dtype == torch.int32
        assert weights.dtype == torch.float32
        for tensor in (hidden, ids, weights, fc1, fc2, output):
            assert tensor.is_contiguous()
        total = torch.zeros(output.shape)
        for token in range(hidden.shape[0]):
            for slot, expert in enumerate(ids[token].tolist()):
                if not 0 <= expert < fc2.shape[0]:
                    continue
                rows = fc1[expert].float() @ hidden[token].float()
                if activation_type in (_ActivationType.Silu, _ActivationType.Gelu, _ActivationType.Relu2):
                    inner = {2: functional.silu, 0: functional.gelu, 6: lambda x: x.relu() ** 2}[activation_type](rows)
                else:
                    up, gate = rows.chunk(2)
                    inner = _gated(activation_type, gate, up, parameters)
                total[token] += weights[token, slot] * (fc2[expert].float() @ inner)
        output.copy_(total)

    module = ModuleType("flashinfer.fused_moe")
    module.cutlass_fused_moe = cutlass_fused_moe
    module.ActivationType = _ActivationType
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", module)
    return calls


def _operands(num_rows=2):
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    hidden, w13, w2 = draw(5, 16), draw(4, num_rows * 8, 16), draw(4, 16, 8)
    ids = torch.tensor([[0, 3], [5, 2], [-1, 1], [7, 6], [-1, -1]], dtype=torch.int64)
    return hidden, w13, w2, torch.rand(5, 2, generator=generator), ids


MAP = torch.tensor([0, -1, 1, 2, -1, 3, -1, -1], dtype=torch.int32)


def _apply(experts, operands, out, activation=Activation.SILU, on_input=False, beside=None, **parameters):
    hidden, w13, w2, weights, ids = operands
    function = ActivationFunction(activation, **parameters)
    held = ExpertsWeights(w13, w2, **(beside or {}))
    experts.apply(out, ExpertsCall(hidden, held, weights, ids, function, on_input, MAP, 8, False))


def test_the_adapter_computes_what_the_cpu_experts_compute(stand_in):
    operands = _operands()
    expected, got = torch.empty(5, 16, dtype=torch.bfloat16), torch.empty(5, 16, dtype=torch.bfloat16)
    _apply(CpuExperts(), operands, expected)
    _apply(FlashInferCutlassExperts(), operands, got)
    for output in (expected, got):
        verdict = verify_experts(output, *operands, expert_map=MAP)
        assert verdict.holds, verdict.detail
    assert torch.equal(got[4], torch.zeros(16, dtype=torch.bfloat16))


def test_gate_and_up_rows_are_not_confused(stand_in):
    operands = list(_operands())
    operands[1] = operands[1].clone()
    operands[1][:, 8:] *= 16  # the up rows
    expected, got = torch.empty(5, 16, dtype=torch.bfloat16), torch.empty(5, 16, dtype=torch.bfloat16)
    _apply(CpuExperts(), operands, expected)
    _apply(FlashInferCutlassExperts(), operands, got)
    assert (got.float() - expected.float()).norm() < 0.02 * expected.float().norm()


def test_weights_are_converted_once_and_again_when_they_change(stand_in):
    experts, operands = FlashInferCutlassExperts(), _operands()
    out = torch.empty(5, 16, dtype=torch.bfloat16)
    with record_path() as path:
        for _ in range(3):
            _apply(experts, operands, out)
        assert path.all("weights_converted") == ["flashinfer_cutlass"]
        operands[1].mul_(2)
        _apply(experts, operands, out)
        assert len(path.all("weights_converted")) == 2
        _apply(experts, _operands(), out)
        assert len(path.all("weights_converted")) == 3
    gate, up = operands[1].chunk(2, dim=1)
    assert torch.equal(stand_in[3].fc1, torch.cat((up, gate), dim=1))


@pytest.mark.parametrize("activation", [kind for kind in Activation if kind.is_gated])
def test_rows_that_alternate_are_sorted_and_parameters_are_those_of_the_call(stand_in, activation):
    operands = _operands()
    function = {"interleaved": True}
    if activation is Activation.SWIGLUOAI:
        function |= {"alpha": 1.25, "limit": 0.75}
    expected, got = torch.empty(5, 16, dtype=torch.bfloat16), torch.empty(5, 16, dtype=torch.bfloat16)
    _apply(CpuExperts(), operands, expected, activation, **function)
    _apply(FlashInferCutlassExperts(), operands, got, activation, **function)
    assert (got.float() - expected.float()).norm() < 0.02 * expected.float().norm()


def test_weights_are_converted_again_where_their_rows_mean_something_else(stand_in):
    experts, operands = FlashInferCutlassExperts(), _operands()
    out = torch.empty(5, 16, dtype=torch.bfloat16)
    for interleaved in (False, True, True, False):
        _apply(experts, operands, out, interleaved=interleaved)
    first, second, third, fourth = (call.fc1 for call in stand_in)
    assert torch.equal(second[:, :8], operands[1][:, 1::2])
    assert second is third
    assert torch.equal(first, fourth)


def test_swigluoai_passes_alpha_beta_and_limit_for_each_local_expert(stand_in):
    _apply(FlashInferCutlassExperts(), _operands(), torch.empty(5, 16, dtype=torch.bfloat16), Activation.SWIGLUOAI)
    parameters = stand_in[0].parameters
    assert {name: tensor.tolist() for name, tensor in parameters.items()} == {
        "swiglu_alpha": pytest.approx([1.702] * 4),
        "swiglu_beta": [1.0] * 4,
        "swiglu_limit": [7.0] * 4,
    }


def test_every_activation_that_the_predicate_accepts_has_a_kernel_of_its_own(stand_in):
    kinds = {}
    for activation in Activation:
        operands = _operands(2 if activation.is_gated else 1)
        _apply(FlashInferCutlassExperts(), operands, torch.empty(5, 16, dtype=torch.bfloat16), activation)
        kinds[activation] = (stand_in[-1].kind, bool(stand_in[-1].parameters))
    assert len(set(kinds.values())) == len(Activation)


def test_an_output_with_strided_rows_is_filled(stand_in):
    operands = _operands()
    dense, wide = torch.empty(5, 16, dtype=torch.bfloat16), torch.zeros(5, 20, dtype=torch.bfloat16)
    _apply(FlashInferCutlassExperts(), operands, dense)
    _apply(FlashInferCutlassExperts(), operands, wide[:, :16])
    assert torch.equal(wide[:, :16], dense)
    assert not wide[:, 16:].any()


def test_inputs_are_left_as_they_were(stand_in):
    operands = _operands()
    before = [tensor.clone() for tensor in operands]
    _apply(FlashInferCutlassExperts(), operands, torch.empty(5, 16, dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


def test_weights_on_the_input_are_refused_by_name(stand_in):
    with pytest.raises(ValueError, match="apply_router_weight_on_input"):
        _apply(
            FlashInferCutlassExperts(),
            _operands(),
            torch.empty(5, 16, dtype=torch.bfloat16),
            on_input=True,
        )


def test_biases_and_scales_are_refused_by_name(stand_in):
    out, operands = torch.empty(5, 16, dtype=torch.bfloat16), _operands()
    with pytest.raises(ValueError, match="w13_bias"):
        _apply(FlashInferCutlassExperts(), operands, out, beside={"w13_bias": torch.zeros(4, 16)})
    quant = ExpertsQuantization(QuantScheme.FP8_W8A8, torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="quant: expected None for flashinfer_cutlass, got fp8_w8a8"):
        _apply(FlashInferCutlassExperts(), operands, out, beside={"quant": quant})
    assert not stand_in


def test_ids_become_local_and_others_are_passed_over():
    ids = torch.tensor([[0, 5], [-1, 7], [8, 3]], dtype=torch.int64)
    assert local_expert_ids(ids, MAP, 8).tolist() == [[0, 3], [-1, -1], [-1, 2]]
    assert local_expert_ids(ids, None, 8).tolist() == [[0, 5], [-1, 7], [-1, 3]]
    assert local_expert_ids(ids, None, 8).dtype == torch.int32


def test_the_names_of_the_modules_follow_flashinfers_dispatch():
    assert flashinfer_cutlass._MODULES[(9, 0)] == "fused_moe_90"
    assert (10, 1) not in flashinfer_cutlass._MODULES
