"""Checkpoints of a torch training: weights, what else has a state, and where each rank's random numbers are.

Rank 0 writes what all ranks have alike, each rank its own random numbers, and its parts of a model that ``fully_shard``
has shared out; see ``fsdp``. torch is imported inside the functions.
"""

import contextlib
import functools
import operator
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from . import fsdp
from .checkpoint import Place, Store, heeding, why
from .ddp import Ranks
from .saving import FIRST_COST_S, Saving

if TYPE_CHECKING:
    import torch

# Before one was measured: with each parameter two moments, written and read back at so many bytes a second.
_FIRST_BYTES_A_S = 2e9
_COMMON, _OWN = "model.pt", "rank-{}.pt"


class Keeper:
    """What a training loop keeps, and when.

    Attributes:
        otherwise: after ``resume``, what of the training before does not hold here, for a person; mostly nothing.
    """

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
        self._shared = fsdp.is_shared(self._model)  # its optimizers' moments are then in parts too
        self._own_buffers = not _broadcasts(model)
        self.heeding = heeding if watched else contextlib.nullcontext
        first_s = FIRST_COST_S + 3 * _held(self._model) / _FIRST_BYTES_A_S
        self._saving = Saving(store, ranks.gather, rank, first_s)
        self._order: Mapping[str, Any] = {}  # random numbers as the epoch's loader was asked for its first batch
        self.otherwise = ""

    def resume(self) -> Place:
        """Load the newest whole checkpoint into model and others, on all ranks the same; the beginning where none is."""
        found = None
        if self._rank == 0:
            self._store.claim()
            found = self._store.latest()
        place = found.place if found else Place()
        told = self._ranks.gather([place.step, place.epoch, place.batch])
        place = Place(*told[0])
        if not place.step:
            return place
        self._load(self._store.of(place), len(told))
        return place

    def _load(self, folder: Path, world: int) -> None:
        state = _load(folder / _COMMON)
        if self._shared:
            state = fsdp.load(folder, state, self._like())
        self._model.load_state_dict(state["model"])
        for other, one in zip(self._others, state["others"], strict=True):
            other.load_state_dict(one)
        before = len(list(folder.glob(_OWN.format("*"))))
        if before != world:
            self.otherwise = (
                f", saved by {before} rank{'s' * (before > 1)} and loaded by {world}: the same weights, optimizer and place; "
                "random numbers and the sums of a batch may differ"
            )
        file = folder / _OWN.format(self._rank)
        # A rank that was not there before draws the numbers that its work has seeded.
        own = _load(file) if file.exists() else {"now": (now := _random(self._place)), "order": now, "buffers": {}}
        _set_buffers(self._model, own["buffers"])
        self._order = own["order"]
        _set_random(own["now"], self._place)

    def _state(self) -> dict[str, Any]:
        return {"model": self._model.state_dict(), "others": [other.state_dict() for other in self._others]}

    def _like(self) -> Callable[..., "torch.Tensor"]:
        """What parts are loaded into: the weights themselves, and moments that the optimizers have not made yet."""
        import torch

        now = self._state()

        def like(keys: Sequence[Any], kind: torch.dtype) -> Any:
            if keys[0] == "others" and isinstance(other := self._others[keys[1]], torch.optim.Optimizer):
                return fsdp.like_moments(other, keys[2:], kind)
            return functools.reduce(operator.getitem, keys, now)

        return like

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

    def due(self) -> bool:
        """Whether to save, as far as this rank knows."""
        return self._saving.due()

    def end_epoch(self, place: Place) -> None:
        """Save between two epochs where that is due; a collective."""
        ((due, *_), *_) = self._ranks.gather([int(self.due())])
        if due:
            self.save(place)

    def save(self, place: Place) -> bool:
        """Save now, all ranks together; returns whether it is kept."""
        return self._saving.save(place, self._write)

    def _write(self, folder: Path) -> str:
        """Write this rank's part; returns what went wrong."""
        import torch

        own: dict[str, Any] = {"now": _random(self._place), "order": dict(self._order)}
        own["buffers"] = _buffers(self._model) if self._own_buffers else {}
        try:
            if self._shared:  # first: it is a collective, which fails on all ranks or none
                for other in self._others:
                    if isinstance(other, torch.optim.Optimizer):
                        fsdp.check_moments(other)
                state = fsdp.save(folder, self._state())
            elif self._rank == 0:
                state = self._state()
            if self._rank == 0:
                torch.save(state, folder / _COMMON)
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
        HpcmlError: something without a state.
    """
    for other in others:
        if not (callable(getattr(other, "state_dict", None)) and callable(getattr(other, "load_state_dict", None))):
            raise HpcmlError(
                f"a {type(other).__name__} has no state_dict() to keep",
                origin="run.epochs(keep=…)",
                allowed="optimizers, schedulers, gradient scalers, modules",
            )


def looks(model: "torch.nn.Module", others: Sequence[Any]) -> str:
    """Return what stands for the model in a checkpoint: names, types and shapes of its state, and what else is kept."""
    import hashlib

    state = [(name, str(value.dtype), tuple(value.shape)) for name, value in plain(model).state_dict().items()]
    told = [state, [type(other).__name__ for other in others], *(["fully_shard"] if fsdp.is_shared(model) else [])]
    return hashlib.sha256(repr(tuple(told)).encode()).hexdigest()[:16]


def _broadcasts(model: "torch.nn.Module") -> bool:
    """Whether rank 0's buffers, such as the running means of BatchNorm, are handed to all ranks at every step."""
    from torch.nn.parallel import DistributedDataParallel

    return isinstance(model, DistributedDataParallel) and model.broadcast_buffers


def _buffers(model: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    """Return what of a model's state is no parameter; under ``fully_shard`` and Horovod each rank has its own."""
    state = model.state_dict()
    return {name: one for name, one in model.named_buffers() if name in state and not fsdp.is_part(one)}


def _set_buffers(model: "torch.nn.Module", kept: Mapping[str, "torch.Tensor"]) -> None:
    import torch

    found = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in kept.items():
            found[name].copy_(value)


def _held(model: "torch.nn.Module") -> int:
    """Bytes of a model's parameters that this rank holds."""
    parts = (p.to_local() if fsdp.is_part(p) else p for p in model.parameters())
    return sum(part.numel() * part.element_size() for part in parts)


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
