"""A MoE layer as anyone would write it in torch: an honest implementation that owes nothing to `impl`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.activations import Activation
from ..cases import BatchedCase, ExpertsCase, LayerCase, QuantizeCase, RoutingCase
from ..numerics import Numerics
from ..shared_cases import SharedCase
from ..spec import ACTIVATIONS, BIASES, LOGITS, SCHEMES
from ..stored import StoredExperts
from ..subject import ROUTING_METHODS, Capabilities, Subject


def quantized(x: Tensor, kind: str, granularity: str, group: int, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows `[R, K]` in few bits, and their scales as they broadcast to `[R, K / group, group]`; see `scaled_back`."""
    largest = 448.0 if kind == "fp8" else 127.0
    blocks = _in_blocks(x.float(), group)
    if static_scale is not None:
        scale = static_scale.float().reshape(1, 1, 1)
    elif granularity == "tensor":
        scale = blocks.abs().max().reshape(1, 1, 1) / largest if blocks.numel() else blocks.new_ones(1, 1, 1)
    else:
        scale = blocks.abs().amax(dim=2, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    scaled = (blocks / scale).clamp(-largest, largest)
    return (scaled.to(torch.float8_e4m3fn) if kind == "fp8" else scaled.round().to(torch.int8)), scale


def _in_blocks(x: Tensor, group: int) -> Tensor:
    """`[R, K]` to `[R, ceil(K / group), group]`, padded with zeros."""
    group = group or max(1, x.shape[1])
    return F.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))


def dequantized(stored: StoredExperts, name: str, weight: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """One GEMM's weights `[E, N, K]` in `dtype`, every expert at once."""
    scale, zero = getattr(stored, f"{name}_scale").float(), getattr(stored, f"{name}_zero_point")
    bn, bk = stored.block_shape or (0, 0)
    w = weight.float()
    if weight.dtype == torch.uint8:
        w = torch.stack((weight % 16, weight // 16), dim=3).flatten(2).float()
        if zero is None:
            w = w - 8
        else:
            w = w - torch.stack((zero % 16, zero // 16), dim=2).flatten(1, 2).repeat_interleave(bk, dim=2).float()
    num_experts, n, k = w.shape
    if scale.ndim < 3:
        scale = scale.reshape(num_experts, -1, 1)
    else:
        scale = scale.repeat_interleave(bk, dim=2)[:, :, :k]
        if bn:
            grids = scale.unflatten(1, (parts, -1)).repeat_interleave(bn, dim=2)
            scale = grids[:, :, : n // parts].flatten(1, 2)
    return (w * scale).to(dtype)


def activate(rows: Tensor, activation: Activation) -> Tensor:
    """The activation of the first GEMM's rows, in the storage dtype; the activated gate is rounded to it too."""
    name = activation.name.removesuffix("_no_mul")
    up = None
    if activation.interleaved:
        rows, up = rows.unflatten(-1, (-1, 2)).unbind(-1)
    elif activation.is_gated:
        rows, up = rows.chunk(2, dim=-1)
    if name == "swigluoai" and up is not None:
        rows = rows.float().clamp(max=activation.limit)
        gate = (rows * torch.sigmoid(activation.alpha * rows)).to(up.dtype)
        return (gate.float() * (up.float().clamp(-activation.limit, activation.limit) + 1)).to(up.dtype)
    if name == "silu":
        gate = F.silu(rows)
    elif name == "relu2":
        gate = (F.relu(rows.float()) ** 2).to(rows.dtype)
    else:
        gate = F.gelu(rows, approximate="tanh" if name == "gelu_tanh" else "none")
    return gate if up is None else gate * up


class EagerSubject(Subject):
    """Linear layers, activations and products that return the storage dtype, expert by expert."""

    name = "torch"
    # Softmax of rows without a finite logit is NaN in torch.
    capabilities = Capabilities(
        logits=tuple(name for name in LOGITS if name not in ("nan_rows", "infinite_rows")),
        schemes=tuple(SCHEMES),
        activations=tuple(ACTIVATIONS),
        biases=BIASES,
        **ROUTING_METHODS,
    )
    numerics = Numerics(
        gate="storage",
        expert_output="storage",
        weighted="storage",
        combine="storage",
        routing_weight="storage",
        shrunk="float32",
        dequantized_weight="storage",
    )

    def route(self, case: RoutingCase, variant: str) -> tuple[Tensor, Tensor]:
        """Float32 scores, masked groups and a stable sort's first ids: torch.topk promises no order of ties."""
        real = case.num_real_tokens
        if case.custom_routing_function is not None:
            weights, ids = case.custom_routing_function(
                hidden_states=None, gating_output=case.router_logits, topk=case.top_k, renormalize=case.renormalize
            )
            weights = weights * case.routed_scaling_factor
        else:
            weights, ids = _routed(case)
        weights, ids = weights.clone(), ids.to(torch.int32, copy=True)
        weights[real:], ids[real:] = 0.0, -1
        return weights, ids

    def _as_read(self, stored: StoredExperts | None, x: Tensor, static_scale: Tensor | None) -> Tensor:
        """Rows as a GEMM reads them, float32: quantised and scaled back where the scheme says so."""
        if stored is None or stored.scheme.activation_scale is None:
            return x.float()
        scheme = stored.scheme
        group = stored.block_shape[1] if stored.block_shape else 0
        values, scale = quantized(x, str(scheme.weight), str(scheme.activation_scale), group, static_scale)
        return (values.float() * scale).flatten(1)[:, : x.shape[1]]

    def _outputs(self, case: LayerCase, x: Tensor, rows: Sequence[Tensor], on_input: Sequence[Tensor]) -> list[Tensor]:
        """For each expert held here, what it makes of its rows of x `[R, H]`: `[P, H]` in the storage dtype.

        Every linear map is summed in float32 and rounded once; `on_input` has a float32 factor for each row.
        """
        dtype, stored = x.dtype, case.stored
        w13, w2 = case.w13, case.w2
        if stored is not None:
            wide = dtype if stored.scheme.activation_scale is None else torch.float32
            w13 = dequantized(stored, "w13", w13, 2 if case.activation.is_gated else 1, wide)
            w2 = dequantized(stored, "w2", w2, 1, wide)
        read = self._as_read(stored, x, None if stored is None else stored.a13_scale)
        hidden = []
        for expert, chosen in enumerate(rows):
            # A weight on the input passes through the linear map, so that it costs one rounding and not one a term.
            product = F.linear(read[chosen], w13[expert].float()) * on_input[expert][:, None]
            product = product if case.w13_bias is None else product + case.w13_bias[expert].float()
            hidden.append(activate(product.to(dtype), case.activation))
        read = self._as_read(stored, torch.cat(hidden), None if stored is None else stored.a2_scale)
        outputs = []
        for expert, part in enumerate(read.split([len(chosen) for chosen in rows])):
            bias = None if case.w2_bias is None else case.w2_bias[expert].float()
            outputs.append(F.linear(part, w2[expert].float(), bias).to(dtype))
        return outputs

    def experts(self, case: ExpertsCase, variant: str) -> Tensor:
        """One expert at a time."""
        x = case.hidden_states
        out = torch.zeros_like(x)
        ids = case.topk_ids.long()
        if case.expert_map is not None:
            ids = torch.where(ids < 0, ids, case.expert_map.long()[ids.clamp(min=0)])
        weights = case.topk_weights.to(x.dtype)
        pairs = [(ids == expert).nonzero(as_tuple=True) for expert in range(case.num_local_experts)]
        on_input = [
            weights[pair].float() if case.apply_router_weight_on_input else torch.ones(len(pair[0]), device=x.device)
            for pair in pairs
        ]
        outputs = self._outputs(case, x, [token for token, _ in pairs], on_input)
        for (token, slot), y in zip(pairs, outputs, strict=True):
            if not case.apply_router_weight_on_input:
                y = y * weights[token, slot, None]
            out.index_add_(0, token, y)
        return out

    def shared(self, case: SharedCase, variant: str, *, overlapped: bool, hold: Callable[[str], None] | None) -> Tensor:
        """Both parts, one after the other, and their sum."""
        weights = case.routed.topk_weights * case.routed_scaling_factor
        routed = self.experts(replace(case.routed, topk_weights=weights), variant)
        gate = torch.ones_like(case.shared.topk_weights)
        if case.gate is not None:
            gate = torch.sigmoid(F.linear(case.hidden_states.float(), case.gate))
        return routed + self.experts(replace(case.shared, topk_weights=gate), variant)

    def quantize(self, case: QuantizeCase, variant: str) -> tuple[Tensor, Tensor]:
        """The quantiser that the experts use."""
        how = case.how
        kind = "fp8" if how.dtype == torch.float8_e4m3fn else "int8"
        values, scale = quantized(case.x, kind, how.granularity, how.group, case.static_scale)
        is_one = how.granularity == "tensor"
        return values.flatten(1)[:, : case.x.shape[1]], scale.reshape(1) if is_one else scale.flatten(1)

    def batched(self, case: BatchedCase, variant: str, out: Tensor | None) -> Tensor:
        """One slab at a time."""
        x = case.hidden_states
        out = torch.zeros_like(x, memory_format=torch.contiguous_format) if out is None else out
        counts = case.expert_num_tokens.tolist()
        tokens = torch.cat([slab[:count] for slab, count in zip(x, counts, strict=True)])
        rows = list(torch.arange(len(tokens), device=x.device).split(counts))
        ones = [torch.ones(count, device=x.device) for count in counts]
        for expert, y in enumerate(self._outputs(case, tokens, rows, ones)):
            out[expert, : len(y)] = y
        return out


def _routed(case: RoutingCase) -> tuple[Tensor, Tensor]:
    logits = case.router_logits.float()
    if case.scoring_func == "softmax":
        scores = torch.softmax(logits, dim=-1)
    elif case.scoring_func == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = F.softplus(logits).sqrt()
    ranking = scores if case.e_score_correction_bias is None else scores + case.e_score_correction_bias.float()
    if case.num_expert_group is not None:
        groups = ranking.unflatten(1, (case.num_expert_group, ranking.shape[1] // case.num_expert_group))
        best = groups.topk(2, dim=-1).values.sum(-1) if case.group_ranking == "top2_sum" else groups.amax(dim=-1)
        kept = _first(best, case.topk_group or 1)
        dropped = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
        ranking = groups.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    elif case.scoring_func == "softmax" and case.e_score_correction_bias is None:
        ranking = logits  # they rank as their softmax does, and none underflows
    ids = _first(ranking, case.top_k)
    weights = scores.gather(1, ids)
    if case.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * case.routed_scaling_factor, ids


def _first(values: Tensor, count: int) -> Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
