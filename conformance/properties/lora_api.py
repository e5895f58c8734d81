"""LORA-12: adapters and ids that must be refused, and what a refusal leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..judge import Verdict
from ..lora_cases import LoraAdapter, LoraCase, LoraMatrix
from .lora import REFUSED, LoraLayer, Make, differing_rows, loaded


@dataclass(frozen=True)
class BadAdapter:
    """An adapter that must be refused.

    Attributes:
        what: is wrong with it.
        named: what the message must name.
        change: a good adapter to a bad one.
        slot: that it is loaded into.
    """

    what: str
    named: str
    change: Callable[[LoraAdapter], LoraAdapter]
    slot: int = 0

    def __str__(self) -> str:
        return f"adapter-{self.what}".replace(" ", "_")


def _with(part: str, change: Callable[[LoraMatrix], LoraMatrix]) -> Callable[[LoraAdapter], LoraAdapter]:
    """One expert of one part changed."""

    def changed(adapter: LoraAdapter) -> LoraAdapter:
        matrices: Mapping[int, LoraMatrix] = getattr(adapter, part)
        expert = max(matrices)
        return replace(adapter, **{part: {**matrices, expert: change(matrices[expert])}})

    return changed


def _grown(rank: int) -> Callable[[LoraMatrix], LoraMatrix]:
    return lambda m: replace(m, a=m.a.repeat(rank, 1)[:rank], b=m.b.repeat(1, rank)[:, :rank])


def _holding(value: float) -> Callable[[LoraMatrix], LoraMatrix]:
    return lambda m: replace(m, a=m.a.clone().index_fill_(1, torch.tensor([0], device=m.a.device), value))


BAD_ADAPTERS = (
    BadAdapter("of another hidden size", "down", _with("down", lambda m: replace(m, b=m.b[:-1]))),
    BadAdapter("of another intermediate size", "up", _with("up", lambda m: replace(m, b=torch.cat([m.b, m.b])))),
    BadAdapter("of an A of another hidden size", "gate", _with("gate", lambda m: replace(m, a=m.a[:, 1:]))),
    BadAdapter("of more experts", "expert", lambda a: replace(a, down={**a.down, 999: next(iter(a.down.values()))})),
    BadAdapter("of a negative expert", "expert", lambda a: replace(a, up={**a.up, -1: next(iter(a.up.values()))})),
    BadAdapter("of a rank over the maximum", "rank", _with("down", _grown(257))),
    BadAdapter("of a rank over the table's own maximum", "rank", _with("down", _grown(129))),
    BadAdapter("with a NaN", "finite", _with("gate", _holding(float("nan")))),
    BadAdapter("with an infinite number", "finite", _with("down", _holding(float("inf")))),
    BadAdapter("of an A without its B", "b", _with("gate", lambda m: replace(m, b=None))),
    BadAdapter("of a B of another rank", "b", _with("gate", lambda m: replace(m, b=m.b[:, :-1]))),
    BadAdapter("of mixed dtypes", "dtype", _with("up", lambda m: replace(m, b=m.b.double().float()))),
    BadAdapter("of another dtype", "dtype", _with("down", lambda m: replace(m, a=m.a.float(), b=m.b.float()))),
    BadAdapter("with a scale of NaN", "scale", _with("gate", lambda m: replace(m, scale=float("nan")))),
    BadAdapter("with gate_up beside gate", "gate_up", lambda a: replace(a, gate_up=_joined(a))),
    BadAdapter("into a slot that is not there", "slot", lambda a: a, slot=99),
    BadAdapter("into a negative slot", "slot", lambda a: a, slot=-1),
)


def _joined(adapter: LoraAdapter) -> dict[int, LoraMatrix]:
    return {e: replace(m, b=torch.cat([m.b, m.b])) for e, m in adapter.gate.items()}


BAD_IDS = (-2, 4, 1 << 30)
"""Ids beside the four adapters of a case."""


def judge_bad_ids(bad: int, case: LoraCase, make: Make) -> list[Verdict]:
    """An id that is no slot, which the checks see that wait for the device; what is run before and after it."""
    layer = loaded(make, case)
    before, ids = layer.run(case.lora_ids), case.lora_ids.clone()
    ids.view(-1)[0] = bad
    return _judge_refusal(f"lora_ids with {bad}", ("lora_ids", str(bad)), lambda: layer.run(ids), layer, case, before)


def judge_bad_adapter(bad: BadAdapter, case: LoraCase, make: Make) -> list[Verdict]:
    """A refusal by ValueError or TypeError that names what is wrong; the output before and after it."""
    layer = loaded(make, case)
    before = layer.run(case.lora_ids)
    change = bad.change(case.adapters[0])
    return _judge_refusal(str(bad), (bad.named,), lambda: layer.load(bad.slot, change), layer, case, before)


def _judge_refusal(
    what: str,
    named: tuple[str, ...],
    call: Callable[[], object],
    layer: LoraLayer,
    case: LoraCase,
    before: torch.Tensor,
) -> list[Verdict]:
    """Whether `call` is refused by an error that names all of `named`, and leaves the layer's output as before."""
    try:
        call()
    except (ValueError, TypeError) as error:
        said = str(error)
    except Exception as error:  # any other error is a finding, not the end of the run
        return [REFUSED.verdict(False, f"{what}: {type(error).__name__}: {error}")]
    else:
        return [REFUSED.verdict(False, f"{what}: accepted")]
    stray = differing_rows(case, layer.run(case.lora_ids), before)
    is_named = all(name.lower() in said.lower() for name in named)
    return [REFUSED.verdict(is_named and not stray, f"{what}: said {said!r}, named {is_named}; {stray} rows changed")]
