"""How tokens travel: a row of bytes each, its hidden state first, then 32-bit words with all else that a token carries.

One collective is enough then, whatever travels, and what arrives is read where it lies. Where the experts' scheme
quantises activations a row at a time, the rows are quantised before they leave: the experts would give them the same
bits, and half of the bytes stay at home.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from ..kernels import travel as kernels
from ..platform import Platform
from ..quantization import ActivationScale, ExpertsQuantization
from ..quantize import quantize_activations
from ..replay import replayable
from .rows import as_bytes
from .travel import Travel, ranks_of_pairs

# Rows start on so many bytes: experts read the hidden states in place, in whole cache lines.
_ALIGNMENT = 128


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

    def pack(self, tokens: Tokens, num_rows: int, travel: Travel | None = None) -> torch.Tensor:
        """`[num_rows, bytes]` uint8: the tokens as they travel, in one launch where Triton runs.

        Args:
            tokens: quantised as they are to be.
            num_rows: at least M, and rows behind the last token are padding without an expert; or, with a plan, the
                most rows that it can have: those behind its last one are left as they are.
            travel: which rank gets which token, by its own numbers of the experts; None: every rank all of them. Rows
                that it sets aside and does not need are padding.
        """
        sizes, device = self._sizes(tokens), tokens.topk_ids.device
        scales = tokens.input_scale if self.scale_travels else None
        if num_rows and Platform.of(device).runs_triton:
            return _packed_rows(
                as_bytes(tokens.hidden_states),
                tokens.topk_ids.contiguous(),
                tokens.topk_weights.contiguous(),
                tokens.lora_ids,
                scales,
                *((None,) * 5 if travel is None else _of_plan(travel)),
                max(travel.room.sent) if travel is not None and travel.room is not None else 0,
                num_rows,
                *sizes,
            )
        buffer = torch.empty((num_rows, _row_bytes(*sizes)), dtype=torch.uint8, device=device)
        if not num_rows:
            return buffer
        rows, words = self._views(buffer, tokens)
        ids, hidden_states, parts = tokens.topk_ids, as_bytes(tokens.hidden_states), [tokens.topk_weights]
        parts += [] if tokens.lora_ids is None else [tokens.lora_ids[:, None]]
        parts += [] if scales is None else [scales]
        if travel is None:
            if num_rows > len(ids):
                as_bytes(rows)[len(ids) :] = 0
                self.pad(buffer, len(ids), tokens)
            at = torch.arange(len(ids), device=device)
        else:
            if travel.room is not None:
                self.pad(buffer, 0, tokens)
            rank, which, at = travel.rows_in_room()
            ids, hidden_states, parts = ids[which], hidden_states[which], [part[which] for part in parts]
            there = ranks_of_pairs(ids, travel.homes) == rank[:, None]
            ids = torch.where(there, travel.homes.local_of[ids.clamp(0, len(travel.homes.local_of) - 1).long()], -1)
        as_bytes(rows)[at] = hidden_states
        words[at] = torch.cat([ids, *(part.contiguous().view(torch.int32) for part in parts)], dim=1)
        return buffer

    def pad(self, buffer: torch.Tensor, first: int, like: Tokens) -> None:
        """Make rows from `first` on tokens that are not there, whatever their hidden states are."""
        if first < len(buffer):
            before, num_words = self._sizes(like)
            words = buffer.view(torch.int32)[first:, before : before + num_words]
            words.copy_(_words_of_padding(num_words, like.topk_ids.shape[1], like.lora_ids is not None, buffer.device))

    def tokens(self, buffer: torch.Tensor, like: Tokens, *, ids_are_local: bool) -> Tokens:
        """What arrived, in place; `like` is what was sent, and says how rows are laid out."""
        rows, words = self._views(buffer, like)
        top_k, next_word = like.topk_ids.shape[1], 2 * like.topk_ids.shape[1]
        ids, weights = words[:, :top_k], words[:, top_k:next_word].view(torch.float32)
        lora_ids = None
        if like.lora_ids is not None:
            lora_ids, next_word = words[:, next_word].contiguous(), next_word + 1
        scale = words[:, next_word:].contiguous().view(torch.float32) if self.scale_travels else like.input_scale
        # Kernels take scaled rows dense alone; they are half as long.
        rows = rows if like.input_scale is None else as_bytes(rows).contiguous().view(rows.dtype)
        return Tokens(rows, weights, ids, lora_ids, scale, ids_are_local)

    def _sizes(self, tokens: Tokens) -> tuple[int, int]:
        """Words of a hidden state, and of all else."""
        scales = tokens.input_scale.shape[1] if self.scale_travels and tokens.input_scale is not None else 0
        hidden_size, itemsize = tokens.hidden_states.shape[1], tokens.hidden_states.element_size()
        return -(-hidden_size * itemsize // 4), 2 * tokens.topk_ids.shape[1] + (tokens.lora_ids is not None) + scales

    def _views(self, buffer: torch.Tensor, like: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states `[rows, H]` and the words `[rows, W]` int32 of a buffer."""
        hidden_states = like.hidden_states
        return _views(buffer, hidden_states.dtype, hidden_states.shape[1], *self._sizes(like))

    @property
    def scale_travels(self) -> bool:
        """Whether each token has scales of its own."""
        return self.scale in (ActivationScale.TOKEN, ActivationScale.GROUP)


def _row_bytes(hidden_words: int, words: int) -> int:
    return -(-4 * (hidden_words + words) // _ALIGNMENT) * _ALIGNMENT


def _views(
    buffer: torch.Tensor, dtype: torch.dtype, hidden_size: int, hidden_words: int, num_words: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return buffer.view(dtype)[:, :hidden_size], buffer.view(torch.int32)[:, hidden_words : hidden_words + num_words]


@cache
def _words_of_padding(num_words: int, top_k: int, has_lora: bool, device: torch.device) -> torch.Tensor:
    """The words of a token that is not there: no expert, no adapter, scales of 1."""
    words = torch.full((num_words,), kernels.ONE, dtype=torch.int32)
    words[:top_k], words[top_k : 2 * top_k] = -1, 0
    if has_lora:
        words[2 * top_k] = -1
    return words.to(device)


def _of_plan(travel: Travel) -> tuple[torch.Tensor, ...]:
    """Of `_packed_rows`, the places, counts, room and homes."""
    return travel.places, travel.counts, travel.set_aside, *vars(travel.homes).values()


@replayable(tuple)
def _packed_rows(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora_ids: torch.Tensor | None,
    scales: torch.Tensor | None,
    places: torch.Tensor | None,
    counts: torch.Tensor | None,
    room: torch.Tensor | None,
    rank_of: torch.Tensor | None,
    local_of: torch.Tensor | None,
    most: int,
    num_rows: int,
    hidden_words: int,
    num_words: int,
) -> torch.Tensor:
    buffer = torch.empty((num_rows, _row_bytes(hidden_words, num_words)), dtype=torch.uint8, device=topk_ids.device)
    rows, words = _views(buffer, hidden_states.dtype, hidden_states.shape[1], hidden_words, num_words)
    of_plan = (places, counts, room, rank_of, local_of)
    kernels.pack_rows(rows, words, hidden_states, topk_ids, topk_weights, lora_ids, scales, *of_plan, most=most)
    return buffer
