"""EP: what ranks that share a layer make together, what each of them makes, and how they meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..budget import experts_budget
from ..calibration import limits
from ..judge import Verdict, declare
from ..numerics import Format, Numerics, format_of
from ..parallel_cases import ParallelCase
from ..rounding import accumulation, rounding
from ..simulated_ranks import DeadlockError, MismatchError, RankOutcome, disagreement
from ..statistics import statistics

WHOLE = declare(
    "EP-01",
    "every element of every rank's output is within the budget of the layer of one rank",
    "parallel",
    is_value=True,
)
SHARD = declare(
    "EP-02",
    "each rank's own part is within its budget of the reference with that rank's experts alone",
    "parallel",
    is_value=True,
)
ONCE = declare(
    "EP-03", "every routed pair is computed once: on one rank that holds its expert, whole or by shards", "parallel"
)
TRAVEL = declare(
    "EP-04",
    "a token arrives with its own hidden state, weights and adapter, at most once a rank, and padding as no token",
    "parallel",
)
NEEDED = declare("EP-05", "an all-to-all brings a rank the tokens of its experts and no others", "parallel")
COPIES = declare(
    "EP-06", "of an expert's copies none gets two pairs more than another from the tokens of one rank", "parallel"
)
HELD = declare("EP-07", "every rank holds the experts that its placement says", "parallel")
CALLS = declare(
    "EP-08", "all ranks of a group call the same collectives in the same order, with sizes that agree", "parallel"
)
ENDS = declare("EP-09", "no rank waits for one that never comes, and none raises on good input", "parallel")
REPEATABLE = declare("EP-10", "ranks that share a layer give the same bits again", "parallel")
MEMORY = declare("EP-11", "no rank writes an operand, and each result has memory of its own", "parallel")
SHARED = declare(
    "EP-12", "without routed weights every rank's output is the shared output, counted once", "parallel", is_value=True
)
RAISES = declare("EP-13", "where one rank raises in debug mode, every rank raises the same error", "parallel")
SHARDED_WHOLE = declare(
    "EP-15",
    "with adapters cut in both matrices every element is within the budget of the layer of one rank",
    "parallel",
    is_value=True,
)
SHARDED_PART = declare(
    "EP-16",
    "a rank with such adapters makes the sums of its own columns of I, and adds adapters to its own slice of H alone",
    "parallel",
    is_value=True,
)
SLICES = declare(
    "EP-17",
    "of each adapter a rank holds the slices of A and B that are its own, and where cut no whole matrix",
    "parallel",
)
SMALL = declare(
    "EP-18",
    "ranks with such adapters meet twice a call, over the product of A alone: `[rows, r]`, gathered, then reduced",
    "parallel",
)
BESIDE = declare(
    "EP-19", "rows of an all-to-all travel beside the caller's stream exactly where that has work meanwhile", "parallel"
)
EXPECTED = declare(
    "EP-20",
    "rows of an all-to-all leave before their numbers are read exactly where earlier calls had as many",
    "parallel",
)
BASE = declare("EP-14", "a token without an adapter has the bits that the ranks give it without adapters", "parallel")


Slice = tuple[int, str, int]
"""An adapter's number, the projection (`gate`, `up`, `down`) and the global expert."""


@dataclass(frozen=True)
class RankResult:
    """What one rank made, and what it had to work on.

    Attributes:
        output: `[M_r, H]`, the layer's output for its own tokens.
        partial: `[rows, H]`, what its experts made of the rows that it received.
        hidden_states: `[rows, H]`, those rows; scaled back where they travelled in few bits, or None.
        token_ids: `[rows]`, the number that travelled with each; -1 of padding.
        local_ids: `[rows, top_k]`, its experts there by its own numbers, -1 without one here.
        topk_weights: `[rows, top_k]` float32.
        experts: the logical ids of the experts that it holds.
        lora_ids: `[rows]`, the adapter that came with each; None without adapters.
        slices: what it holds of each adapter's A and B; None without adapters.
        is_own: the result shares no memory with an operand.
        travels_beside: rows travel beside what the caller's stream does meanwhile; None where that is not seen.
        runs_beside: it has something to do meanwhile: shared experts, or the rank's own tokens.
        leaves_early: rows leave before their numbers are read; None where that is not seen.
    """

    output: Tensor
    partial: Tensor
    hidden_states: Tensor | None
    token_ids: Tensor
    local_ids: Tensor
    topk_weights: Tensor
    experts: tuple[int, ...]
    lora_ids: Tensor | None = None
    slices: Mapping[Slice, tuple[Tensor, Tensor]] | None = None
    is_own: bool = True
    travels_beside: bool | None = None
    runs_beside: bool = False
    leaves_early: bool | None = None

    def on_cpu(self) -> RankResult:
        """The same, where it is judged."""
        moved: dict[str, Any] = {name: t.cpu() for name, t in vars(self).items() if isinstance(t, Tensor)}
        if self.slices is not None:
            moved["slices"] = {key: (a.cpu(), b.cpu()) for key, (a, b) in self.slices.items()}
        return replace(self, **moved)


def judge_meeting(outcomes: Sequence[RankOutcome]) -> list[Verdict]:
    """EP-08 and EP-09."""
    errors = [outcome.error for outcome in outcomes]
    mismatch = next((str(e) for e in errors if isinstance(e, MismatchError)), None)
    if mismatch is None:
        mismatch = _disagreement(outcomes) if not any(errors) else None
    raised = [f"rank {rank}: {error!r}" for rank, error in enumerate(errors) if error is not None]
    stuck = next((str(e) for e in errors if isinstance(e, DeadlockError)), None)
    return [
        CALLS.verdict(mismatch is None, mismatch or ""),
        ENDS.verdict(not raised, stuck or "; ".join(raised)),
    ]


def _disagreement(outcomes: Sequence[RankOutcome]) -> str | None:
    """The first collective of a group that its ranks did not call alike."""
    groups = {call.ranks for outcome in outcomes for call in outcome.calls}
    for ranks in sorted(groups):
        lists = [[call for call in outcomes[rank].calls if call.ranks == ranks] for rank in ranks]
        if len({len(calls) for calls in lists}) > 1:
            return f"ranks {list(ranks)} call {[len(calls) for calls in lists]} collectives of theirs"
        for calls in zip(*lists, strict=True):
            why = disagreement(calls)
            if why is not None:
                return why
    return None


def pairs_of_rank(case: ParallelCase, result: RankResult) -> Tensor:
    """`[M, top_k]`: the pairs of all tokens that a rank computed, by its own numbers of the experts, -1 elsewhere."""
    pairs = torch.full(case.routed.topk_ids.shape, -1, dtype=torch.int64)
    real = (result.token_ids >= 0) & (result.token_ids < len(pairs))
    pairs[result.token_ids[real].long()] = result.local_ids[real].long()
    return pairs


def judge_travel(case: ParallelCase, results: Sequence[RankResult]) -> list[Verdict]:
    """EP-03 to EP-07, who worked on what; EP-19 and EP-20, beside what and when it travelled."""
    spec, ids = case.spec, case.routed.topk_ids.long()
    held = [(r.experts, case.experts_of_rank[rank // spec.tp]) for rank, r in enumerate(results)]
    wrong_held = [f"rank {rank} holds {a}, not {b}" for rank, (a, b) in enumerate(held) if a != b]
    verdicts = [HELD.verdict(not wrong_held, "; ".join(wrong_held[:2]))]
    if wrong_held:
        return verdicts
    times = torch.zeros((spec.tp, *ids.shape), dtype=torch.int64)
    strays, wrong = [], []
    for rank, result in enumerate(results):
        pairs = pairs_of_rank(case, result)
        experts = torch.tensor([*result.experts, -1])
        logical = torch.where(pairs >= 0, experts[pairs.clamp(max=len(result.experts))], -1)
        times[rank % spec.tp] += (pairs >= 0) & (logical == ids)
        if bool(((pairs >= 0) & (logical != ids)).any()):
            token = int(((pairs >= 0) & (logical != ids)).any(dim=1).nonzero()[0])
            strays.append(f"rank {rank} computes token {token} with experts {logical[token].tolist()}")
        wrong += [f"rank {rank}: {why}" for why in _wrong_rows(case, result)]
    once = (times == (ids >= 0)).all() and not strays
    bad = (times != (ids >= 0)).any(dim=0).nonzero().tolist()
    detail = "; ".join(strays[:2]) or "".join(
        f"token {t}, slot {j}, expert {int(ids[t, j])}: computed {times[:, t, j].tolist()} times" for t, j in bad[:1]
    )
    verdicts += [ONCE.verdict(bool(once), detail), TRAVEL.verdict(not wrong, "; ".join(wrong[:2]))]
    if spec.exchange == "all_to_all":
        # What earlier calls suggested may be more than this one needs.
        idle = [
            rank
            for rank, r in enumerate(results)
            if not bool(((r.local_ids >= 0).any(dim=1) | ((r.token_ids < 0) & (spec.earlier != "none"))).all())
        ]
        verdicts.append(NEEDED.verdict(not idle, f"rows without an expert here came to ranks {idle}"))
    seen = [(rank, r) for rank, r in enumerate(results) if r.travels_beside is not None]
    apart = [
        f"rank {rank}: work {r.runs_beside}, beside {r.travels_beside}"
        for rank, r in seen
        if r.travels_beside != r.runs_beside
    ]
    if seen:
        verdicts.append(BESIDE.verdict(not apart, "; ".join(apart[:2])))
    early = [r.leaves_early for r in results if r.leaves_early is not None]
    if early and spec.earlier != "fewer":
        wanted = spec.earlier == "alike" and not spec.own_first
        verdicts.append(EXPECTED.verdict(all(e is wanted for e in early), f"early on each rank: {early}"))
    return [*verdicts, *_judge_copies(case, results)]


def _wrong_rows(case: ParallelCase, result: RankResult) -> list[str]:
    tokens = result.token_ids.long()
    rows = (tokens >= 0).nonzero()[:, 0]
    found = []
    repeated = [token for token, count in Counter(tokens[rows].tolist()).items() if count > 1]
    if repeated:
        found.append(f"token {repeated[0]} came more than once")
    if bool((result.local_ids[tokens < 0] >= 0).any()):
        found.append("padding has an expert")
    here = result.local_ids[rows] >= 0
    weights = case.routed.topk_weights[tokens[rows]]
    if not torch.equal(torch.where(here, weights, 0.0), torch.where(here, result.topk_weights[rows], 0.0)):
        found.append("a routing weight is not the token's")
    if case.lora is not None:
        brought = case.lora.lora_ids[tokens[rows]]
        if result.lora_ids is None or not torch.equal(brought, result.lora_ids[rows]):
            found.append("an adapter is not the token's")
    if result.hidden_states is not None:
        sent = case.routed.hidden_states[tokens[rows]]
        if not torch.equal(sent, result.hidden_states[rows].to(sent.dtype)):
            found.append("a hidden state is not the token's")
    return found


def _judge_copies(case: ParallelCase, results: Sequence[RankResult]) -> list[Verdict]:
    """EP-06, where an expert has several copies."""
    spec = case.spec
    homes = Counter(expert for experts in case.experts_of_rank for expert in experts)
    if not any(count > 1 for count in homes.values()):
        return []
    worst, detail = 0, ""
    for run in range(spec.dp):
        tokens = spec.tokens_of(run * spec.replicas)
        taken: dict[int, list[int]] = {expert: [] for expert in homes}
        for ep_rank, experts in enumerate(case.experts_of_rank):
            pairs = pairs_of_rank(case, results[ep_rank * spec.tp])[tokens.start : tokens.stop]
            for local, expert in enumerate(experts):
                taken[expert].append(int((pairs == local).sum()))
        for expert, counts in taken.items():
            if max(counts) - min(counts) > worst:
                worst = max(counts) - min(counts)
                detail = f"the copies of expert {expert} get {counts} pairs of run {run}"
    return [COPIES.verdict(worst <= 1, detail)]


def judge_slices(case: ParallelCase, results: Sequence[RankResult]) -> list[Verdict]:
    """EP-17, where there are adapters."""
    if case.lora is None:
        return []
    wrong = []
    for rank, result in enumerate(results):
        held, expected = result.slices or {}, dict(_own_slices(case, rank))
        if held.keys() != expected.keys():
            wrong.append(f"rank {rank} holds {len(held)} pairs of matrices, not {len(expected)}")
            continue
        for key, pair in expected.items():
            for name, mine, right in zip("AB", held[key], pair, strict=True):
                if not torch.equal(mine, right):
                    shapes = f"{list(mine.shape)}, expected {list(right.shape)}"
                    wrong.append(f"rank {rank}, adapter {key[0]}, {key[1]} of expert {key[2]}: {name} is {shapes}")
    return [SLICES.verdict(not wrong, "; ".join(wrong[:2]))]


def _own_slices(case: ParallelCase, rank: int) -> Iterator[tuple[Slice, tuple[Tensor, Tensor]]]:
    """What a rank should hold: its columns of I and, where all is cut, some rows of w13's A and of w2's B."""
    spec, shard = case.spec, rank % case.spec.tp
    cut = spec.tp if spec.fully_sharded else 1

    def part(x: Tensor, dim: int, size: int) -> Tensor:
        return x.chunk(size, dim)[shard] if size > 1 else x

    if case.lora is None:
        return
    for number, adapter in enumerate(case.lora.adapters):
        for expert in case.experts_of_rank[rank // spec.tp]:
            first = {"gate": adapter.gate.get(expert), "up": adapter.up.get(expert)}
            both = adapter.gate_up.get(expert)
            if both is not None:
                first = {n: replace(both, b=b) for n, b in zip(first, both.b.chunk(2), strict=True)}
            for name, matrix in first.items():
                if matrix is not None:
                    yield (number, name, expert), (part(matrix.a, 0, cut), part(matrix.b, 0, spec.tp))
            matrix = adapter.down.get(expert)
            if matrix is not None:
                yield (number, "down", expert), (part(matrix.a, 1, spec.tp), part(matrix.b, 0, cut))


def judge_small_products(case: ParallelCase, outcomes: Sequence[RankOutcome]) -> list[Verdict]:
    """EP-18, where adapters are cut in both matrices."""
    spec = case.spec
    if not spec.fully_sharded or case.lora is None:
        return []
    # Ranks may be rounded up to a power of two, for the tiles of a kernel.
    widest = 1 << (max(16, case.lora.max_rank) - 1).bit_length()
    wrong = []
    for rank, outcome in enumerate(outcomes):
        first = rank - rank % spec.tp
        shards = tuple(range(first, first + spec.tp))
        # Tokens and messages travel as bytes, sums as floats.
        calls = [call for call in outcome.calls if call.ranks == shards and "float" in call.dtype]
        is_idle = not case.experts_of_rank[rank // spec.tp] or (spec.dp == 1 and not spec.M)
        expected = [] if is_idle else ["all_gather", "all_reduce"]
        own = len(expected)
        if spec.dp > 1 and spec.peers(rank) == shards:
            expected.append("reduce_scatter")
        if spec.replicas_of(rank) == shards:
            expected.append("all_reduce")
        names = [call.name for call in calls]
        columns = [call.shape[1] for call in calls[:own]]
        if names != expected or any(c > w for c, w in zip(columns, (2 * widest // spec.tp, widest), strict=False)):
            wrong.append(f"rank {rank} calls {[str(call) for call in calls]}, expected {expected}")
    return [SMALL.verdict(not wrong, "; ".join(wrong[:1]))]


def judge_values(case: ParallelCase, results: Sequence[RankResult], numerics: Numerics, summed: str) -> list[Verdict]:
    """EP-01 and EP-02; EP-15 and EP-16 where adapters are cut in both matrices.

    Args:
        case: the operands.
        results: of every rank.
        numerics: where each rank rounds.
        summed: how the ranks' parts are added: in the activations' dtype (`storage`), or in float32 and rounded once.
    """
    spec = case.spec
    if not spec.M:
        return []
    output = torch.zeros(case.routed.hidden_states.shape, dtype=torch.float64)
    variance, squares = torch.zeros_like(output), torch.zeros_like(output)
    used, worst, is_quantized = 0.0, "", False
    for rank, result in enumerate(results):
        pairs = pairs_of_rank(case, result)
        made = torch.zeros_like(output)
        real = result.token_ids >= 0
        made[result.token_ids[real].long()] = result.partial[real].to(made.dtype)
        call = case.shard(rank, pairs, is_quantized=result.hidden_states is None)
        if call is None:
            share, limit = float("inf") if bool((made != 0).any()) else 0.0, 1.0
        else:
            trace = call.trace()
            budget = experts_budget(trace, call, numerics)
            output, squares = output + trace.output, squares + trace.output**2
            variance = variance + budget.sigma**2 + budget.last**2
            is_quantized = is_quantized or budget.is_quantized
            share, limit = _used(made, trace, budget, call), 1.0
        if not share <= used:
            used, worst = share, f"rank {rank}, which computes {int((pairs >= 0).sum())} pairs"
    of_part, of_whole = (SHARDED_PART, SHARDED_WHOLE) if spec.fully_sharded else (SHARD, WHOLE)
    verdicts = [of_part.verdict(used <= 1, worst, budget_used=used)]

    storage = Format.of(case.routed.hidden_states.dtype)
    at = format_of("storage" if summed == "storage" else "float32", case.routed.hidden_states.dtype)
    terms = spec.world_size
    shared = case.shared_operands()
    if shared is not None:
        # Both outputs are rounded before their sum is.
        variance = variance + rounding(output, storage)
        trace = shared.trace()
        budget = experts_budget(trace, shared, numerics)
        output, squares, terms = output + trace.output, squares + trace.output**2, terms + spec.replicas
        variance = variance + spec.replicas * (budget.sigma**2 + budget.last**2)
    variance = variance + accumulation(terms, output, squares, at.unit_roundoff)
    last = rounding(output, storage).sqrt()
    limit = limits(is_quantized).elementwise
    used, worst = 0.0, ""
    for rank, result in enumerate(results):
        tokens = spec.tokens_of(rank)
        rows = slice(tokens.start, tokens.stop)
        if result.output.shape != output[rows].shape:
            return [*verdicts, of_whole.verdict(False, f"rank {rank} returns {list(result.output.shape)}")]
        if not len(tokens):
            continue
        error = (result.output.to(output.dtype) - output[rows]).nan_to_num(torch.inf, torch.inf, torch.inf).abs()
        beyond = (error - last[rows]).clamp(min=0)
        over = torch.where(beyond == 0, 0.0, beyond / variance[rows].sqrt()) / limit
        if not float(over.max()) <= used:
            used, place = float(over.max()), int(over.argmax())
            token, column = divmod(place, output.shape[1])
            worst = (
                f"rank {rank}, token {token} of {len(tokens)} ({tokens.start + token} of all), column {column}: "
                f"expected {float(output[rows][token, column]):.6g}, got {float(result.output[token, column]):.6g}; "
                f"{int((over > 1).sum())} of {over.numel()} elements of the rank over"
            )
    return [*verdicts, of_whole.verdict(used <= 1, worst, budget_used=used)]


def _used(made: Tensor, trace, budget, call) -> float:
    """The largest of a part's four statistics over its limit; with adapters of two, as a gain's limit knows none."""
    measured, limit = statistics(made, trace, budget, call.w2), limits(budget.is_quantized)
    shares = [
        (getattr(measured, name) / getattr(limit, name)).nan_to_num(0.0, torch.inf, torch.inf)
        for name in (("row_gain", "expert_gain") if call.adapters is None else ())
    ]
    shares += [getattr(measured, name) / getattr(limit, name) for name in ("elementwise", "row_rms")]
    return max((float(share.nan_to_num(torch.inf).max()) for share in shares if share.numel()), default=0.0)


def judge_shared(case: ParallelCase, results: Sequence[RankResult], numerics: Numerics) -> list[Verdict]:
    """EP-12, of a call whose routing weights were all zero."""
    shared = case.shared_operands()
    # A bias behind a weight on the input is not weighted.
    if shared is None or not case.spec.M or (case.spec.weight_on_input and case.spec.bias != "none"):
        return []
    trace = shared.trace()
    budget = experts_budget(trace, shared, numerics)
    storage = Format.of(case.routed.hidden_states.dtype)
    # Shards round by themselves, and so do the steps of their sum.
    sigma = (case.spec.world_size * (budget.sigma**2 + budget.last**2 + rounding(trace.output, storage))).sqrt()
    output = torch.cat([results[run * case.spec.replicas].output for run in range(case.spec.dp)]).to(sigma.dtype)
    error = (output - trace.output).nan_to_num(torch.inf, torch.inf, torch.inf).abs()
    used = torch.where(error == 0, 0.0, error / sigma) / limits(False).elementwise
    place = divmod(int(used.argmax()), output.shape[1])
    detail = f"token {place[0]}: expected {float(trace.output[place]):.6g}, got {float(output[place]):.6g}"
    return [SHARED.verdict(bool((used <= 1).all()), detail, budget_used=float(used.max()))]


def judge_memory(case: ParallelCase, results: Sequence[RankResult]) -> Verdict:
    """EP-11."""
    changed, aliased = case.changed(), [rank for rank, r in enumerate(results) if not r.is_own]
    return MEMORY.verdict(not changed and not aliased, f"written: {changed}; ranks with an operand's memory: {aliased}")


def judge_again(results: Sequence[RankResult], again: Sequence[RankResult]) -> Verdict:
    """EP-10."""
    differ = [
        rank
        for rank, (a, b) in enumerate(zip(results, again, strict=True))
        if not torch.equal(a.output.contiguous().view(torch.uint8), b.output.contiguous().view(torch.uint8))
    ]
    return REPEATABLE.verdict(not differ, f"ranks {differ} give other bits")


def judge_base(case: ParallelCase, results: Sequence[RankResult], plain: Sequence[RankResult]) -> Verdict:
    """EP-14; `plain` is of the same call without adapters."""
    stray = []
    for rank, (result, base) in enumerate(zip(results, plain, strict=True)):
        ids = case.lora_ids(rank)
        rows = torch.zeros(len(result.output), dtype=torch.bool) if ids is None else ids < 0
        if not torch.equal(*(r.output[rows].contiguous().view(torch.uint8) for r in (result, base))):
            stray.append(f"rank {rank} of {int(rows.sum())} tokens")
    return BASE.verdict(not stray, f"other bits on {'; '.join(stray)}")


def judge_raised(outcomes: Sequence[RankOutcome], text: str) -> Verdict:
    """EP-13: `text` is what the rank that was made to raise says."""
    raised = [outcome.error for outcome in outcomes]
    alike = len({(type(error), str(error)) for error in raised}) == 1
    return RAISES.verdict(alike and text in str(raised[0]), "; ".join(repr(error) for error in raised))
