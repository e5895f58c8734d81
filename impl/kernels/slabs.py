"""Which rows of an expert's slab are tokens. Every batched kernel asks here, so all agree on which rows exist.

Slabs are `[E_local, max_tokens, …]`; an expert's tokens are the first rows of its slab.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_of_slab(expert_num_tokens_ptr, expert, max_tokens):
    """How many rows of the expert's slab are tokens: a stray count costs its own slab and never an address."""
    return tl.minimum(tl.load(expert_num_tokens_ptr + expert), max_tokens)
