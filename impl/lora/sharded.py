"""Fully sharded LoRA: adapters cut in both of their matrices, over the ranks that share their experts' columns.

Of w13 a rank has a slice of A's rows (of the adapter's rank r), and B's rows for its own columns of I: between them an
all-gather makes the slices one product. Of w2 it has A's columns of its own I, and B's rows for a slice of H: between
them an all-reduce makes the parts one product, and each rank adds to its slice of H alone, so that the layer's own sum
over the ranks has every slice once. What travels is `[rows, r]` (S-LoRA, arXiv 2311.03285, section 6).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..parallel.agreement import meet
from ..parallel.collectives import Group


@dataclass(frozen=True, eq=False)
class Between(ABC):
    """What the ranks do to the product with A before B takes it; all of them call it, with the same rows.

    Attributes:
        shards: the ranks that share the experts' columns.
    """

    shards: Group

    @abstractmethod
    def whole(self, product: torch.Tensor, parts: int) -> torch.Tensor:
        """The product that all ranks' slices of A make.

        Args:
            product: `[rows, parts * columns]`, dense; rows without an adapter may hold anything.
            parts: blocks of columns with an A each.

        Returns:
            `[rows, parts * R]`.
        """


class Gathered(Between):
    """A's rows are cut: every rank has some columns of the product."""

    def whole(self, product: torch.Tensor, parts: int) -> torch.Tensor:
        """One all-gather; of a part the slices stand in the order of the ranks."""
        (rows, columns), size = product.shape, self.shards.size
        arrived = product.new_empty((size * rows, columns))
        meet()
        self.shards.all_gather(arrived, product).wait()
        slices = arrived.view(size, rows, parts, columns // parts)
        return slices.permute(1, 2, 0, 3).reshape(rows, size * columns)


class Summed(Between):
    """A's columns are cut: every rank has a part of each element's sum, in float32."""

    def whole(self, product: torch.Tensor, parts: int) -> torch.Tensor:
        """One all-reduce, in place."""
        del parts
        meet()
        self.shards.all_reduce(product).wait()
        return product
