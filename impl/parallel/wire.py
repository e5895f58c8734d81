"""How tokens travel: two tensors, one of hidden states, one of 32-bit words with everything else that a token carries.

Two collectives are enough then, whatever travels. Where the experts' scheme quantises activations a row at a time, the
rows are quantised before they leave: the experts would give them the same bits, and half of the bytes stay at home.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..quantization import ActivationScale, ExpertsQuantization
from ..quantize import quantize_activations


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens with what the experts need of them.

    Attributes:
        hidden_states: `[M, H]`, in few bits where `input_scale` is there.
        topk_weights: `[M, top_k]` float32.
        topk_ids: `[M, top_k]` int32, physical ids on the way, local ones where `ids_are_local`; -1: no expert.
        lora_ids: `[M]` int32, the adapter of each token, -1: none; or None. Whatever it means, it stays with its token.
        input_scale: of hidden states in few bits, float32 `[1]`, `[M, 1]` or `[M, groups]`.
        ids_are_local: `topk_ids` number the experts of this rank.
    """

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    lora_ids: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    ids_are_local: bool = False

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.topk_ids.shape[0]


class Wire:
    """Tokens to what travels, and back.

    Args:
        quant: how the experts are stored.
    """

    def __init__(self, quant: ExpertsQuantization | None = None) -> None:
        self._quant = quant
        scale = ActivationScale.NONE if quant is None else quant.activation_scale
        # The scale of a whole tensor is known only where the whole tensor is.
        self.scale = ActivationScale.NONE if scale is ActivationScale.TENSOR else scale

    def quantized(self, tokens: Tokens) -> Tokens:
        """The tokens as they travel."""
        quant = self._quant
        if quant is None or self.scale is ActivationScale.NONE or quant.activation_dtype is None:
            return tokens
        group = quant.group if self.scale is ActivationScale.GROUP else 0
        static = quant.a13_scale if self.scale is ActivationScale.STATIC else None
        rows, scale = quantize_activations(
            tokens.hidden_states, quant.activation_dtype, self.scale, group=group, static_scale=static
        )
        return replace(tokens, hidden_states=rows, input_scale=scale)

    def words(self, tokens: Tokens) -> torch.Tensor:
        """`[M, words]` int32: ids, weights, the adapter and the scales of each token."""
        parts = [tokens.topk_ids, tokens.topk_weights.contiguous().view(torch.int32)]
        if tokens.lora_ids is not None:
            parts.append(tokens.lora_ids[:, None])
        if self.scale_travels and tokens.input_scale is not None:
            parts.append(tokens.input_scale.contiguous().view(torch.int32))
        return torch.cat(parts, dim=1)

    def tokens(self, rows: torch.Tensor, words: torch.Tensor, like: Tokens, *, ids_are_local: bool) -> Tokens:
        """What arrived; `like` is what was sent, and says how the words are laid out."""
        top_k = like.topk_ids.shape[1]
        ids, weights, rest = words[:, :top_k], words[:, top_k : 2 * top_k], words[:, 2 * top_k :]
        lora_ids = None
        if like.lora_ids is not None:
            lora_ids, rest = rest[:, 0].contiguous(), rest[:, 1:]
        scale = rest.contiguous().view(torch.float32) if self.scale_travels else like.input_scale
        weights = weights.contiguous().view(torch.float32)
        return Tokens(rows, weights, ids.contiguous(), lora_ids, scale, ids_are_local)

    @property
    def scale_travels(self) -> bool:
        """Whether each token has scales of its own."""
        return self.scale in (ActivationScale.TOKEN, ActivationScale.GROUP)
