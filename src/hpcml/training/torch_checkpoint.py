"""Checkpoints of a torch training: weights, what else has a state, and where each rank's random numbers are.

Rank 0 writes what all ranks have alike, each rank its own random numbers. torch is imported inside the functions.
"""

import contextlib
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from . import fsdp
from .checkpoint import Place, Store, heeding, why
from .ddp import Ranks

if TYPE_CHECKING:
    import torch

# Between two epochs a checkpoint is saved when saving has cost less than this share of the time since the last one; an
# epoch of a minute is always saved, one of a tenth of a second is not.
COST = 0.01
_FIRST_COST_S = 0.02  # before one was measured
_COMMON, _OWN = "model.pt", "rank-{}.pt"


class Keeper:
    """What a training loop keeps, and when."""

    def __init__(
        self,
        store: Store,
        ranks: Ranks,
        rank: int,
        model: "torch.nn.Module",
        others: Sequence[Any],
        place: "torch.device",
        watched: bool = True,
    ) -> None:
        """Args:
        others: what else has ``state_dict`` and ``load_state_dict``: optimizer, scheduler, scaler.
        place: this rank's device.
        watched: whether a worker turns signals into the stop file.
        """
        self._store, self._ranks, self._rank, self._place = store, ranks, rank, place
        self._model, self._others = plain(model), tuple(others)
        self.heeding = heeding if watched else contextlib.nullcontext
        self._saved_at, self._cost_s = time.perf_counter(), _FIRST_COST_S
        self._order: Mapping[str, Any] = {}  # random numbers as the epoch's loader was asked for its first batch

    def resume(self) -> Place:
        """Load the newest whole checkpoint into model and others, on all ranks the same; the beginning where none is."""
        found = None
        if self._rank == 0:
            self._store.claim()
            found = self._store.latest()
        place = found.place if found else Place()
        told = self._ranks.gather([place.step, place.epoch, place.batch])
        place = Place(*told[0])
        self._saved_at = time.perf_counter()
        if not place.step:
            return place
        folder = self._store.of(place)
        common, own = _load(folder / _COMMON), _load(folder / _OWN.format(self._rank))
        self._model.load_state_dict(common["model"])
        for other, state in zip(self._others, common["others"], strict=True):
            other.load_state_dict(state)
        self._order = own["order"]
        _set_random(own["now"], self._place)
        return place

    def batches(self, loader: Any, done: int) -> Any:
        """Return a loader as it was: without its first ``done`` batches, and random numbers after them as they were."""
        if not done:
            self._order = _random(self._place)
            return loader
        return self._later(loader, done)

    def _later(self, loader: Any, done: int) -> Iterator[Any]:
        now = _random(self._place)
        _set_random(self._order, self._place)
        batches = iter(loader)
        for _ in range(done):
            next(batches)
        _set_random(now, self._place)
        yield from batches

    def end_epoch(self, place: Place) -> None:
        """Save between two epochs where that is due; a collective."""
        since = time.perf_counter() - self._saved_at
        ((due, *_), *_) = self._ranks.gather([int(self._cost_s <= COST * since)])
        if due:
            self.save(place)

    def save(self, place: Place) -> bool:
        """Save now, all ranks together; returns whether it is kept."""
        began = time.perf_counter()
        made = self._store.begin(place) if self._rank == 0 else self._store.aside(place)
        if not self._all(made is not None) or made is None:
            return False
        reason = self._write(made)
        kept = self._all(not reason)
        if self._rank == 0:
            if kept:
                kept = self._store.seal(place)
            else:
                self._store.discard(place, reason or "another rank could not write its part")
        kept = self._all(kept)
        self._saved_at = time.perf_counter()
        self._cost_s = self._saved_at - began
        return kept

    def _all(self, well: bool) -> bool:
        return all(one for (one,) in self._ranks.gather([int(well)]))

    def _write(self, folder: Path) -> str:
        """Write this rank's part; returns what went wrong."""
        import torch

        try:
            if self._rank == 0:
                common = {"model": self._model.state_dict(), "others": [other.state_dict() for other in self._others]}
                torch.save(common, folder / _COMMON)
            own = {"now": _random(self._place), "order": dict(self._order)}
            torch.save(own, folder / _OWN.format(self._rank))
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            return why(error)
        return ""


def plain(model: "torch.nn.Module") -> "torch.nn.Module":
    """Return the model inside DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model


def check(model: "torch.nn.Module", others: Sequence[Any]) -> None:
    """Refuse what can't be kept.

    Raises:
        HpcmlError: something without a state, or a model that is shared out.
    """
    for other in others:
        if not (callable(getattr(other, "state_dict", None)) and callable(getattr(other, "load_state_dict", None))):
            raise HpcmlError(
                f"a {type(other).__name__} has no state_dict() to keep",
                origin="run.epochs(keep=…)",
                allowed="optimizers, schedulers, gradient scalers, modules",
            )
    if any(map(fsdp.is_part, model.parameters())):
        fix = "save it by torch.distributed.checkpoint, and leave keep= out"
        raise HpcmlError(
            "a model that fully_shard has shared out can't be kept yet", origin="run.epochs(keep=…)", fix=fix
        )


def looks(model: "torch.nn.Module", others: Sequence[Any]) -> str:
    """Return what stands for the model in a checkpoint: names, types and shapes of its state, and what else is kept."""
    import hashlib

    state = [(name, str(value.dtype), tuple(value.shape)) for name, value in plain(model).state_dict().items()]
    return hashlib.sha256(repr((state, [type(other).__name__ for other in others])).encode()).hexdigest()[:16]


def _load(file: Path) -> Any:
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)  # load_state_dict brings it to the device


def _random(place: "torch.device") -> dict[str, Any]:
    """Where this process's random numbers are, in types that torch loads without running code."""
    import torch

    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if place.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(place)
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        found["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    return found


def _set_random(state: Mapping[str, Any], place: "torch.device") -> None:
    import torch

    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].cpu())
    if place.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), place)
    if "numpy" in state:
        import numpy

        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
