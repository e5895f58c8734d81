"""A finding as a script that runs without moegate, its tensors in a file beside it: `--emit-repro FILE.py`.

The case is first made smaller than its spec can say: single tokens, single slots, only the experts that are left, as
long as the subject still fails on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pprint import pformat
from string import Template
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .calibration import limits
from .cases import ExpertsCase, build_experts
from .guarded import CallError
from .judge import Verdict
from .properties.meta import placed
from .properties.num import ELEMENT, ROW_RMS, budget_of, judge_values, reference_of
from .session import FormError, Session
from .spec import ExpertsSpec, parse_spec

# How often the subject is asked while its case is made smaller.
MOST_RUNS = 60
RECORDED = 'return T["got"].to(DEVICE)  # what was returned when this was written: put the call to judge here'
SCRIPT = Template('''"""$id of $subject ($variant) on $device: $sentence.

$detail
Written by moegate, and needs torch and safetensors alone: it compares what `run` returns with what was expected, in
float64, and with what is allowed for each element and row, and exits with 1 where it is further off. Operands: w13
[E, 2I, H] (gate rows first), w2 [E, H, I], ids of -1 mean no expert. The case was made smaller than that of
$spec
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

DEVICE = "$device"
T = load_file(Path(__file__).with_suffix(".safetensors"))
OPTIONS = $options


def run(hidden_states, w13, w2, topk_weights, topk_ids, **more):
    """The implementation: `[M, H]` of the dtype of hidden_states. `more` has what else there is, and OPTIONS."""
    $body


def main():
    """Print the worst element; 0 where all is within what is allowed."""
    operands = {name: t.to(DEVICE) for name, t in T.items() if name not in ("expected", "allowed", "of_row", "got")}
    got = run(**operands, **OPTIONS).cpu().double()
    error = (got - T["expected"]).abs().nan_to_num(torch.inf)
    over = torch.where(error == 0, 0.0, error / T["allowed"])
    rows = torch.where((error == 0).all(1), 0.0, (error**2).sum(1).sqrt() / T["of_row"])
    token, column = divmod(int(over.argmax()), over.shape[1])
    print(f"token {token}, column {column}: expected {float(T['expected'][token, column]):.6g}, ", end="")
    print(f"got {float(got[token, column]):.6g}, error over what is allowed {float(over.max()):.3g}")
    print(f"{int((over > 1).sum())} of {over.numel()} elements, {int((rows > 1).sum())} of {len(rows)} rows are over")
    return int(bool((over > 1).any() or (rows > 1).any()))


if __name__ == "__main__":
    sys.exit(main())
''')


def emit_repro(session: Session, rows: list[dict[str, Any]], path: str) -> str:
    """Write the script of the first finding that has one.

    Args:
        session: of the subject.
        rows: of the report's properties.
        path: of the script, `.py`; the tensors go beside it, `.safetensors`.

    Returns:
        What was done, or why nothing was, for the terminal.
    """
    specs = [str(row["spec"]) for row in rows if row["verdict"] == "violated"]
    for spec in map(parse_spec, dict.fromkeys(line for line in specs if line.startswith("ExpertsSpec("))):
        for variant in session.variants() if isinstance(spec, ExpertsSpec) else ():
            found = _Failing(session, variant).smallest(build_experts(spec, session.device))
            if found is not None:
                _write(session, variant, spec, found, Path(path))
                beside = Path(path).with_suffix(".safetensors").name
                return f"{path} shows {found[1].property.id} without moegate; its tensors are in {beside}"
    return f"{path} is not written: no finding is a call of the experts whose elements or rows are off"


class _Failing:
    """Looks for a smaller case on which the subject still fails."""

    def __init__(self, session: Session, variant: str) -> None:
        self._session, self._variant, self._runs = session, variant, 0

    def smallest(self, case: ExpertsCase) -> tuple[ExpertsCase, Verdict, Tensor] | None:
        """The case, its verdict and the output; None where the whole case passes."""
        best = self._failed(case)
        while best is not None:
            smaller = next(filter(None, map(self._failed, _smaller(best[0]))), None)
            if smaller is None:
                return best
            best = smaller
        return None

    def _failed(self, case: ExpertsCase) -> tuple[ExpertsCase, Verdict, Tensor] | None:
        self._runs += 1
        if self._runs > MOST_RUNS:
            return None
        trace = reference_of(case)
        try:
            output = self._session.run_experts(self._session.prepared(case, self._variant), self._variant)
        except (CallError, FormError):
            return None
        verdicts = judge_values(case, output, trace, budget_of(case, trace, self._session.subject.numerics))
        violated = [v for v in verdicts if not v.holds and v.property in (ELEMENT, ROW_RMS)]
        return (case, violated[0], output.clone()) if violated else None


def _smaller(case: ExpertsCase) -> Iterator[ExpertsCase]:
    """Cases with less in them: one token, half of the tokens, one slot, the experts that are still asked."""
    m, top_k = case.topk_ids.shape

    def of_tokens(rows: slice) -> ExpertsCase:
        operands = {name: getattr(case, name)[rows] for name in ("hidden_states", "topk_weights", "topk_ids")}
        return placed(case, prepared=None, **operands)

    if m > 1:
        yield from (of_tokens(slice(token, token + 1)) for token in range(min(m, 16)))
        yield from (of_tokens(rows) for rows in (slice(0, m // 2), slice(m // 2, m)))
    if top_k > 1:
        for slot in range(top_k):
            chosen = slice(slot, slot + 1)
            yield placed(case, topk_weights=case.topk_weights[:, chosen], topk_ids=case.topk_ids[:, chosen])
    used = case.topk_ids[case.topk_ids >= 0].unique().long()
    if case.expert_map is None and 0 < len(used) < case.num_experts:
        ids = torch.searchsorted(used, case.topk_ids.long().clamp(min=0).contiguous())
        ids = torch.where(case.topk_ids < 0, -1, ids).int()
        kept = case.layer_of_experts(used)
        yield placed(case, topk_ids=ids, num_experts=len(used), **kept)


def _write(
    session: Session, variant: str, spec: ExpertsSpec, found: tuple[ExpertsCase, Verdict, Tensor], path: Path
) -> None:
    case, verdict, output = found
    trace = reference_of(case)
    budget = budget_of(case, trace, session.subject.numerics)
    limit = limits(budget.is_quantized)
    tensors = case.tensors() | {
        "expected": trace.output,
        "allowed": limit.elementwise * budget.sigma + budget.last,
        "of_row": limit.row_rms * budget.of_row(),
        "got": output,
    }
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path.with_suffix(".safetensors"))
    options: dict[str, Any] = {
        "num_experts": case.num_experts,
        "activation": case.activation.name,
        "apply_router_weight_on_input": case.apply_router_weight_on_input,
    }
    if case.activation.name == "swigluoai":
        options |= {name: getattr(case.activation, name) for name in ("alpha", "limit", "interleaved")}
    if case.stored is not None:
        options |= {"scheme": spec.scheme, "block_shape": case.stored.block_shape}
    path.write_text(
        SCRIPT.substitute(
            id=verdict.property.id,
            subject=session.subject.name,
            variant=variant,
            device=session.device,
            sentence=verdict.property.sentence,
            detail=verdict.detail,
            spec=spec,
            options=pformat(options, sort_dicts=False),
            body="\n    ".join((session.subject.standalone or RECORDED).strip().splitlines()),
        )
    )
