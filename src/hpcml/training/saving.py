"""Saving a checkpoint by all ranks of a training together, and when that is due."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Place, Store

if TYPE_CHECKING:
    from .ddp import Gather

# A checkpoint is saved, within an epoch or after it, when saving has cost less than this share of the time since the last
# one: what takes 0.1 s every 10 s, what takes 6 s every 10 minutes.
COST = 0.01
FIRST_COST_S = 0.02  # before one was measured
_FAILED_COST_S = 0.6


class Saving:
    """What the checkpoints of one rank have cost, and the collective that saves one."""

    def __init__(self, store: Store, gather: "Gather", rank: int, cost_s: float = FIRST_COST_S) -> None:
        """Args: gather: how the ranks tell one another numbers. cost_s: what the first one is taken to cost."""
        self._store, self._gather, self._rank = store, gather, rank
        self._saved_at, self._cost_s = time.perf_counter(), cost_s

    def due(self) -> bool:
        """Whether to save, as far as this rank knows: it has cost less than a share of the time since the last one."""
        return self._cost_s <= COST * (time.perf_counter() - self._saved_at)

    def save(self, place: Place, write: Callable[[Path], str]) -> bool:
        """Save now, all ranks together; returns whether it is kept.

        Args:
            write: writes this rank's part into a folder and returns what went wrong, mostly nothing.
        """
        began = time.perf_counter()
        kept = self._save(place, write)
        self._saved_at = time.perf_counter()
        # Where there is no room, it is tried and told again after 1 minute, 2, 4 …
        self._cost_s = self._saved_at - began if kept else max(_FAILED_COST_S, 2 * self._cost_s)
        return kept

    def _save(self, place: Place, write: Callable[[Path], str]) -> bool:
        made = self._store.begin(place) if self._rank == 0 else self._store.aside(place)
        if not self._all(made is not None) or made is None:
            return False
        reason = write(made)
        kept = self._all(not reason)
        if self._rank == 0:
            if kept:
                kept = self._store.seal(place)
            else:
                self._store.discard(place, reason or "another rank could not write its part")
        return self._all(kept)

    def _all(self, well: bool) -> bool:
        return all(one for (one,) in self._gather([int(well)]))
