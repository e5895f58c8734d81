"""Adapters from PEFT's files, judged by PEFT's own merge on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moegate.impl.fused_moe import fused_experts
from moegate.impl.lora.adapter import Adapter
from moegate.impl.lora.peft import CONFIG, WEIGHTS, load_peft
from moegate.impl.lora.table import AdapterTable

peft = pytest.importorskip("peft")
E, H, I, RANK = 3, 16, 12, 4
SIZES = {"layer": 1, "num_experts": E, "hidden_size": H, "intermediate_size": I}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, I, bias=False), nn.Linear(H, I, bias=False)
        self.down_proj = nn.Linear(I, H, bias=False)


class Stacked(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        gate_up, down = ((E, H, 2 * I), (E, I, H)) if is_transposed else ((E, 2 * I, H), (E, H, I))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(s) / 4) for s in (gate_up, down))


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = experts
        self.q_proj = nn.Linear(H, H)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()

        def experts() -> nn.Module:
            if kind == "modules":
                return nn.ModuleList(Expert() for _ in range(E))
            return Stacked(is_transposed=kind == "transposed")

        self.layers = nn.ModuleList(Layer(experts()) for _ in range(2))


def weights(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 and w2 of layer 1."""
    experts = model.layers[1].mlp.experts
    if isinstance(experts, nn.ModuleList):
        w13 = [torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in experts]
        return torch.stack(w13).detach(), torch.stack([e.down_proj.weight for e in experts]).detach()
    w13, w2 = experts.gate_up_proj.detach(), experts.down_proj.detach()
    return (w13.mT.contiguous(), w2.mT.contiguous()) if experts.is_transposed else (w13, w2)


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"alpha_pattern": {r"experts\.1\.up_proj": 3, "down_proj": 20}, "rank_pattern": {"gate_proj": 2}},
}


def saved(kind: str, options: str, folder: Path) -> tuple[Model, Model]:
    """A model, and the same with an adapter merged by PEFT, whose files are in `folder`."""
    torch.manual_seed(7)
    model = Model(kind)
    base = Model(kind)
    base.load_state_dict(model.state_dict())
    if kind == "modules":
        target = {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]}
    else:
        target = {"target_modules": ["q_proj"]}
        target["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=10, init_lora_weights=False, **target, **OPTIONS[options])
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(folder)
    return base, wrapped.merge_and_unload()


def agree(adapter: Adapter, base: Model, merged: Model) -> None:
    """A token with the adapter goes through the merged layer."""
    table = AdapterTable(2, RANK, num_experts=E, hidden_size=H, intermediate_size=I, dtype=torch.float32, device="cpu")
    slot = table.load(adapter, 1)
    x, ids = torch.randn(5, H), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]], dtype=torch.int32)
    routing = torch.rand(5, 2)
    lora_ids = torch.full((5,), slot, dtype=torch.int32)
    got = fused_experts(x, *weights(base), routing, ids, adapters=table, lora_ids=lora_ids, backend="cpu")
    want = fused_experts(x, *weights(merged), routing, ids, backend="cpu")
    alone = fused_experts(x, *weights(base), routing, ids, backend="cpu")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - alone).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["modules", "rows_first", "transposed"])
@pytest.mark.parametrize("options", ["plain", "rslora"])
def test_a_loaded_adapter_is_what_peft_merges(kind: str, options: str, tmp_path: Path) -> None:
    base, merged = saved(kind, options, tmp_path)
    agree(load_peft(tmp_path, **SIZES), base, merged)


def test_patterns_of_rank_and_alpha_are_those_of_the_modules(tmp_path: Path) -> None:
    base, merged = saved("modules", "patterns", tmp_path)
    adapter = load_peft(tmp_path, **SIZES)
    assert adapter.gate[0].rank == 2
    assert adapter.up[0].rank == RANK
    agree(adapter, base, merged)


def test_another_layer_has_its_own_adapter_and_a_missing_one_none(tmp_path: Path) -> None:
    saved("modules", "plain", tmp_path)
    first, second = (load_peft(tmp_path, **SIZES | {"layer": layer}) for layer in (0, 1))
    assert not torch.equal(first.gate[0].a, second.gate[0].a)
    assert load_peft(tmp_path, **SIZES | {"layer": 5}).largest_rank == 0


def test_an_adapter_is_converted_where_asked_for(tmp_path: Path) -> None:
    saved("rows_first", "plain", tmp_path)
    assert load_peft(tmp_path, **SIZES, dtype=torch.bfloat16).down[2].b.dtype is torch.bfloat16


def test_a_stacked_pair_of_an_earlier_release_is_turned_round(tmp_path: Path) -> None:
    saved("rows_first", "plain", tmp_path)
    today = load_peft(tmp_path, **SIZES)
    tensors = load_file(tmp_path / WEIGHTS)
    for name in [n for n in tensors if "experts" in n and "lora_A" in n]:
        a, b = tensors[name], tensors[other := name.replace("lora_A", "lora_B")]
        each = [(x, y) for x, y in zip(a.reshape(E, RANK, -1), b.reshape(-1, RANK, E).permute(2, 0, 1), strict=True)]
        tensors[name] = torch.cat([y.T for _, y in each]).contiguous()
        tensors[other] = torch.stack([x.T for x, _ in each], dim=2).flatten(1).contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    turned = load_peft(tmp_path, **SIZES)
    for part in ("gate_up", "down"):
        for expert, low_rank in getattr(today, part).items():
            assert torch.equal(getattr(turned, part)[expert].a, low_rank.a)
            assert torch.equal(getattr(turned, part)[expert].b, low_rank.b)


def _without_b(tensors: dict, config: dict) -> None:
    del tensors[next(n for n in tensors if "layers.1" in n and "experts" in n and "lora_B" in n)]


def _without_a(tensors: dict, config: dict) -> None:
    del tensors[next(n for n in tensors if "layers.1" in n and "experts" in n and "lora_A" in n)]


def _strange(tensors: dict, config: dict) -> None:
    tensors["base_model.model.layers.1.mlp.experts.0.gate_proj.lora_magnitude_vector"] = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_b, "expected its lora_B"),
        (_without_a, "expected its lora_A"),
        (_strange, "expected lora_A and lora_B"),
        (lambda tensors, config: config.update(use_dora=True), "use_dora: expected False"),
        (lambda tensors, config: config.update(peft_type="LOHA"), "peft_type: expected 'LORA'"),
        (lambda tensors, config: config.update(bias="all"), "bias: expected 'none'"),
    ],
)
def test_files_that_say_something_else_are_refused(change, words: str, tmp_path: Path) -> None:
    saved("modules", "plain", tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        load_peft(tmp_path, **SIZES)


@pytest.mark.parametrize("change", [{"hidden_size": 20}, {"num_experts": 5}])
def test_a_stacked_adapter_of_another_model_is_refused(change: dict, tmp_path: Path) -> None:
    saved("rows_first", "plain", tmp_path)
    with pytest.raises(ValueError, match="expected"):
        load_peft(tmp_path, **SIZES | change)
