"""Which samples each rank reads in which epoch: one shuffled order, cut into global batches, each shared by the ranks.

Batch k of an epoch is the same set of samples for every number of ranks, so that runs of one or many GPUs compare, and a
run goes on at another world size where it stopped. Rank r of W takes the r-th of W contiguous parts of each batch, as
tf.distribute cuts a batch for its replicas. NumPy is imported inside the functions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_SEED = 2**32 - 1  # of NumPy's RandomState


@dataclass(frozen=True)
class Order:
    """The order of a data set's samples in each epoch, and one rank's part of it.

    Attributes:
        count: samples.
        global_batch: samples a step, over all ranks together.
        seed: of the shuffling, 0…2³² - 1; None leaves the samples in their order.
        rank, world: this rank among all.
        drop_remainder: leave out what makes no whole batch, others in each epoch; else it is a smaller batch.
    """

    count: int
    global_batch: int
    seed: int | None = None
    rank: int = 0
    world: int = 1
    drop_remainder: bool = False

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise HpcmlError(f"global_batch = {self.global_batch}", allowed="a whole number from 1")
        if not 0 <= self.rank < self.world:
            what = f"rank = {self.rank} of world = {self.world}"
            raise HpcmlError(what, allowed="0…world - 1", fix="rank=run.topology.rank, world=run.topology.world")
        if self.seed is not None and not 0 <= self.seed <= LARGEST_SEED:
            raise HpcmlError(f"seed = {self.seed}", allowed=f"0…{LARGEST_SEED}, or None for no shuffling")
        if self.drop_remainder and self.count < self.global_batch:
            raise HpcmlError(
                f"{self.count} samples make no whole batch",
                origin=f"global_batch = {self.global_batch}",
                fix="a smaller global_batch, or drop_remainder=False",
            )

    @property
    def share(self) -> int:
        """This rank's samples of a whole batch."""
        begin, end = self._part_of(self.global_batch)
        return end - begin

    @property
    def rest(self) -> int:
        """This rank's samples of the last, smaller batch; 0 where there is none for it."""
        begin, end = self._part_of(0 if self.drop_remainder else self.count % self.global_batch)
        return end - begin

    @property
    def steps(self) -> int:
        """Batches an epoch, the same on every rank."""
        whole, rest = divmod(self.count, self.global_batch)
        return whole + (rest > 0 and not self.drop_remainder)

    def all(self, epoch: int) -> "NDArray[Any]":
        """Return all rows in the order of an epoch: int64 (count,).

        ``RandomState``, unlike ``default_rng``, promises the same numbers in every NumPy (NEP 19).
        """
        import numpy as np

        if self.seed is None:
            return np.arange(self.count)
        rows: NDArray[Any] = np.random.RandomState([self.seed, epoch]).permutation(self.count)
        return rows

    def part(self, epoch: int, first_step: int = 0) -> "NDArray[Any]":
        """Return this rank's rows in an epoch, batch after batch, from a step on (counted from 0)."""
        import numpy as np

        rows, size = self.all(epoch), self.global_batch
        whole = len(rows) // size * size
        table = rows[:whole].reshape(-1, size)[first_step:]
        parts = [table[:, slice(*self._part_of(size))].ravel()]
        if not self.drop_remainder and first_step <= whole // size:
            rest = rows[whole:]
            parts.append(rest[slice(*self._part_of(len(rest)))])
        joined: NDArray[Any] = np.concatenate(parts)
        return joined

    def batches(self, epoch: int, first_step: int = 0) -> "Iterator[NDArray[Any]]":
        """Yield this rank's rows of each batch of an epoch, from a step on; a small last batch may leave some ranks none."""
        rows, whole = self.part(epoch, first_step), self.count // self.global_batch
        for step in range(first_step, self.steps):
            begin = (step - first_step) * self.share
            yield rows[begin : begin + self.share] if step < whole else rows[begin:]

    def _part_of(self, size: int) -> tuple[int, int]:
        return size * self.rank // self.world, size * (self.rank + 1) // self.world
