"""Which rank is what: the sizes of tensor, data and expert parallelism over one group of ranks.

Every rank of the layer holds some experts (expert parallelism) and of each of them some columns of I (tensor
parallelism): `ep_size * tp_size` ranks in all. The tokens are spread over `dp_size` runs of consecutive ranks (data
parallelism); the ranks of one run, its *replicas*, have the same tokens. So what a token needs is always the sum over
all ranks: over the runs, and over the replicas of one run.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import MOST_LISTED, expect_int
from ..config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """The ranks that share a layer, numbered with tp innermost.

    Attributes:
        tp_size: ranks that share each expert's I columns.
        dp_size: runs of ranks with their own tokens.
        ep_size: ranks that share the experts.

    Raises:
        TypeError, ValueError: a size under 1, or a `dp_size` that does not divide the ranks, by name.
    """

    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            expect_int(name, size, low=1)
        if self.world_size > MOST_LISTED:
            raise ValueError(f"tp_size: expected at most {MOST_LISTED} ranks in all, got {self.world_size}")
        if self.world_size % self.dp_size:
            raise ValueError(
                f"dp_size: expected a divisor of ep_size {self.ep_size} x tp_size {self.tp_size} ranks, "
                f"got {self.dp_size}"
            )

    @property
    def world_size(self) -> int:
        """All ranks of the layer."""
        return self.ep_size * self.tp_size

    @property
    def num_replicas(self) -> int:
        """Ranks with the same tokens."""
        return self.world_size // self.dp_size

    def ep_rank(self, rank: int) -> int:
        """Which of the shares of experts a rank holds; errors as of `place`."""
        return self._expect(rank) // self.tp_size

    def dp_rank(self, rank: int) -> int:
        """Which run of ranks a rank stands in, and so whose tokens it has; errors as of `place`."""
        return self._expect(rank) // self.num_replicas

    def place(self, rank: int) -> ParallelConfig:
        """One rank's place.

        Raises:
            TypeError, ValueError: no rank of this mesh.
        """
        self._expect(rank)
        return ParallelConfig(
            tp_size=self.tp_size,
            tp_rank=rank % self.tp_size,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank(rank),
            ep_size=self.ep_size,
            ep_rank=self.ep_rank(rank),
        )

    def replicas(self, rank: int) -> tuple[int, ...]:
        """The ranks with the tokens of `rank`, itself among them."""
        first = self.dp_rank(rank) * self.num_replicas
        return tuple(range(first, first + self.num_replicas))

    def shards(self, rank: int) -> tuple[int, ...]:
        """The ranks that share the columns of `rank`'s experts, itself among them; errors as of `place`."""
        first = self.ep_rank(rank) * self.tp_size
        return tuple(range(first, first + self.tp_size))

    def data_peers(self, rank: int) -> tuple[int, ...]:
        """One rank of each run, at the place that `rank` has in its own: between them they have all tokens once.

        Errors are those of `place`.
        """
        return tuple(range(self._expect(rank) % self.num_replicas, self.world_size, self.num_replicas))

    def _expect(self, rank: int) -> int:
        return expect_int("rank", rank, low=0, high=self.world_size - 1)

    def __str__(self) -> str:
        return f"tp {self.tp_size}, dp {self.dp_size}, ep {self.ep_size}"
