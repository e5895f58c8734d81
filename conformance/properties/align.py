"""ALIGN: routed pairs sorted into blocks of one expert each."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.alignment import padded_count, pairs_of_each_expert
from ..cases import AlignCase
from ..judge import Verdict, declare

FORM = declare("ALIGN-01", "the three results are int32 and long enough for the rows in use", "align")
COUNT = declare("ALIGN-02", "the rows in use are each expert's pairs rounded up to whole blocks, and no more", "align")
ONCE = declare(
    "ALIGN-03", "every pair routed to an expert held here is in exactly one row, and no other pair is in any", "align"
)
OWNER = declare("ALIGN-04", "every row of a block belongs to the block's expert", "align")
PADDING = declare("ALIGN-05", "padding is M * top_k, which is never read as a token", "align")
BEYOND = declare("ALIGN-06", "blocks behind the rows in use have expert -1", "align")
STABLE = declare("ALIGN-07", "an expert's pairs are in ascending order, so that the result is repeatable", "align")


def judge_alignment(
    case: AlignCase, sorted_token_ids: Tensor, expert_ids: Tensor, num_tokens_post_padded: Tensor
) -> list[Verdict]:
    """Every ALIGN verdict on one call."""
    block = case.block_size
    pairs = pairs_of_each_expert(case.topk_ids, case.num_local_experts, case.expert_map)
    expected_rows = padded_count(pairs, block)
    sentinel = case.topk_ids.numel()
    got_rows = int(num_tokens_post_padded) if num_tokens_post_padded.numel() == 1 else -1
    results = (sorted_token_ids, expert_ids, num_tokens_post_padded)
    form = (
        all(r.dtype == torch.int32 and r.device == case.topk_ids.device for r in results)
        and got_rows >= 0
        and sorted_token_ids.numel() >= got_rows
        and expert_ids.numel() * block >= got_rows
    )
    verdicts = [
        FORM.verdict(
            form,
            f"got {[f'{list(r.shape)} {r.dtype}' for r in results]} with {got_rows} rows in use",
        ),
        COUNT.verdict(got_rows == expected_rows, f"expected {expected_rows} rows, got {got_rows}"),
    ]
    if not form or got_rows != expected_rows:
        return verdicts
    rows = sorted_token_ids[:got_rows].long().cpu()
    owners = expert_ids[: got_rows // block].long().cpu()
    real = rows[rows != sentinel]
    routed = torch.cat([p.cpu() for p in pairs]) if pairs else real[:0]
    once = real.numel() == routed.numel() and torch.equal(real.sort().values, routed.sort().values)
    verdicts.append(ONCE.verdict(once, f"expected pairs {routed.tolist()[:12]}, got {real.tolist()[:12]}"))
    in_range = ((rows >= 0) & (rows <= sentinel)).all()
    verdicts.append(PADDING.verdict(in_range, f"got rows outside [0, {sentinel}]"))
    owned, stable, detail = True, True, ""
    for index, owner in enumerate(owners.tolist()):
        mine = rows[index * block : (index + 1) * block]
        mine = mine[mine != sentinel]
        if not 0 <= owner < len(pairs) or not bool(torch.isin(mine, pairs[owner].cpu()).all()):
            owned, detail = False, f"block {index} of expert {owner} holds {mine.tolist()[:8]}"
            break
    if owned and once:
        for owner in range(len(pairs)):
            blocks = [rows[i * block : (i + 1) * block] for i, o in enumerate(owners.tolist()) if o == owner]
            mine = torch.cat(blocks) if blocks else rows[:0]
            mine = mine[mine != sentinel]
            if not torch.equal(mine, mine.sort().values):
                stable = False
                detail = f"expert {owner}: {mine.tolist()[:12]}"
    verdicts.append(OWNER.verdict(owned, detail))
    beyond = expert_ids[got_rows // block :]
    verdicts.append(BEYOND.verdict((beyond == -1).all(), f"got {beyond[beyond != -1].tolist()[:4]}"))
    verdicts.append(STABLE.verdict(stable, detail))
    return verdicts
