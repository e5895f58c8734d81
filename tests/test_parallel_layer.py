"""Layers that simulated ranks share: what EP does not say of them, and what is refused by name."""

import copy

import pytest
import torch
from closeness import assert_same_sum
from layers import TOP_K, H, experts_of, gate_of, layer_of, shared_of, tokens
from rank_bodies import shared_layer

from moegate.conformance.simulated_ranks import Call, DeadlockError, MismatchError, disagreement, run_simulated
from moegate.conformance.subjects.moegate_parallel import ranks_of
from moegate.impl.checks import debug_checks
from moegate.impl.experts_module import RoutedExperts
from moegate.impl.fused_moe import fused_experts
from moegate.impl.layer import MoELayer, RoutingMethod
from moegate.impl.oracle import call as oracle_call
from moegate.impl.parallel import all_to_all
from moegate.impl.parallel.exchange import Exchange, Launched
from moegate.impl.parallel.experts import ParallelExperts
from moegate.impl.parallel.mesh import Mesh
from moegate.impl.parallel.placement import linear_placement
from moegate.impl.parallel.wire import Tokens, Wire
from moegate.impl.path import record_path
from moegate.impl.quantization import ActivationScale
from moegate.impl.quantize import quantize_activations, quantize_experts
from moegate.impl.shared_experts import SharedExpertsOrder, SharedExpertsSetting

TWO = Mesh(dp_size=2, ep_size=2)


def on_ranks(mesh, body):
    """`body(ranks)` on each simulated rank; the results, or the first error."""
    outcomes = run_simulated(mesh.world_size, lambda rank, links: body(ranks_of(mesh, links)))
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.result for outcome in outcomes]


def shared_with(ranks, hook, **options):
    """A layer of two ranks whose shared experts run `hook` first."""
    placement = linear_placement(8, 2)
    parallel = ParallelExperts(ranks, placement, max_tokens=4, **options)
    whole, mine = experts_of(), list(placement.experts_of_rank[parallel.ep_rank])
    shared = shared_of()
    shared.register_forward_pre_hook(lambda *arguments: hook())
    experts = RoutedExperts(whole.w13[mine], whole.w2[mine])
    return MoELayer(gate_of(), experts, RoutingMethod(TOP_K), shared_experts=shared, parallel=parallel)


def test_an_exchange_without_a_dispatch_or_a_combine_cannot_be_made():
    class Nothing(Exchange):
        name = "nothing"

    with pytest.raises(TypeError, match="abstract"):
        Nothing()  # pyright: ignore[reportAbstractUsage]


def test_an_all_to_all_is_refused_by_name_under_the_capture_of_a_graph(monkeypatch):
    monkeypatch.setattr(all_to_all, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="all_to_all: expected an eager call, got the capture of a CUDA graph"):
        on_ranks(TWO, lambda ranks: shared_layer(ranks, exchange="all_to_all")(tokens(3)))


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_the_oracle_is_told_how_many_ranks_have_tokens(monkeypatch, exchange):
    asked, choose = [], oracle_call.choose_backend

    def listening(config, *arguments):
        asked.append(config.parallel.dp_size)
        return choose(config, *arguments)

    monkeypatch.setattr(oracle_call, "choose_backend", listening)
    oracle_call._decide.cache_clear()
    on_ranks(TWO, lambda ranks: shared_layer(ranks, exchange=exchange)(tokens(3)))
    oracle_call._decide.cache_clear()
    assert asked == [2]


def test_shared_experts_run_while_tokens_travel(monkeypatch):
    happened = []
    wait = Launched.wait
    monkeypatch.setattr(Launched, "wait", lambda self: (happened.append("wait"), wait(self))[1])

    def body(ranks):
        layer = shared_with(ranks, lambda: happened.append("shared"), overlap=True)
        assert layer.setting.dispatch_runs_shared_experts
        with record_path() as path:
            layer(tokens(2))
        assert path.last("shared_experts_order") == "mk_internal_overlapped"
        return [entry[:2] for entry in path.all("collective")]

    collectives = on_ranks(TWO, body)
    assert happened == ["shared", "wait"] * 2
    # The shared output is each rank's own, and joins the sum after its one reduction.
    assert collectives[0] == collectives[1]
    assert [name for name, _ in collectives[0]] == ["all_gather", "reduce_scatter"]


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_an_error_while_other_ranks_tokens_are_on_their_way_is_every_ranks(exchange):
    def body(ranks):
        def hook():
            if ranks.rank == 1:
                raise ValueError("no shared experts today")

        layer = shared_with(ranks, hook, exchange=exchange, overlap=True, own_first=True)
        with debug_checks():
            return layer(tokens(2))

    outcomes = run_simulated(2, lambda rank, links: body(ranks_of(TWO, links)))
    assert [str(outcome.error) for outcome in outcomes] == ["rank 1: no shared experts today"] * 2


def test_own_tokens_are_given_to_the_experts_before_the_host_waits_for_numbers_of_rows(monkeypatch):
    happened = []

    def body(ranks):
        layer = shared_layer(ranks, exchange="all_to_all", own_first=True)
        if ranks.rank == 0:
            assert layer.parallel is not None
            peers = layer.parallel.exchange._peers
            for owner, name in ((layer.parallel, "partial_sums"), (peers, "all_gather"), (peers, "all_to_all")):
                monkeypatch.setattr(owner, name, listening(name, getattr(owner, name)))
        layer(tokens(3))

    def listening(name, call):
        return lambda *arguments, **options: (happened.append(name), call(*arguments, **options))[1]

    on_ranks(TWO, body)
    assert happened == ["all_gather", "partial_sums", "all_to_all", "partial_sums", "all_to_all"]


@pytest.mark.parametrize("order", list(SharedExpertsOrder))
def test_rows_have_their_place_in_the_callers_stream_where_nothing_is_to_run_beside_them(monkeypatch, order):
    in_order = []

    def body(ranks):
        layer = shared_layer(ranks, exchange="all_to_all")
        parallel, x = layer.parallel, tokens(3)
        assert parallel is not None
        if ranks.rank == 0:
            send = parallel.exchange._peers.all_to_all

            def listening(*arguments, **options):
                in_order.append(options.get("in_order", False))
                return send(*arguments, **options)

            monkeypatch.setattr(parallel.exchange._peers, "all_to_all", listening)
        shared = None if order is SharedExpertsOrder.NONE else torch.zeros_like
        parallel.run(x, layer.experts, layer._select, shared, order=order)

    on_ranks(TWO, body)
    runs_beside = order in (SharedExpertsOrder.MK_INTERNAL_OVERLAPPED, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED)
    assert in_order == [not runs_beside, True]


def of_calls(batches, **options):
    """Of layers of two ranks called with each batch: the outputs, what was said of the rows, and the collectives."""

    def body(ranks):
        layer, made = shared_layer(ranks, exchange="all_to_all", max_tokens=64, **options), []
        for number in batches:
            with record_path() as path:
                output = layer(tokens(number))
            made.append((output, path.last("expected_rows"), [entry[0] for entry in path.all("collective")]))
        return made

    return on_ranks(TWO, body)


def test_rows_leave_before_their_numbers_are_read_once_a_call_had_as_many():
    made, waiting = of_calls([8] * 4), of_calls([8] * 4, expect_rows=False)
    for calls, others in zip(made, waiting, strict=True):
        assert [said for _, said, _ in calls] == [None, None, "held", "held"]
        assert all(collectives == ["all_gather", "all_to_all", "all_to_all"] for _, _, collectives in calls)
        assert [said for _, said, _ in others] == [None] * 4
        for (output, *_), (other, *_) in zip(calls, others, strict=True):
            assert_same_sum(output, other)


def test_rows_beyond_what_was_expected_leave_once_more_and_are_expected_only_after_more_calls():
    batches = [4, 4, 4, 12, 12, 12, 12]
    made, waiting = of_calls(batches), of_calls(batches, expect_rows=False)
    for calls, others in zip(made, waiting, strict=True):
        assert [said for _, said, _ in calls] == [None, None, "held", "exceeded", None, None, "held"]
        assert calls[3][2] == ["all_gather", "all_to_all", "all_to_all", "all_to_all"]
        for (output, *_), (other, *_) in zip(calls, others, strict=True):
            assert_same_sum(output, other)


def test_an_error_behind_rows_that_left_early_is_every_ranks_and_the_next_call_is_right():
    def fail(*arguments):
        raise ZeroDivisionError

    def body(ranks):
        layer = shared_layer(ranks, exchange="all_to_all", max_tokens=64)
        expected = layer(tokens(12))
        layer(tokens(4))
        layer(tokens(4))
        with debug_checks():
            hook = layer.experts.register_forward_pre_hook(fail) if ranks.rank else None
            with pytest.raises(ZeroDivisionError, match="rank 1"):
                layer(tokens(12))
            if hook is not None:
                hook.remove()
            return expected, [layer(tokens(12)) for _ in range(3)]

    for expected, again in on_ranks(TWO, body):
        for output in again:
            assert_same_sum(output, expected)


def test_ranks_that_say_different_numbers_of_padded_tokens_raise_alike():
    def body(ranks):
        return shared_layer(ranks, exchange="all_to_all")(tokens(2), padded_tokens=4 + ranks.rank)

    outcomes = run_simulated(2, lambda rank, links: body(ranks_of(TWO, links)))
    said = "padded_tokens: expected the same on every rank, got [4, 5] of ranks 0 to 1"
    assert [str(outcome.error) for outcome in outcomes] == [said] * 2


def test_tensor_parallel_parts_are_reduced_once():
    def body(ranks):
        from moegate.impl.parallel.shards import shard_of_experts
        from moegate.impl.weights import ExpertsWeights

        whole = experts_of()
        mine = shard_of_experts(ExpertsWeights(whole.w13, whole.w2), ranks.rank, 2)
        parallel = ParallelExperts(ranks, linear_placement(8, 1), max_tokens=8)
        layer = MoELayer(gate_of(), RoutedExperts(mine.w13, mine.w2), RoutingMethod(TOP_K), parallel=parallel)
        with record_path() as path:
            output = layer(tokens(5))
        return output, [entry[0] for entry in path.all("collective")]

    expected = layer_of(shared=False)(tokens(5))
    for output, collectives in on_ranks(Mesh(tp_size=2), body):
        assert collectives == ["all_reduce"]
        assert_same_sum(output, expected)


def test_a_call_may_be_padded_to_fewer_rows_than_the_most_and_to_no_more():
    def body(ranks, padded):
        layer = shared_layer(ranks, max_tokens=64)
        with record_path() as path:
            layer(tokens(3), padded_tokens=padded)
        return [entry[2][0] for entry in path.all("collective")]

    assert on_ranks(TWO, lambda ranks: body(ranks, 4)) == [[4, 8]] * 2
    assert on_ranks(TWO, lambda ranks: body(ranks, None)) == [[64, 128]] * 2
    with debug_checks(), pytest.raises(ValueError, match=r"padded_tokens: expected a number in \[0, 64\], got 65"):
        on_ranks(TWO, lambda ranks: body(ranks, 65))
    with pytest.raises(ValueError, match="padded_tokens: expected None for a layer of one rank, got 4"):
        layer_of()(tokens(3), padded_tokens=4)


def test_ranks_with_the_same_tokens_must_have_as_many():
    def body(ranks):
        return shared_layer(ranks)(tokens(3 + ranks.rank))

    text = r"num_tokens of ranks with the same tokens: expected the same on every rank, got \[3, 4\]"
    with debug_checks(), pytest.raises(ValueError, match=text):
        on_ranks(Mesh(ep_size=2), body)


@pytest.mark.parametrize(
    ("mesh", "options", "error"),
    [
        (TWO, {"exchange": "deepep"}, r"exchange: expected one of \['all_gather', 'all_to_all'\], got 'deepep'"),
        (TWO, {"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        (TWO, {"shared_part": "half"}, "shared_part: expected one of"),
        (TWO, {"shared_part": "shard"}, "shared_part: expected whole where no ranks have the same tokens"),
        (Mesh(ep_size=2), {"exchange": "all_to_all"}, "exchange: expected all_gather where ranks have the same tokens"),
        (Mesh(2, 2), {"exchange": "all_to_all"}, "got all_to_all with tp 2, dp 2, ep 1"),
        (TWO, {"placement": linear_placement(8, 3)}, "placement: expected one of ep_size 2 ranks, got 3"),
        (TWO, {"placement": linear_placement(6, 2)}, "placement: expected one of the gate's 8 experts, got 6"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(mesh, options, error):
    with pytest.raises(ValueError, match=error):
        on_ranks(mesh, lambda ranks: shared_layer(ranks, **options))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"reduce": lambda x: x}, "reduce: expected none beside parallel"),
        ({"expert_map": torch.arange(8, dtype=torch.int32)}, "expert_map: expected none beside parallel"),
        ({"num_fused_shared_experts": 1}, "num_fused_shared_experts: expected none beside parallel"),
    ],
)
def test_a_layer_has_one_way_to_be_shared(options, error):
    def body(ranks):
        parallel = ParallelExperts(ranks, linear_placement(8, 2), max_tokens=4)
        MoELayer(gate_of(), experts_of(num_experts=4), RoutingMethod(TOP_K), parallel=parallel, **options)

    with pytest.raises(ValueError, match=error):
        on_ranks(TWO, body)


def test_scales_of_a_whole_tensor_are_refused_by_name():
    w13, w2, quant = quantize_experts(
        torch.randn(4, 64, H), torch.randn(4, H, 32), "fp8_w8a8", weight_scale="channel", per_act_token_quant=False
    )

    def body(ranks):
        parallel = ParallelExperts(ranks, linear_placement(8, 2), max_tokens=4)
        MoELayer(gate_of(), RoutedExperts(w13, w2, quant=quant), RoutingMethod(TOP_K), parallel=parallel)

    with pytest.raises(ValueError, match="quant: expected scales that a token has for itself, or a static one"):
        on_ranks(TWO, body)


def test_a_copy_of_a_layer_has_the_same_ranks():
    def body(ranks):
        layer = shared_layer(ranks)
        other = copy.deepcopy(layer)
        assert other.parallel is layer.parallel
        return torch.equal(layer(tokens(3)), other(tokens(3)))

    assert on_ranks(TWO, body) == [True, True]


def test_a_dispatch_that_overlaps_without_one_is_refused():
    setting = SharedExpertsSetting(dispatch_runs_shared_experts=True)
    with pytest.raises(ValueError, match="setting: expected dispatch_runs_shared_experts False, got True"):
        layer_of(setting=setting)


SCALES = {"channel": (ActivationScale.TOKEN, True, None), "block": (ActivationScale.GROUP, False, (32, 32))}


@pytest.mark.parametrize("weight_scale", SCALES)
def test_rows_that_come_quantised_give_the_bits_of_rows_that_do_not(weight_scale):
    torch.manual_seed(1)
    scale, per_token, block = SCALES[weight_scale]
    w13, w2, quant = quantize_experts(
        torch.randn(4, 64, H) / 8,
        torch.randn(4, H, 32) / 6,
        "fp8_w8a8",
        weight_scale=weight_scale,
        per_act_token_quant=per_token,
        block_shape=block,
    )
    x, ids = tokens(5), torch.tensor([[0, 1], [2, 3], [1, -1], [3, 0], [2, 1]], dtype=torch.int32)
    weights = torch.rand(5, 2)
    rows, input_scale = quantize_activations(x, torch.float8_e4m3fn, scale, group=32 if block else 0)
    for backend in ("cpu", "triton") if torch.cuda.is_available() or _interpreted() else ("cpu",):
        plain = fused_experts(x, w13, w2, weights, ids, quant=quant, backend=backend)
        out = torch.empty_like(x)
        fused_experts(rows, w13, w2, weights, ids, quant=quant, input_scale=input_scale, out=out, backend=backend)
        assert torch.equal(plain, out)
    with pytest.raises(ValueError, match="out: expected a tensor of the activations' dtype beside input_scale"):
        fused_experts(rows, w13, w2, weights, ids, quant=quant, input_scale=input_scale)
    with pytest.raises(ValueError, match=r"input_scale: expected shape \[5, "):
        fused_experts(rows, w13, w2, weights, ids, quant=quant, input_scale=input_scale[:4], out=out)
    with pytest.raises(ValueError, match="input_scale: expected None where quant quantises no activations"):
        fused_experts(x, experts_of().w13, experts_of().w2, weights, ids, input_scale=input_scale, out=out)


def _interpreted():
    from moegate.conformance.session import INTERPRETED

    return INTERPRETED


def test_simulated_ranks_that_wait_for_each_other_in_vain_are_reported_at_once():
    def body(rank, links):
        everyone = links.channel((0, 1, 2))
        everyone.all_reduce(torch.ones(2))
        if rank == 1:
            return
        (everyone if rank else links.channel((0, 1))).all_reduce(torch.ones(2))

    outcomes = run_simulated(3, body)
    assert outcomes[1].error is None
    assert isinstance(outcomes[0].error, DeadlockError)
    assert "rank 0 waits in its collective 2: all_reduce of ranks [0, 1]" in str(outcomes[2].error)
    assert "rank 1 returned after 1 collectives" in str(outcomes[2].error)
    assert "rank 2 waits in its collective 2: all_reduce of ranks [0, 1, 2]" in str(outcomes[0].error)


def test_simulated_ranks_that_call_different_collectives_are_reported():
    def body(rank, links):
        links.channel((0, 1)).all_reduce(torch.ones(2 + rank))

    outcomes = run_simulated(2, body)
    assert all(isinstance(outcome.error, MismatchError) for outcome in outcomes)
    sends = [Call("all_to_all", (0, 1), (0, 4), "float32", (1, 2), (1, 1)), None]
    sends[1] = Call("all_to_all", (0, 1), (0, 4), "float32", (1, 0), (3, 0))
    assert disagreement(sends) == "rank 0 sends 2 rows to rank 1, which expects 3"
    assert disagreement([sends[0], sends[0]]) == "rank 0 sends 2 rows to rank 1, which expects 1"


def test_rows_behind_the_last_token_are_made_tokens_without_an_expert_or_an_adapter():
    wire, like = Wire(), Tokens(tokens(3), torch.ones(3, 2), torch.ones((3, 2), dtype=torch.int32), torch.ones(3).int())
    buffer = wire.pack(like, 3).repeat(2, 1)
    wire.pad(buffer, 2, like)
    arrived = wire.tokens(buffer, like, ids_are_local=True)
    assert arrived.topk_ids.tolist() == [[1, 1]] * 2 + [[-1, -1]] * 4
    assert arrived.topk_weights.tolist() == [[1, 1]] * 2 + [[0, 0]] * 4
    assert arrived.lora_ids is not None
    assert arrived.lora_ids.tolist() == [1, 1, -1, -1, -1, -1]
