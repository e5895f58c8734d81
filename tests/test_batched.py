"""The batched activation format: kernels, arguments and reference, against a float64 loop over rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moegate.impl import checks, path
from moegate.impl.batched import batched_experts
from moegate.impl.config import MoEConfig
from moegate.impl.experts.batched_triton import BatchedTritonExperts
from moegate.impl.experts.readiness import READY
from moegate.impl.oracle.available import installed_kernels
from moegate.impl.oracle.backends import UnquantizedMoeBackend
from moegate.impl.platform import Platform
from moegate.impl.tuning.kernel_config import KernelConfig, use_kernel_configs
from moegate.reference.batched import batched_experts as reference_experts
from moegate.reference.batched import routed_call
from moegate.reference.experts import experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = Platform.of(DEVICE).runs_triton
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton runs on a GPU, or with TRITON_INTERPRET=1")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-6}
LAUNCHES = {"batched_gemm_kernel": 2, "batched_activation_kernel": 1}


@pytest.fixture(autouse=True)
def _hostile_memory() -> Iterator[None]:
    """Fresh memory full of NaN."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


def layer(counts: list[int], max_tokens: int, h: int, i: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Operands whose rows behind the counts are NaN."""
    generator = torch.Generator().manual_seed(seed)
    e = len(counts)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    hidden_states = normal(e, max_tokens, h)
    for expert, count in enumerate(counts):
        hidden_states[expert, count:] = float("nan")
    return {
        "hidden_states": hidden_states.to(DEVICE, dtype),
        "w13": (normal(e, 2 * i, h) / h**0.5).to(DEVICE, dtype),
        "w2": (normal(e, h, i) / i**0.5).to(DEVICE, dtype),
        "expert_num_tokens": torch.tensor(counts, dtype=torch.int32, device=DEVICE),
    }


def judge(operands: dict[str, Any]) -> torch.Tensor:
    x, w13, w2 = (operands[name].double().cpu() for name in ("hidden_states", "w13", "w2"))
    out = torch.zeros_like(x)
    for e, count in enumerate(operands["expert_num_tokens"].tolist()):
        for r in range(count):
            gate, up = (w13[e] @ x[e, r]).chunk(2)
            out[e, r] = w2[e] @ (torch.nn.functional.silu(gate) * up)
    return out


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.isfinite().all()
    assert (got[(want == 0).all(dim=-1).to(got.device)] == 0).all()
    error = (got.double().cpu() - want).abs().max()
    assert error <= TOLERANCE[got.dtype] * max(float(want.abs().max()), 1e-6), float(error)


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("counts", "max_tokens", "h", "i"),
    [
        pytest.param([15, 16, 17, 0, 33], 33, 70, 24, id="around-a-tile"),
        pytest.param([20, 20], 20, 96, 40, id="full"),
        pytest.param([0, 0, 19], 40, 33, 17, id="one-expert-odd"),
        pytest.param([0, 0], 5, 64, 32, id="nobody"),
        pytest.param([1], 1, 1, 1, id="ones"),
    ],
)
def test_every_row_goes_through_its_expert(
    dtype: torch.dtype, counts: list[int], max_tokens: int, h: int, i: int
) -> None:
    operands = layer(counts, max_tokens, h, i, dtype)
    before = {name: tensor.clone() for name, tensor in operands.items()}
    with path.record_path() as record, checks.debug_checks():
        out = batched_experts(**operands, backend="triton")
    agree(out, judge(operands))
    assert all(torch.equal(t.view(torch.uint8), before[name].view(torch.uint8)) for name, t in operands.items())
    assert record.last("backend") == "batched_triton"
    assert record.launches == LAUNCHES


@needs_triton
def test_rows_and_slabs_may_be_strided_and_the_rest_of_out_is_left_alone() -> None:
    operands = layer([3, 0, 18], 20, 40, 24, torch.bfloat16)
    want = judge(operands)
    for name in ("hidden_states", "w13", "w2"):
        e, rows, width = operands[name].shape
        wide = torch.full((e, rows + 2, width + 7), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        operands[name] = wide[:, :rows, :width].copy_(operands[name])
    wide_out = torch.full((20, 3, 50), 7.0, dtype=torch.bfloat16, device=DEVICE)
    out = wide_out.transpose(0, 1)[..., :40]  # slabs between each other's rows
    assert batched_experts(**operands, backend="triton", out=out) is out
    for expert, count in enumerate([3, 0, 18]):
        agree(out[expert, :count], want[expert, :count]) if count else None
        out[expert, :count] = 7
    assert (wide_out == 7).all()


@needs_triton
@pytest.mark.parametrize(
    "config",
    [
        KernelConfig(16, 32, 32, swap_ab=True),
        KernelConfig(32, 16, 64, group_size_m=3),
        KernelConfig(16, 16, 16, group_size_m=2, swap_ab=True),
    ],
    ids=str,
)
def test_every_kind_of_tile_gives_the_result(config: KernelConfig) -> None:
    operands = layer([50, 7, 0, 33], 64, 72, 40, torch.float16)
    with use_kernel_configs(config), path.record_path() as record:
        agree(batched_experts(**operands, backend="triton"), judge(operands))
    assert record.last("config") == config.as_dict() | {"source": "override"}


@needs_triton
@pytest.mark.parametrize(("e", "max_tokens"), [(0, 4), (3, 0), (0, 0)])
def test_without_experts_or_tokens_nothing_is_launched(e: int, max_tokens: int) -> None:
    with path.record_path() as record:
        out = batched_experts(**layer([0] * e, max_tokens, 16, 8, torch.float16), backend="triton")
    assert out.shape == (e, max_tokens, 16)
    assert not record.launches


@needs_triton
def test_a_stray_count_never_leaves_its_slab() -> None:
    operands = layer([4, 4, 4], 4, 16, 8, torch.float32)
    want = judge(operands)
    operands["expert_num_tokens"] = torch.tensor([99, -3, 4], dtype=torch.int32, device=DEVICE)
    want[1] = 0
    agree(batched_experts(**operands, backend="triton"), want)


def bad_calls() -> list[Any]:
    t = torch.empty
    i32 = torch.int32
    return [
        pytest.param(TypeError, "hidden_states", {"hidden_states": [[1.0]]}, id="no-tensor"),
        pytest.param(ValueError, "hidden_states", {"hidden_states": t(8, 16)}, id="standard-format"),
        pytest.param(TypeError, "hidden_states", {"hidden_states": t((2, 4, 16), dtype=torch.float64)}, id="dtype"),
        pytest.param(ValueError, "hidden_states", {"hidden_states": t(2, 16, 4).mT}, id="layout"),
        pytest.param(TypeError, "w2", {"w2": t((2, 16, 8), dtype=torch.float16)}, id="mixed-dtypes"),
        pytest.param(ValueError, "w2", {"w2": t(3, 16, 8)}, id="another-E"),
        pytest.param(ValueError, "w2", {"w2": t(2, 16, 0), "w13": t(2, 0, 16)}, id="no-I"),
        pytest.param(ValueError, "w13", {"w13": t(2, 17, 16)}, id="odd-gate-up"),
        pytest.param(ValueError, "w13", {"w13": t(2, 16, 16, device="meta")}, id="device"),
        pytest.param(TypeError, "expert_num_tokens", {"expert_num_tokens": t(2, dtype=torch.int64)}, id="int64"),
        pytest.param(ValueError, "expert_num_tokens", {"expert_num_tokens": t(3, dtype=i32)}, id="counts"),
        pytest.param(
            ValueError, "expert_num_tokens", {"expert_num_tokens": t(4, dtype=i32).to(DEVICE)[::2]}, id="strided-counts"
        ),
        pytest.param(ValueError, "activation", {"activation": "tanh"}, id="activation"),
        pytest.param(TypeError, "allow_tf32", {"allow_tf32": 1}, id="no-bool"),
        pytest.param(TypeError, "backend", {"backend": 3}, id="no-name"),
        pytest.param(ValueError, "backend", {"backend": "cutlass"}, id="unknown-backend"),
        pytest.param(ValueError, "out", {"out": t(2, 4, 17)}, id="out-shape"),
        pytest.param(ValueError, "out", {"out": t(1, 4, 16).to(DEVICE).expand(2, 4, 16)}, id="out-shares-slabs"),
        pytest.param(ValueError, "out", {"out": t(2, 1, 16).to(DEVICE).expand(2, 4, 16)}, id="out-shares-rows"),
    ]


@needs_triton
@pytest.mark.parametrize(("error", "name", "changes"), bad_calls())
def test_bad_input_is_refused_by_name(error: type[Exception], name: str, changes: dict[str, Any]) -> None:
    operands: dict[str, Any] = {"backend": "triton", **layer([4, 2], 4, 16, 8, torch.float32)}
    for key, value in changes.items():
        keep = not isinstance(value, torch.Tensor) or value.is_meta
        operands[key] = value if keep else value.to(DEVICE)
    with path.record_path() as record, pytest.raises(error, match=rf"{name}.*expected.*got"):
        batched_experts(**operands)
    assert not record.launches


@needs_triton
def test_out_may_not_overlap_an_input() -> None:
    operands = layer([4, 2], 4, 16, 8, torch.float32)
    with pytest.raises(ValueError, match=r"out: .*hidden_states"):
        batched_experts(**operands, backend="triton", out=operands["hidden_states"])


@needs_triton
@pytest.mark.parametrize("stray", [-1, 5])
def test_debug_checks_see_a_stray_count(stray: int) -> None:
    operands = layer([4, 2], 4, 16, 8, torch.float32)
    operands["expert_num_tokens"][1] = stray
    with (
        checks.debug_checks(),
        pytest.raises(ValueError, match=rf"expert_num_tokens: expected counts in \[0, 4\], got {stray}"),
    ):
        batched_experts(**operands, backend="triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is offered the Triton kernels unasked")
@pytest.mark.parametrize("backend", ["cpu", None])
def test_a_backend_of_the_standard_format_is_refused(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEGATE_BACKEND", raising=False)
    with pytest.raises(ValueError, match="takes the standard activation format, got batched"):
        batched_experts(**layer([1], 1, 16, 8, torch.float32), backend=backend)


@pytest.mark.parametrize("changes", [{}, {"scheme": "fp8_w8a8"}, {"is_lora_enabled": True}])
def test_the_kernel_is_shipped(changes: dict[str, Any]) -> None:
    config = MoEConfig(8, 2, 128, 128, activation_format="batched", **changes)
    platform = Platform.parse("cuda:9.0")
    assert installed_kernels(config, platform)[UnquantizedMoeBackend.BATCHED_TRITON] is READY
    assert BatchedTritonExperts.refusal(config, platform) is None


@pytest.mark.skipif(DEVICE == "cpu", reason="a graph needs a GPU")
def test_a_graph_replays_with_other_counts() -> None:
    operands = layer([64, 64, 64], 64, 256, 128, torch.bfloat16)
    out = torch.zeros_like(operands["hidden_states"])
    batched_experts(**operands, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batched_experts(**operands, out=out)
    other = layer([0, 17, 64], 64, 256, 128, torch.bfloat16, seed=1)
    for name in ("hidden_states", "expert_num_tokens"):
        operands[name].copy_(other[name])
    out.zero_()
    graph.replay()
    agree(out, judge(operands))


def test_the_definition_is_the_routed_layer_with_one_expert_a_row_and_weights_of_one() -> None:
    operands = layer([3, 0, 5], 6, 12, 8, torch.float32)
    want = judge(operands).to(DEVICE)
    out = reference_experts(**operands)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    rows, weights, ids, place = routed_call(operands["hidden_states"], operands["expert_num_tokens"])
    assert ids.flatten().tolist() == [0] * 3 + [2] * 5
    routed = experts(rows, operands["w13"], operands["w2"], weights, ids)
    torch.testing.assert_close(routed, out[place], rtol=1e-12, atol=1e-12)
