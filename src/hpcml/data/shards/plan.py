"""Which file comes into which shard, and in which order: it follows from names and sizes alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import HpcmlError, Problem
from . import layout, tar
from .layout import MIB
from .walk import Listing

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of the order that samples are mixed in: a reader from front to back then sees all classes.
SEED = 20
# By default 16 shards, so that as many processes can write and read; none below 4 MiB nor above 256 MiB, but no more than
# 512: a process may have 1,024 files open.
SHARDS, LEAST_BYTES, MOST_BYTES, MOST_SHARDS = 16, 4 * MIB, 256 * MIB, 512


class Damaged(HpcmlError):
    """Files that can't be packed; ``problems`` has them all, which their text need not."""

    SHOWN = 100

    def __init__(self, problems: Sequence[Problem], kept: str = "") -> None:
        fix = "mend or remove them; or leave them out with --skip-damaged"
        if kept:
            fix += f": the rest waits in {kept}"
        shown = list(problems[: self.SHOWN])
        if len(problems) > self.SHOWN:
            shown.append(Problem(f"and {len(problems) - self.SHOWN} more; --json lists them all"))
        count = f"{len(problems)} file{'s' * (len(problems) > 1)} can't be packed, and nothing is at DEST"
        super().__init__([*shown, Problem(count, fix=fix)])
        self.damaged = tuple(problems)


@dataclass(frozen=True)
class Plan:
    """Which file goes where: n files in the order of the shards.

    Attributes:
        order: int64 (n,) the files' places in the listing.
        starts: int64 (shards + 1,) row of each shard's first file, and n.
        bytes: int64 (shards,) of the shards' files, if nothing is left out.
        target: bytes that a shard was to have.
    """

    listing: Listing
    order: "NDArray[Any]"
    names: list[bytes]
    sizes: "NDArray[Any]"
    modes: "NDArray[Any]"
    starts: "NDArray[Any]"
    bytes: "NDArray[Any]"
    target: int

    @property
    def digest(self) -> str:
        """What an interrupted run must have been about to be gone on with."""
        return f"{layout.FORMAT} {SEED} {self.target} {self.listing.digest}"

    def rows(self, number: int) -> slice:
        """The rows of one shard."""
        return slice(int(self.starts[number]), int(self.starts[number + 1]))


def planned(listing: Listing, shard_bytes: int | None) -> Plan:
    np = layout.numpy()
    if not listing.names:
        if listing.problems:
            raise Damaged(listing.problems)
        raise HpcmlError(f"{listing.root} holds no file", origin="SRC", allowed="a folder with files, at any depth")
    order = _mixed(len(listing.names))
    names = [listing.names[row] for row in order.tolist()]
    sizes = listing.sizes[order]
    modes = np.where(listing.modes[order] & 0o100, tar.EXECUTABLE, tar.PLAIN)
    taken = tar.header_lengths(names, sizes) + tar.padded(sizes)
    ends = np.cumsum(taken)
    total = int(ends[-1])
    target = shard_bytes or max(min(max(-(-total // SHARDS), LEAST_BYTES), MOST_BYTES), -(-total // MOST_SHARDS))
    each = -(-total // -(-total // target))  # equal shards, not a small one at the end
    # A file that is larger than a shard leaves numbers without a file.
    _, starts = np.unique((ends - taken) // each, return_index=True)
    starts = np.append(starts, len(names))
    sums = np.add.reduceat(taken, starts[:-1]) + len(tar.END)
    return Plan(listing, order, names, sizes, modes, starts, sums, target)


def _mixed(count: int) -> "NDArray[Any]":
    """An order of so many things, int64 (count,): by a hash of their numbers, which no version of NumPy changes.

    The hash is that of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    """
    np = layout.numpy()
    key = (np.arange(count, dtype=np.uint64) + np.uint64(SEED)) * np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ key >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ key >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    order: NDArray[Any] = np.argsort(key ^ key >> np.uint64(31), kind="stable")
    return order
