"""Which experts each token goes to, and with what weight."""

from __future__ import annotations

import torch

from . import path
from .checks import FLOATS, expect_bool, expect_int, expect_tensor
from .kernels.device import current_device
from .kernels.topk_softmax import topk_softmax
from .platform import Platform


def select_experts(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the experts, then the top_k largest of each row (Shazeer et al., arXiv 1701.06538; Qwen3-MoE).

    Experts come in descending order of their logit; equal logits rank the lower id first. A NaN ranks and weighs as
    -inf. Infinite logits share their row's weight evenly; a row of nothing but -inf and NaN weighs every expert 1/E
    and chooses ids 0 to top_k - 1. Ids of a row are always distinct, and no weight is NaN.

    Args:
        router_logits: [M, E] bfloat16, float16 or float32; a row stride above E is fine.
        top_k: experts a token, in [1, E].
        renormalize: divide the chosen weights by their sum (Qwen3's `norm_topk_prob`).
        backend: "triton", "torch" or None: Triton wherever it runs.

    Returns:
        topk_weights: [M, top_k] float32.
        topk_ids: [M, top_k] int32.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or range, by name; an unknown backend, or
            "triton" on a device where it does not run.
    """
    expect_tensor("router_logits", router_logits, shape=("M", "E"), dtypes=FLOATS)
    num_tokens, num_experts = router_logits.shape
    if num_experts < 1:
        raise ValueError(f"router_logits: expected at least one expert, got shape {list(router_logits.shape)}")
    expect_int("top_k", top_k, low=1, high=num_experts)
    expect_bool("renormalize", renormalize)
    runs_triton = Platform.of(router_logits.device).runs_triton
    if backend is None:
        backend = "triton" if runs_triton else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend: expected 'triton', 'torch' or None, got {backend!r}")
    if backend == "triton" and not runs_triton:
        raise ValueError(f"backend: expected 'torch' where Triton does not run, got 'triton' on {router_logits.device}")
    path.note("routing", backend)
    if num_tokens == 0:
        return (
            router_logits.new_empty((0, top_k), dtype=torch.float32),
            router_logits.new_empty((0, top_k), dtype=torch.int32),
        )
    if backend == "triton":
        with current_device(router_logits):
            return topk_softmax(router_logits, top_k, renormalize)
    return _topk_softmax_torch(router_logits, top_k, renormalize)


def _topk_softmax_torch(
    router_logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = router_logits.float()
    logits = torch.where(torch.isnan(logits), -torch.inf, logits)
    ranked, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    maximum = ranked[:, :1]
    share = torch.where(maximum.isinf(), (ranked == maximum).float(), torch.exp(ranked - maximum))
    chosen = share[:, :top_k]
    total = (chosen if renormalize else share).sum(dim=-1, keepdim=True)
    return (chosen / total).contiguous(), ids[:, :top_k].to(torch.int32).contiguous()
