"""The reference against scalar Python loops, written from the equations and not from its code."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch

from moegate.reference.activations import silu_slope
from moegate.reference.alignment import padded_count, pairs_of_each_expert
from moegate.reference.experts import experts

ROOM = Path(__file__).resolve().parents[1] / "reference"


def loop_experts(x, w13, w2, weights, ids, *, expert_map, on_input):
    """out[t] = sum_j c_j * W2[e_j] (silu(g) * u), one multiplication at a time."""
    out = []
    for token, row in enumerate(x):
        total = [0.0] * len(row)
        for c, e in zip(weights[token], ids[token], strict=True):
            local = -1 if e < 0 else e if expert_map is None else expert_map[e]
            if local < 0:
                continue
            inputs = [c * v for v in row] if on_input else row
            gate_up = [sum(w * v for w, v in zip(line, inputs, strict=True)) for line in w13[local]]
            half = len(gate_up) // 2
            hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate_up[:half], gate_up[half:], strict=True)]
            for h, line in enumerate(w2[local]):
                total[h] += (1.0 if on_input else c) * sum(w * v for w, v in zip(line, hidden, strict=True))
        out.append(total)
    return out


CASES = {
    "plain": {},
    "a_repeated_expert_counts_twice": {"ids": [[1, 1], [0, 2], [2, 2]]},
    "no_expert_contributes_nothing": {"ids": [[-1, 1], [0, -1], [-1, -1]]},
    "experts_elsewhere_contribute_nothing": {"expert_map": [1, -1, 0], "held": 2},
    "a_rank_that_owns_nothing": {"expert_map": [-1, -1, -1], "held": 1},
    "no_expert_and_a_map": {"ids": [[-1, 1], [0, 2], [-1, -1]], "expert_map": [-1, 0, 1], "held": 2},
    "weight_on_the_input": {"ids": [[1], [0], [2]], "on_input": True},
    "weight_on_the_input_of_an_absent_expert": {"ids": [[1], [-1], [2]], "on_input": True},
}


@pytest.mark.parametrize("name", CASES)
def test_the_experts_say_what_the_scalar_loop_says(name):
    case = CASES[name]
    ids = case.get("ids", [[0, 1], [2, 0], [1, 2]])
    expert_map, held = case.get("expert_map"), case.get("held", 3)
    generator = torch.Generator().manual_seed(len(name))

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, w13, w2, weights = draw(3, 5), draw(held, 8, 5), draw(held, 5, 4), draw(3, len(ids[0]))
    got, trace = experts(
        x,
        w13,
        w2,
        weights,
        torch.tensor(ids, dtype=torch.int32),
        expert_map=None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32),
        apply_router_weight_on_input=case.get("on_input", False),
        trace=True,
    )
    lists = (t.tolist() for t in (x, w13, w2, weights))
    expected = loop_experts(*lists, ids, expert_map=expert_map, on_input=case.get("on_input", False))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert torch.equal(trace.output, got)
    absent = trace.local_ids < 0
    for part in (trace.gate, trace.up, trace.hidden, trace.expert_output, trace.output_weights):
        assert (part[absent] == 0).all()


def test_the_experts_take_no_tokens():
    w13, w2 = torch.ones(2, 6, 4), torch.ones(2, 4, 3)
    assert experts(torch.empty(0, 4), w13, w2, torch.empty(0, 2), torch.empty(0, 2).int()).shape == (0, 4)


def test_the_slope_of_silu_is_its_difference_quotient():
    def scalar_silu(g):
        return g / (1 + math.exp(-g))

    step = 1e-5
    for gate in (-30.0, -1.278, -0.5, 0.0, 0.5, 4.0, 30.0):
        quotient = (scalar_silu(gate + step) - scalar_silu(gate - step)) / (2 * step)
        assert float(silu_slope(torch.tensor(gate, dtype=torch.float64))) == pytest.approx(quotient, abs=1e-9)


def test_each_expert_has_the_flat_indices_of_its_pairs():
    ids = torch.tensor([[2, 0], [2, -1], [1, 2]], dtype=torch.int32)
    assert [p.tolist() for p in pairs_of_each_expert(ids, 4)] == [[1], [4], [0, 2, 5], []]
    mapped = pairs_of_each_expert(ids, 2, torch.tensor([-1, 1, 0], dtype=torch.int32))
    assert [p.tolist() for p in mapped] == [[0, 2, 5], [4]]


def test_padding_rounds_each_expert_up_to_whole_blocks():
    sizes = (0, 1, 15, 16, 17)
    assert padded_count([torch.arange(n) for n in sizes], 16) == 0 + 16 + 16 + 16 + 32


def _modules():
    return [(path, ast.parse(path.read_text())) for path in sorted(ROOM.rglob("*.py"))]


def test_the_reference_imports_only_torch_and_the_standard_library():
    for path, tree in _modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [node.module or ""]
            else:
                continue
            foreign = [name for name in imported if name.split(".")[0] not in sys.stdlib_module_names | {"torch"}]
            assert not foreign, f"{path.name} imports {foreign}"


def test_the_reference_can_be_read_in_one_sitting():
    lines = 0
    for path, tree in _modules():
        prose = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            lines += bool(line.strip()) and not line.strip().startswith("#") and number not in prose
    assert 0 < lines < 650
