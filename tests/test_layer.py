"""The whole layer on the CPU: what it adds up, in which order, what it refuses, and how a compiler takes it."""

import copy
import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from layers import SHARED_I, E, H, I, experts_of, gate_of, layer_of, quantised_shared, shared_of, tokens, values
from lora_tables import table_of
from torch import nn

from moegate.impl import layer as layer_module
from moegate.impl.experts_module import RoutedExperts, SharedExperts
from moegate.impl.fused_shared import append_shared_experts, can_fuse_shared_experts, fuse_shared_experts
from moegate.impl.layer import MoELayer, RoutingMethod
from moegate.impl.ops import quantization_arguments
from moegate.impl.path import record_path
from moegate.impl.quantization import ExpertsQuantization
from moegate.impl.routing import select_experts
from moegate.impl.shared_experts import SharedExpertsOrder, SharedExpertsSetting


def _parts(layer, x):
    """Routed and shared output by the layer's own parts, called one by one."""
    weights, ids = select_experts(layer.gate(x), layer.routing.top_k)
    return layer.experts(x, weights, ids), layer.shared_experts(x)


# --- the sum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "sigmoid_gate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_layer_is_the_sum_of_its_parts(dtype, gated):
    layer, x = layer_of(dtype=dtype, gated=gated), tokens(5, dtype=dtype)
    routed, shared = _parts(layer, x)
    assert torch.equal(layer(x), routed + shared)


def test_shared_experts_may_be_stored_in_other_bits_than_the_routed_ones():
    layer = layer_of(shared=False)
    mixed = MoELayer(layer.gate, layer.experts, layer.routing, shared_experts=quantised_shared())
    x = tokens(5)
    routed, shared = _parts(mixed, x)
    assert torch.equal(mixed(x), routed + shared)
    plain = shared_of(gated=True)(x).float()
    assert (shared.float() - plain).norm() < 0.1 * plain.norm()


def test_any_leading_dimensions_are_taken_and_given_back():
    layer, x = layer_of(), tokens(6)
    flat = layer(x)
    assert torch.equal(layer(x.view(2, 3, H)), flat.view(2, 3, H))
    assert torch.equal(layer(x[0]), layer(x[:1])[0])


def test_the_ids_of_adapters_have_the_leading_dimensions_of_their_tokens():
    layer, x = layer_of(adapters=table_of(range(E))), tokens(6)
    ids = torch.tensor([0, -1, 1, 1, 0, -1], dtype=torch.int32)
    flat = layer(x, ids)
    assert torch.equal(layer(x.view(2, 3, H), ids.view(2, 3)), flat.view(2, 3, H))
    assert not torch.equal(flat, layer(x))


@pytest.mark.parametrize("options", [{}, {"adapters": table_of(range(E))}], ids=["plain", "adapters"])
def test_a_layer_is_prepared_with_adapters_and_without(options):
    layer = layer_of(**options)
    assert layer.prepare((0, 2)) is layer


def test_no_token_is_an_empty_result():
    assert layer_of()(tokens(0)).shape == (0, H)


def test_no_input_is_written():
    layer, x = layer_of(gated=True), tokens(5)
    before = [x.clone(), *(t.clone() for t in layer.buffers())]
    first = layer(x)
    assert all(torch.equal(a, b) for a, b in zip(before, [x, *layer.buffers()], strict=True))
    assert torch.equal(layer(x), first)


def test_a_shared_module_may_return_its_input():
    layer = layer_of(shared=False)
    x = tokens(5)
    identity = MoELayer(layer.gate, layer.experts, layer.routing, shared_experts=nn.Identity())
    expected = layer(x) + x
    before = x.clone()
    assert torch.equal(identity(x), expected)
    assert torch.equal(x, before)


# --- the order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "order"),
    [
        (None, "no_overlap"),
        (SharedExpertsSetting(uses_external_experts=True), "external"),
        (SharedExpertsSetting(fully_sharded_lora=True, uses_external_experts=True), "no_overlap"),
    ],
)
def test_the_record_of_the_path_holds_order_and_reasons(setting, order):
    layer = layer_of(setting=setting)
    with record_path() as record:
        layer(tokens(3))
    assert record.last("shared_experts_order") == order
    taken = [reason for reason in record.last("shared_experts_reasons") if reason["taken"]]
    assert [reason["order"] for reason in taken] == [order]


def test_without_shared_experts_the_order_is_none():
    with record_path() as record:
        layer_of(shared=False)(tokens(3))
    assert record.last("shared_experts_order") == "none"


class _Recording(nn.Module):
    def __init__(self, module, name, calls):
        super().__init__()
        self.module, self.name, self.calls = module, name, calls

    def forward(self, *arguments):
        self.calls.append(self.name)
        return self.module(*arguments)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(None, ["gate", "shared"]), (SharedExpertsSetting(uses_external_experts=True), ["shared", "gate"])],
    ids=["no_overlap", "external"],
)
def test_external_experts_run_first_and_others_after_the_routed_ones(setting, expected):
    layer, calls = layer_of(setting=setting), []
    gate = _Recording(layer.gate, "gate", calls)
    gate.weight, gate.e_score_correction_bias = layer.gate.weight, None
    layer.gate, layer.shared_experts = gate, _Recording(layer.shared_experts, "shared", calls)
    layer(tokens(3))
    assert calls == expected


@contextmanager
def _inline(work, stream, like):
    """`beside` without a device: the work first, as the fork comes first."""
    result = work()
    yield SimpleNamespace(joined=lambda: result)


def test_the_overlap_is_forked_before_the_gate_and_joined_in_the_sum(monkeypatch):
    layer, calls, x = layer_of(gated=True), [], tokens(5)
    serial = layer(x)
    monkeypatch.setattr(layer_module, "auxiliary_stream", lambda device: object())
    monkeypatch.setattr(layer_module, "beside", _inline)
    monkeypatch.setattr(
        layer_module,
        "order_of_call",
        lambda *a: SimpleNamespace(order=SharedExpertsOrder.MULTI_STREAM_OVERLAPPED, reasons=()),
    )
    gate = _Recording(layer.gate, "gate", calls)
    gate.weight, gate.e_score_correction_bias = layer.gate.weight, None
    layer.gate, layer.shared_experts = gate, _Recording(layer.shared_experts, "shared", calls)
    assert torch.equal(layer(x), serial)
    assert calls == ["shared", "gate"]


# --- ranks -------------------------------------------------------------------------------------------------------


def _shards(count, *, external):
    """The layer's tensor-parallel ranks, in float32; an external shared module is whole on each, as if reduced."""
    whole = layer_of(dtype=torch.float32, gated=True)
    ranks = []
    for rank in range(count):

        def part(weight, dim, rank=rank):
            return weight.chunk(count, dim=dim)[rank].contiguous()

        def rows(weight, part=part):
            gate, up = weight.chunk(2, dim=-2)
            return torch.cat([part(gate, -2), part(up, -2)], dim=-2)

        experts = RoutedExperts(rows(whole.experts.w13), part(whole.experts.w2, 2), dtype=torch.float32)
        shared = whole.shared_experts.expert
        mine = SharedExperts(
            rows(shared.w13)[0], part(shared.w2, 2)[0], gate=whole.shared_experts.gate, dtype=torch.float32
        )
        ranks.append((experts, whole.shared_experts if external else mine))
    return whole, ranks


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("external", [False, True], ids=["partial", "external"])
def test_the_shared_output_is_summed_over_the_ranks_once(count, external):
    whole, ranks = _shards(count, external=external)
    x = tokens(5, dtype=torch.float32)
    partial = []
    for reduces in (False, True):
        outputs = []
        for experts, shared in ranks:
            # The first round keeps what each rank hands to the reduction; the second gets its sum.
            total = sum(partial) if reduces else None
            layer = MoELayer(
                whole.gate,
                experts,
                whole.routing,
                shared_experts=shared,
                setting=SharedExpertsSetting(uses_external_experts=external),
                reduce=lambda mine, total=total: partial.append(mine.clone()) or mine if total is None else total,
            )
            outputs.append(layer(x))
    for output in outputs:
        torch.testing.assert_close(output, whole(x), rtol=1e-5, atol=1e-6)


# --- fusion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shared", [1, 2])
def test_fused_shared_experts_are_the_shared_experts(num_shared):
    layer, x = layer_of(shared=False, dtype=torch.float32), tokens(7, dtype=torch.float32)
    shared = shared_of(dtype=torch.float32, size=num_shared * I)
    apart = MoELayer(layer.gate, layer.experts, RoutingMethod(2, routed_scaling_factor=2.5), shared_experts=shared)
    w13, w2 = fuse_shared_experts(layer.experts.w13, layer.experts.w2, shared.expert.w13[0], shared.expert.w2[0])
    fused = MoELayer(
        layer.gate,
        RoutedExperts(w13, w2, dtype=torch.float32),
        RoutingMethod(2, routed_scaling_factor=2.5),
        num_fused_shared_experts=num_shared,
    )
    torch.testing.assert_close(fused(x), apart(x), rtol=1e-5, atol=1e-6)


def test_fusion_takes_no_slot_from_the_routed_experts():
    weights, ids = torch.rand(4, 3), torch.randint(0, E, (4, 3), dtype=torch.int32)
    ids[2] = -1
    more_weights, more_ids = append_shared_experts(weights, ids, E, 2)
    assert torch.equal(more_ids[:, :3], ids)
    assert torch.equal(more_weights[:, :3], weights)
    assert more_ids[:, 3:].tolist() == [[E, E + 1], [E, E + 1], [-1, -1], [E, E + 1]]
    assert (more_weights[:, 3:] == 1).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": SHARED_I + 1}, "no multiple"),
        ({"hidden_size": H // 2}, "hidden size 32 is not the routed experts' 64"),
        ({"size": I, "dtype": torch.float32}, "dtypes"),
    ],
)
def test_what_cannot_be_fused_is_refused_with_its_reason(changes, reason):
    experts, shared = experts_of(), shared_of(**changes).expert
    weights = (experts.w13, experts.w2, shared.w13[0], shared.w2[0])
    assert reason in can_fuse_shared_experts(*weights)
    with pytest.raises(ValueError, match="shared_experts: expected ones that can stand among the routed experts"):
        fuse_shared_experts(*weights)


# --- the compiler ------------------------------------------------------------------------------------------------


def test_torch_accepts_both_operators():
    layer, x = layer_of(gated=True), tokens(5)
    torch.library.opcheck(
        torch.ops.moegate.moe_layer.default, (x, [*layer.parameters(), *layer.buffers()], layer._handle)
    )
    experts = layer.experts
    weights, ids = select_experts(layer.gate(x), 2)
    rest = (None, None, None, *quantization_arguments(None), "silu", 1.702, 7.0, False, False, None, "auto", False)
    torch.library.opcheck(torch.ops.moegate.fused_experts.default, (x, experts.w13, experts.w2, weights, ids, *rest))
    # Weights in 8 bits, of integers: the check itself cannot compare fp8 on a CPU.
    quant = ExpertsQuantization("int8_w8a16", torch.ones(1, 2 * SHARED_I), torch.ones(1, H))
    shared = RoutedExperts(
        torch.ones(1, 2 * SHARED_I, H, dtype=torch.int8), torch.ones(1, H, SHARED_I, dtype=torch.int8), quant=quant
    )
    ones, zeros = torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int32)
    rest = (None, None, None, *quantization_arguments(shared.quant), *rest[12:])
    torch.library.opcheck(torch.ops.moegate.fused_experts.default, (x, shared.w13, shared.w2, ones, zeros, *rest))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiler_takes_the_layer_without_a_graph_break(backend):
    layer, x = layer_of(gated=True), tokens(6).view(2, 3, H)
    torch._dynamo.reset()

    def model(x):
        return layer(torch.nn.functional.silu(x)) + 1

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for count in (1, 2, 3):
        assert torch.equal(compiled(x[:count]), model(x[:count]))


def test_the_compiler_takes_experts_alone_without_a_graph_break():
    torch._dynamo.reset()
    x = tokens(5)
    for module in (shared_of(gated=True), quantised_shared()):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), module(x))


def test_the_compiled_layer_reads_weights_that_were_changed_in_place():
    torch._dynamo.reset()
    layer, x = layer_of(), tokens(5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = compiled(x).clone()
    layer.experts.w2.mul_(2)
    assert torch.equal(compiled(x), layer(x))
    assert not torch.equal(compiled(x), before)


def test_a_copy_is_a_layer_of_its_own_and_none_is_kept_alive():
    layer, x = layer_of(), tokens(3)
    twin = copy.deepcopy(layer)
    twin.experts.w2.zero_()
    twin.shared_experts.expert.w2.zero_()
    torch._dynamo.reset()
    assert (torch.compile(twin, fullgraph=True, backend="eager")(x) == 0).all()
    assert (layer(x) != 0).any()
    handle = twin._handle
    torch._dynamo.reset()
    del twin
    gc.collect()
    with pytest.raises(ValueError, match="handle: expected a layer that is alive"):
        torch.ops.moegate.moe_layer(x, [], handle)


# --- bad input ---------------------------------------------------------------------------------------------------


class _Wrong(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda x: x[:, :-1], ValueError, r"shared_experts' result: expected shape \[3, 64\], got \[3, 63\]"),
        (lambda x: x[None], ValueError, r"shared_experts' result: expected shape \[3, 64\], got 3 dimensions"),
        (lambda x: x.float(), TypeError, r"shared_experts' result: expected dtype torch.bfloat16, got torch.float32"),
        (lambda x: x.to("meta"), ValueError, r"shared_experts' result: expected device cpu, got meta"),
        (lambda x: None, TypeError, r"shared_experts' result: expected a tensor, got NoneType"),
    ],
)
def test_a_shared_module_of_another_form_is_refused_by_name(change, error, named):
    layer = layer_of()
    layer.shared_experts = _Wrong(change)
    with pytest.raises(error, match=named):
        layer(tokens(3))


def test_a_capture_over_the_declared_maximum_is_refused_by_name(monkeypatch):
    layer = layer_of(max_captured_tokens=4)
    capturing = SimpleNamespace(is_cuda=True, shape=(5, H))
    layer._expect_captured(SimpleNamespace(is_cuda=True, shape=(4, H)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        ValueError, match="expected at most max_captured_tokens 4 tokens in a CUDA graph's capture, got 5"
    ):
        layer._expect_captured(capturing)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layer._expect_captured(capturing)


@pytest.mark.parametrize(
    ("build", "error", "named"),
    [
        (lambda: layer_of()(tokens(3, dtype=torch.float32)), TypeError, "hidden_states: expected dtype torch.bfloat16"),
        (lambda: layer_of()(values("x", 3, H + 1)), ValueError, r"hidden_states: expected shape \[M, 64\]"),
        (lambda: layer_of().half(), TypeError, "dtype: expected torch.bfloat16 to stay as it is, got torch.float16"),
        (lambda: layer_of(routing=RoutingMethod(E + 1)), ValueError, r"top_k: expected a number in \[1, 8\], got 9"),
        (lambda: layer_of(aux_stream="side"), TypeError, r"aux_stream: expected a torch\.cuda\.Stream, got str"),
        (lambda: layer_of(max_captured_tokens=0), ValueError, "max_captured_tokens: expected at least 1, got 0"),
        (
            lambda: layer_of(setting=SharedExpertsSetting(has_shared_experts=False)),
            ValueError,
            "setting: expected has_shared_experts True",
        ),
        (
            lambda: layer_of(setting=SharedExpertsSetting(dispatch_runs_shared_experts=True)),
            ValueError,
            "setting: expected dispatch_runs_shared_experts False",
        ),
        (
            lambda: MoELayer(gate_of(num_experts=E - 1), experts_of(), RoutingMethod(2)),
            ValueError,
            "experts: expected the gate's 7",
        ),
        (
            lambda: layer_of(expert_map=torch.zeros(E, dtype=torch.int32), num_fused_shared_experts=1),
            ValueError,
            "num_fused_shared_experts: expected 0 with an expert_map",
        ),
        (
            lambda: MoELayer(gate_of(hidden_size=H // 2), experts_of(), RoutingMethod(2)),
            ValueError,
            r"gate\.weight: expected shape \[E, 64\]",
        ),
        (lambda: SharedExperts(values("a", 4, 8), values("b", 9, 2)), ValueError, "w13: expected shape"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_by_name(build, error, named):
    with pytest.raises(error, match=named):
        build()


def test_preparing_runs_the_layer_and_gives_it_back():
    layer = layer_of()
    with record_path() as record:
        assert layer.prepare((0, 1, 4)) is layer
    assert record.all("shared_experts_order") == ["no_overlap"] * 3
