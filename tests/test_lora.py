"""Adapters on experts: what the suite's own cases do not reach, and the table's manners."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from moegate.conformance.lora_cases import LoraAdapter, LoraCase, LoraMatrix, LoraSpec, build_lora, pinned_lora
from moegate.conformance.properties.lora import judge_element, loaded, truth_of
from moegate.conformance.session import INTERPRETED
from moegate.conformance.subjects.moegate import MoegateSubject
from moegate.impl.config import MoEConfig
from moegate.impl.experts_module import RoutedExperts
from moegate.impl.fused_moe import fused_experts
from moegate.impl.layer import Gate, MoELayer, RoutingMethod
from moegate.impl.lora.adapter import Adapter, LowRank, lora_scaling
from moegate.impl.lora.table import RANKS, AdapterTable
from moegate.impl.oracle.call import experts_of_call
from moegate.impl.path import record_path
from moegate.impl.quantization import ActivationScale
from moegate.impl.quantize import quantize_activations, quantize_experts
from moegate.impl.tuning.kernel_config import KernelConfig, use_kernel_configs
from moegate.reference.lora import scaling

SUBJECT = MoegateSubject()
NUMERICS = SUBJECT.numerics
BACKEND = "triton" if INTERPRETED or torch.cuda.is_available() else "cpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
make = partial(SUBJECT.lora, variant=BACKEND)
needs_triton = pytest.mark.skipif(BACKEND != "triton", reason="Triton needs a GPU or its interpreter")
E, H, I = 4, 32, 16


def holds(spec: LoraSpec, **changes: Any) -> None:
    case = replace(build_lora(spec, DEVICE), **changes)
    (verdict,) = judge_element(case, loaded(make, case).run(case.lora_ids), truth_of(case, NUMERICS))
    assert verdict.holds, verdict.detail


def table(**options: Any) -> AdapterTable:
    sizes = {"num_experts": E, "hidden_size": H, "intermediate_size": I, "dtype": torch.float32, "device": DEVICE}
    return AdapterTable(**{"num_slots": 2, "max_rank": 8} | sizes | options)


def adapter(
    rank: int = 4, experts: range = range(E), scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def pair(n: int, k: int) -> LowRank:
        a, b = torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator)
        return LowRank(a.to(dtype), b.to(dtype), scale)

    parts = {"gate": (I, H), "up": (I, H), "down": (H, I)}
    return Adapter(**{name: {e: pair(*size) for e in experts} for name, size in parts.items()})


def call(adapters: AdapterTable | None, lora_ids: torch.Tensor | None, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x, w13, w2 = (torch.randn(*s, generator=generator) / 4 for s in ((6, H), (E, 2 * I, H), (E, H, I)))
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]], dtype=torch.int32)
    operands = (t.to(DEVICE) for t in (x, w13, w2, torch.full((6, 2), 0.5), ids))
    return fused_experts(*operands, adapters=adapters, lora_ids=lora_ids, backend=BACKEND, **options)


def ids_of(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int32, device=DEVICE)


@needs_triton
@pytest.mark.parametrize(("block_m", "swap_ab"), [(64, False), (32, True)])
def test_more_rows_of_one_adapter_than_a_round_takes(block_m: int, swap_ab: bool) -> None:
    """A block of 64 rows with one adapter is shrunk in four rounds."""
    spec = LoraSpec(70, 64, 32, 2, 1, ranks="one", tokens="all", routing="one_expert")
    with use_kernel_configs(KernelConfig(block_m, 32, 32, 1, 4, 1, swap_ab)):
        holds(spec)
        holds(replace(spec, ranks="many", tokens="mixed", M=90))


@needs_triton
def test_a_tile_that_fills_its_registers_keeps_the_bits_of_the_base() -> None:
    spec = LoraSpec(40, 64, 256, 2, 1, ranks="mixed", dtype="bfloat16")
    case = build_lora(spec, DEVICE)
    with use_kernel_configs(KernelConfig(64, 256, 32, 1, 4, 1)):
        layer = loaded(make, case)
        none = case.lora_ids < 0
        assert torch.equal(layer.run(case.lora_ids)[none], layer.run(None)[none])
        holds(spec)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU's tests have it on a real layer")
def test_8192_groups_of_adapter_and_expert() -> None:
    """64 adapters on 128 experts; each token has its own adapter."""
    experts, slots = 128, 64
    held = table(num_slots=slots, num_experts=experts, hidden_size=16, intermediate_size=8)
    generator = torch.Generator().manual_seed(1)
    b, a = torch.randn(16, 1, generator=generator), torch.randn(1, 8, generator=generator)
    for slot in range(slots):
        held.load(Adapter(down={e: LowRank(a, b, float(slot * experts + e + 1)) for e in range(experts)}), slot)
    x = torch.randn(slots, 16, generator=generator)
    w13, w2 = torch.randn(experts, 16, 16, generator=generator), torch.zeros(experts, 16, 8)
    ids = torch.stack([torch.arange(slots), 127 - torch.arange(slots)], dim=1).to(torch.int32)
    out = fused_experts(
        *(x, w13, w2, torch.ones(slots, 2), ids),
        adapters=held,
        lora_ids=torch.arange(slots, dtype=torch.int32),
        backend="triton",
    )
    want = torch.zeros_like(out)
    for token in range(slots):
        for expert in ids[token].tolist():
            gate, up = (x[token] @ w13[expert].T).chunk(2)
            want[token] += (token * experts + expert + 1) * (b @ (a @ (torch.nn.functional.silu(gate) * up)))
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-3)


def test_every_kind_of_null_layer_is_rejected_by_the_value_property() -> None:
    judged = 0
    for spec in pinned_lora("cpu", replace(SUBJECT.capabilities, schemes=("none",)))[:12]:
        case = build_lora(spec)
        truth = truth_of(case, NUMERICS)
        alone = truth_of(replace(case, lora_ids=torch.full_like(case.lora_ids, -1)), NUMERICS).output
        for wrong in (torch.zeros_like(alone), alone, truth.output.roll(1, 0)):
            if case.is_batched or not (truth.used(wrong) > 1).any():
                continue
            (verdict,) = judge_element(case, wrong.to(case.layer.hidden_states.dtype), truth)
            judged += 1
            assert not verdict.holds, f"LORA-02 accepts a wrong layer on {spec!r}"
    assert judged > 15


def test_three_percent_on_an_adapters_scale_are_seen() -> None:
    seen = 0
    for seed in range(6):
        case = build_lora(LoraSpec(9, 64, 32, 4, 2, ranks="one", tokens="all", dtype="float32", seed=seed))

        def scaled(part: dict[int, LoraMatrix]) -> dict[int, LoraMatrix]:
            return {e: replace(m, scale=1.03 * m.scale) for e, m in part.items()}

        wrong = LoraAdapter(*(scaled(part) for part in vars(case.adapters[0]).values()))
        other = truth_of(replace(case, adapters=(wrong,)), NUMERICS).output
        (verdict,) = judge_element(case, other.float(), truth_of(case, NUMERICS))
        seen += not verdict.holds
    assert seen == 6


def test_scaling_is_that_of_lora_and_of_rslora() -> None:
    assert (lora_scaling(16, 64), scaling(16, 64)) == (0.25, 0.25)
    assert (lora_scaling(16, 64, rank_stabilized=True), scaling(16, 64, rank_stabilized=True)) == (2.0, 2.0)


def test_an_evicted_slot_adds_nothing_and_is_taken_next() -> None:
    held = table()
    assert (held.load(adapter()), held.load(adapter(seed=1))) == (0, 1)
    ids = ids_of(0, 1, 0, -1, 1, 0)
    both = call(held, ids)
    held.evict(0)
    after = call(held, ids)
    assert held.loaded == (1,)
    assert torch.equal(after[ids == 0], call(None, None)[ids == 0])
    assert torch.equal(after[ids == 1], both[ids == 1])
    assert held.load(adapter()) == 0
    assert torch.equal(call(held, ids), both)


def test_a_full_table_refuses_and_stays_as_it_was() -> None:
    held = table(num_slots=1)
    held.load(adapter())
    ids = ids_of(0, 0, 0, 0, 0, -1)
    before = call(held, ids)
    with pytest.raises(ValueError, match="adapter: expected an empty slot, got a full table of 1"):
        held.load(adapter(seed=9))
    assert torch.equal(call(held, ids), before)
    assert held.loaded == (0,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused_and_the_table_is_as_it_was(value: float) -> None:
    held = table(num_slots=1)
    held.load(adapter())
    ids = ids_of(0, 0, 0, 0, 0, -1)
    before, bad = call(held, ids), adapter(seed=9)
    bad.up[2].b[0, 0] = value
    with pytest.raises(ValueError, match=r"adapter\.up\[2\]\.b: expected finite numbers, got NaN or infinity"):
        held.load(bad, 0)
    assert torch.equal(call(held, ids), before)


@pytest.mark.parametrize("slot", [2, -1])
def test_only_what_is_there_is_evicted(slot: int) -> None:
    with pytest.raises(ValueError, match="slot: expected"):
        table().evict(slot)
    with pytest.raises(ValueError, match="slot: expected one of the loaded"):
        table().evict(0)


def test_stray_ids_cost_their_own_contribution_alone_and_are_seen_by_debug_checks() -> None:
    held = table()
    held.load(adapter(), 1)
    ids = ids_of(1, 2, 1 << 30, -7, 1, -1)
    out, alone = call(held, ids), call(None, None)
    stray = ids != 1
    assert torch.equal(out[stray], alone[stray])
    assert not torch.equal(out, alone)
    from moegate.impl.checks import debug_checks

    with debug_checks(), pytest.raises(ValueError, match=r"lora_ids: expected -1 or a loaded slot of \[1\], got 2"):
        call(held, ids)
    with debug_checks(), pytest.raises(ValueError, match="got 0"):
        call(held, ids_of(0, 1, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.zeros(5, dtype=torch.int32), ValueError, "lora_ids: expected shape"),
        (torch.zeros(6, dtype=torch.int64), TypeError, "lora_ids: expected dtype"),
        (torch.zeros((6, 1), dtype=torch.int32), ValueError, "lora_ids: expected shape"),
        ([0] * 6, TypeError, "lora_ids: expected a tensor"),
    ],
)
def test_ids_of_another_form_are_refused(ids: Any, error: type[Exception], words: str) -> None:
    ids = ids.to(DEVICE) if isinstance(ids, torch.Tensor) else ids
    with pytest.raises(error, match=words):
        call(table(), ids)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hidden_size": 64}, ValueError, "adapters: expected a table with H 32, got 64"),
        ({"num_experts": 5}, ValueError, "adapters: expected a table with E_local 4, got 5"),
        ({"intermediate_size": 8}, ValueError, "adapters: expected a table with I 16, got 8"),
        ({"dtype": torch.bfloat16}, TypeError, "adapters: expected a table of dtype torch.float32"),
        ({"interleaved": True}, ValueError, "adapters: expected a table with is_gated True and interleaved False"),
    ],
)
def test_a_table_of_another_layer_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(table(**options), ids_of(*[-1] * 6))


def test_ids_without_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match="lora_ids: expected None without adapters"):
        call(None, ids_of(*[-1] * 6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_slots": 0}, "num_slots: expected"),
        ({"max_rank": 257}, "max_rank: expected"),
        ({"expert_map": [0, 1]}, "expert_map: expected one entry for each of 4"),
        ({"expert_map": [0, 0, -1, -1]}, "expert_map: expected -1, or each local id"),
        ({"interleaved": True, "is_gated": False}, "interleaved: expected False"),
    ],
)
def test_a_table_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        table(**options)


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 100, 256])
def test_widths_come_from_a_small_pool(rank: int) -> None:
    assert table(max_rank=rank, hidden_size=1, intermediate_size=1).w2.width == max(16, 1 << (rank - 1).bit_length())
    assert all(width % 16 == 0 for width in RANKS)


def test_a_batch_that_the_host_knows_to_have_none_launches_nothing_of_lora() -> None:
    held = table()
    held.load(adapter())
    with record_path() as path:
        call(held, None)
    assert not any(name.startswith("lora") for name in path.launches)
    if BACKEND == "triton":
        with record_path() as path:
            call(held, ids_of(*[-1] * 6))
        assert path.launches["lora_shrink_kernel"] == 2


def test_a_table_makes_the_oracle_take_triton_on_a_gpu_where_flashinfer_would_be_asked_for(monkeypatch) -> None:
    from moegate.impl.platform import Platform

    monkeypatch.setenv("MOEGATE_BACKEND", "flashinfer_cutlass")
    config = MoEConfig(E, 2, H, I, is_lora_enabled=True)
    decided = experts_of_call(
        *("auto", Platform.parse("cuda:10.0"), config.activation_format, E, 2, H, I, config.dtype, config.scheme),
        *(None, config.activation, False, False, True, 1),
    )
    assert decided.backend == "triton"


@pytest.mark.parametrize("rows", [6, 40])
@pytest.mark.parametrize(
    ("weight_scale", "scale"), [("channel", ActivationScale.TOKEN), ("block", ActivationScale.GROUP)]
)
def test_adapters_see_tokens_that_come_quantised_times_their_scales(
    weight_scale: str, scale: ActivationScale, rows: int
) -> None:
    """Scales are powers of two, so what was quantised comes back exactly, and the outputs are equal bit for bit."""
    generator = torch.Generator().manual_seed(7)
    groups = 2 if scale is ActivationScale.GROUP else 1
    few_bits = torch.randn(rows, groups, H // groups, generator=generator).mul(64).to(torch.float8_e4m3fn).float()
    few_bits[..., 3] = 448.0
    powers = torch.exp2(torch.randint(-9, -4, (rows, groups, 1), generator=generator).float())
    x = (few_bits * powers).reshape(rows, H).to(DEVICE, torch.float16)
    w13, w2, quant = quantize_experts(
        (torch.randn(E, 2 * I, H, generator=generator) / 6).to(DEVICE),
        (torch.randn(E, H, I, generator=generator) / 4).to(DEVICE),
        "fp8_w8a8",
        weight_scale=weight_scale,
        per_act_token_quant=groups == 1,
        block_shape=None if groups == 1 else (16, 16),
    )
    values, input_scale = quantize_activations(x, torch.float8_e4m3fn, scale, group=0 if groups == 1 else 16)
    ids = torch.stack([torch.arange(rows) % E, torch.arange(rows) * 3 % E], dim=1).to(DEVICE, torch.int32)
    ids[:, 1] = torch.where(ids[:, 0] == ids[:, 1], -1, ids[:, 1])
    adapters = table(dtype=torch.float16)
    adapters.load(adapter(dtype=torch.float16))
    adapters.load(adapter(rank=8, seed=1, dtype=torch.float16))
    lora_ids = (torch.arange(rows) % 3 - 1).to(DEVICE, torch.int32)
    options = {"quant": quant, "adapters": adapters, "lora_ids": lora_ids, "backend": BACKEND}
    operands = (w13, w2, torch.full(ids.shape, 0.5, device=DEVICE), ids)
    plain = fused_experts(x, *operands, **options)
    without = fused_experts(x, *operands, quant=quant, backend=BACKEND)
    out = torch.empty_like(x)
    fused_experts(values, *operands, **options, input_scale=input_scale, out=out)
    assert torch.equal(plain, out)
    assert not torch.equal(plain, without)


def test_a_layer_takes_a_table_and_ids() -> None:
    generator = torch.Generator().manual_seed(5)
    gate, w13, w2, x = (
        torch.randn(*s, generator=generator).to(DEVICE) / 4 for s in ((E, H), (E, 2 * I, H), (E, H, I), (6, H))
    )
    experts = RoutedExperts(w13, w2, dtype=torch.float32, backend=BACKEND)
    held = table()
    held.load(adapter())
    layer = MoELayer(Gate(gate), experts, RoutingMethod(2), adapters=held).prepare((0, 2))
    plain = MoELayer(Gate(gate), experts, RoutingMethod(2))
    ids = ids_of(0, -1, 0, -1, -1, 0)
    out, alone = layer(x, ids), plain(x)
    assert torch.equal(layer(x), alone)
    assert torch.equal(out[ids < 0], alone[ids < 0])
    assert (out[ids == 0] != alone[ids == 0]).any(dim=1).all()
    with pytest.raises(ValueError, match="lora_ids: expected None without adapters"):
        plain(x, ids)


def test_a_case_of_the_suite_says_what_it_holds() -> None:
    case = build_lora(LoraSpec(5, H, I, E, 2, adapted="shared_a"))
    assert isinstance(case, LoraCase)
    assert case.max_rank == 16
    assert all(not a.gate and not a.up and a.gate_up for a in case.adapters)


def test_a_promise_not_to_round_between_a_and_b_uses_more_of_the_budget() -> None:
    used = {"storage": 0.0, "float32": 0.0}
    for seed in range(8):
        case = build_lora(LoraSpec(16, 64, 48, 4, 2, ranks="many", tokens="all", seed=seed))
        rows = loaded(partial(SUBJECT.lora, variant="cpu"), case).run(case.lora_ids).double()
        for claimed in used:
            truth = truth_of(case, replace(NUMERICS, shrunk=claimed))
            allowed = (truth.sigma**2 + truth.last**2).sum(dim=1).sqrt()
            used[claimed] += float(((rows - truth.output).norm(dim=1) / allowed).mean())
    assert used["float32"] > 1.03 * used["storage"]
