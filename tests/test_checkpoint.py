"""Loading by public names: what is refused, all at once, and what becomes of 4 and 8 bits."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from moegate.conformance.values import integers, on_grid
from moegate.impl import once
from moegate.impl.checkpoint import CheckpointError, load_layer
from moegate.impl.checkpoint_models import MODELS, plan_of
from moegate.impl.config import ParallelConfig
from moegate.impl.mxfp4 import dequantize_mxfp4

E, H, I = 4, 64, 64
MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "hidden_size": H,
    "intermediate_size": I,
    "hidden_act": "silu",
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "hidden_size": H,
    "moe_intermediate_size": I,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]},
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": E,
    "experts_per_token": 2,
    "hidden_size": H,
    "intermediate_size": I,
    "swiglu_limit": 7.0,
    "quantization_config": {"quant_method": "mxfp4"},
}
X = on_grid(1, "x", (5, H), torch.bfloat16)


def _values(name, *shape, dtype=torch.bfloat16):
    return on_grid(2, name, shape, dtype, exponent=-2)


def _mixtral(prefix="model.layers.0.block_sparse_moe."):
    entries = {f"{prefix}gate.weight": _values("gate", E, H)}
    for expert in range(E):
        for name, shape in (("w1", (I, H)), ("w2", (H, I)), ("w3", (I, H))):
            entry = f"{prefix}experts.{expert}.{name}.weight"
            entries[entry] = _values(entry, *shape)
    return entries


def _gpt_oss_mxfp4(prefix="model.layers.0.mlp."):
    entries = {f"{prefix}router.weight": _values("router", E, H), f"{prefix}router.bias": _values("bias", E)}
    for name, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        blocks = integers(1, f"{name}_blocks", (E, rows, columns // 32, 16), 0, 256)
        entries[f"{prefix}experts.{name}_blocks"] = blocks.to(torch.uint8)
        entries[f"{prefix}experts.{name}_scales"] = integers(1, name, (E, rows, columns // 32), 122, 126).to(
            torch.uint8
        )
        entries[f"{prefix}experts.{name}_bias"] = _values(f"{name}_bias", E, rows)
    return entries


def _deepseek(prefix="model.layers.0.mlp."):
    entries = {f"{prefix}gate.weight": _values("gate", E, H)}
    entries[f"{prefix}gate.e_score_correction_bias"] = _values("correction", E, dtype=torch.float32)
    for place in (*(f"experts.{expert}." for expert in range(E)), "shared_experts."):
        for name, shape in (("gate_proj", (I, H)), ("up_proj", (I, H)), ("down_proj", (H, I))):
            entry = f"{prefix}{place}{name}.weight"
            entries[entry] = _values(entry, *shape).to(torch.float8_e4m3fn)
            scale = _values(f"{entry}s", shape[0] // 32, shape[1] // 32, dtype=torch.float32)
            entries[f"{entry}_scale_inv"] = scale.abs()
    return entries


def test_everything_that_is_wrong_is_one_error_that_lists_it():
    entries = _mixtral()
    prefix = "model.layers.0.block_sparse_moe."
    del entries[f"{prefix}experts.1.w2.weight"], entries[f"{prefix}gate.weight"]
    entries[f"{prefix}experts.10.w1.weight"] = torch.zeros(I, H)
    entries[f"{prefix}experts.9.w1.weight"] = torch.zeros(I, H)
    entries[f"{prefix}experts.0.w1.weight"] = torch.zeros(I, H + 1)
    entries[f"{prefix}experts.2.w3.weight"] = torch.zeros(I, H, dtype=torch.int32)
    entries["model.layers.1.block_sparse_moe.gate.weight"] = torch.zeros(1)  # another layer's business
    with pytest.raises(CheckpointError, match=r"2 missing.*2 unexpected.*2 misshapen") as refusal:
        load_layer(entries, MIXTRAL)
    assert refusal.value.missing == ["gate.weight", "experts.1.w2.weight"]
    assert refusal.value.unexpected == ["experts.9.w1.weight", "experts.10.w1.weight"]
    assert refusal.value.misshapen == [
        "experts.0.w1.weight (expected [64, 64] torch.bfloat16 or torch.float16 or torch.float32, "
        "got [64, 65] torch.float32)",
        "experts.2.w3.weight (expected [64, 64] torch.bfloat16 or torch.float16 or torch.float32, "
        "got [64, 64] torch.int32)",
    ]


def test_files_and_state_dicts_load_alike(tmp_path):
    entries = _mixtral("model.layers.3.block_sparse_moe.")
    names = sorted(entries)
    save_file({name: entries[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: entries[name] for name in names[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    expected = load_layer(entries, MIXTRAL, layer=3)(X)
    assert torch.equal(load_layer(tmp_path, MIXTRAL, layer=3)(X), expected)
    save_file(entries, tmp_path / "all.safetensors")
    assert torch.equal(load_layer(str(tmp_path / "all.safetensors"), MIXTRAL, layer=3)(X), expected)
    with pytest.raises(ValueError, match="expected each entry in one file"):
        load_layer(tmp_path, MIXTRAL, layer=3)


def test_a_rank_of_experts_needs_its_own_entries_alone():
    entries = _mixtral()
    mine = {name: t for name, t in entries.items() if not name.split("experts.")[-1].startswith(("0.", "1."))}
    layer = load_layer(mine, MIXTRAL, parallel=ParallelConfig(ep_size=2, ep_rank=1))
    assert layer.expert_map is not None
    assert layer.expert_map.tolist() == [-1, -1, 0, 1]
    assert torch.equal(layer.experts.w2[0], entries["model.layers.0.block_sparse_moe.experts.2.w2.weight"])
    with pytest.raises(CheckpointError, match=r"6 missing: experts\.0\.w1\.weight"):
        load_layer(mine, MIXTRAL)


def test_the_layer_keeps_no_memory_of_the_state_dict():
    entries = _mixtral()
    layer = load_layer(entries, MIXTRAL)
    expected = layer(X)
    for tensor in entries.values():
        tensor.zero_()
    assert torch.equal(layer(X), expected)


def test_mxfp4_is_dequantised_and_said_so(caplog):
    entries = _gpt_oss_mxfp4()
    once.forget()
    with caplog.at_level(logging.WARNING, logger="moegate.impl.checkpoint"):
        layer = load_layer(entries, GPT_OSS)
    note = "MXFP4 experts were dequantised to torch.bfloat16 on load: moegate multiplies no 4-bit floats"
    assert layer.loading_notes == (note,)
    assert note in caplog.text
    # The same layer by its bf16 names: transposed, gate and up rows in turn.
    plain = {}
    for name, tensor in entries.items():
        if name.endswith("_blocks"):
            weight = dequantize_mxfp4(tensor, entries[name.replace("_blocks", "_scales")], torch.bfloat16)
            plain[name.removesuffix("_blocks")] = weight.transpose(1, 2).contiguous()
        elif not name.endswith("_scales"):
            plain[name] = tensor
    other = load_layer(plain, GPT_OSS)
    assert other.loading_notes == ()
    assert torch.equal(layer(X), other(X))


def test_e2m1_and_e8m0_are_exact():
    blocks = torch.tensor([[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2] * 3], dtype=torch.uint8)
    numbers = dequantize_mxfp4(blocks, torch.tensor([[127, 125, 255]], dtype=torch.uint8), torch.float32)[0]
    expected = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = torch.tensor([*expected, *(-value for value in expected)] * 2)
    assert torch.equal(numbers[:32], expected)
    assert torch.equal(numbers[32:64], expected / 4)
    assert numbers[64:].isnan().all()


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_fp8_blocks_stay_as_they_are(ranks, rank):
    entries, prefix = _deepseek(), "model.layers.0.mlp."
    layer = load_layer(entries, DEEPSEEK, parallel=ParallelConfig(tp_size=ranks, tp_rank=rank))
    assert layer.gate.weight.dtype == torch.float32
    assert layer(X).isfinite().all()
    part, scales = slice(rank * I // ranks, I // ranks * (rank + 1)), slice(rank * 2 // ranks, 2 // ranks * (rank + 1))
    parts = [(layer.experts, e, f"experts.{e}.") for e in range(E)]
    for experts, e, place in [*parts, (layer.shared_experts.expert, 0, "shared_experts.")]:
        gate, up, down = (entries[f"{prefix}{place}{name}_proj.weight"].float() for name in ("gate", "up", "down"))
        assert torch.equal(experts.w13[e].float(), torch.cat([gate[part], up[part]]))
        assert torch.equal(experts.w2[e].float(), down[:, part])
        gate, up, down = (entries[f"{prefix}{place}{name}_proj.weight_scale_inv"] for name in ("gate", "up", "down"))
        assert torch.equal(experts.quant.w13_scale[e], torch.cat([gate[scales], up[scales]]))
        assert torch.equal(experts.quant.w2_scale[e], down[:, scales])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, r"config\.model_type: expected one of"),
        ({"num_local_experts": None}, "config: expected num_local_experts, got none of them"),
        ({"num_local_experts": 0}, r"config\.num_local_experts: expected an integer of at least 1, got 0"),
        ({"hidden_act": "gelu"}, r"config\.hidden_act: expected one of \['silu'\], got 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, r"config\.quantization_config: expected quant_method 'fp8'"),
    ],
)
def test_a_configuration_that_is_not_known_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        plan_of(MIXTRAL | change)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: load_layer(3, MIXTRAL), TypeError, "checkpoint: expected a state dict, a file or a folder, got int"),
        (lambda: load_layer("/nowhere", MIXTRAL), ValueError, "checkpoint: expected safetensors files"),
        (lambda: load_layer({}, MIXTRAL, dtype=torch.int8), TypeError, "dtype: expected one of"),
        (
            lambda: load_layer(_mixtral(), MIXTRAL, parallel=ParallelConfig(tp_size=3)),
            ValueError,
            "tp_size: expected a divisor of intermediate_size 64, got 3",
        ),
        (
            lambda: load_layer(_deepseek(), DEEPSEEK, parallel=ParallelConfig(tp_size=4)),
            ValueError,
            "tp_size: expected shards of whole blocks",
        ),
        (lambda: load_layer(_mixtral(), MIXTRAL, backend="none"), ValueError, "backend"),
    ],
)
def test_a_bad_argument_is_refused_by_name(call, error, named):
    with pytest.raises(error, match=named):
        call()


def test_every_model_of_the_issue_has_its_names():
    assert set(MODELS) == {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"}
