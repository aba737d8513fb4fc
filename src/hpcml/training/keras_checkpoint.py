"""Checkpoints of a Keras training, between its epochs: loaded when ``fit`` begins, saved, and left when asked to stop.

Rank 0 decides and writes what all replicas have alike, each rank what is its own; see ``keras_state``. TensorFlow is
imported inside the functions.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import rundir
from ..errors import HpcmlError, Stopped
from ..rundir import RunDir
from ..tracking.journal import Journal
from . import keras_state
from .checkpoint import Checkpoint, Place, Store, heeding, why
from .ddp import Gather
from .keras_state import State
from .saving import Saving

# What stands for the model in the store: which one it is, rank 0 compares by itself, to say where they differ.
_MODEL = "keras"
_LOOKS = "looks.json"


class Keeper:
    """The checkpoints of one run, as one rank of one execution sees them.

    Attributes:
        found: the newest one that is whole, as it was when this was made.
    """

    def __init__(self, run: RunDir, journal: Journal, restart: int, rank: int, watched: bool = True) -> None:
        """Args: watched: whether a worker turns signals into the stop file."""
        self._run, self._journal, self._restart, self._rank = run, journal, restart, rank
        self._store = Store(run, restart, _MODEL, self.warn if rank == 0 else lambda text: None)
        self._heeding = heeding if watched else contextlib.nullcontext
        self._heeded = contextlib.ExitStack()
        self.found = self._store.latest()
        self._state: State | None = None
        self._looks: list[str] = []
        self._gather: Gather = lambda values: [list(values)]
        self._saving = Saving(self._store, self._gather, rank)

    @property
    def epochs_done(self) -> int:
        """Epochs of the newest checkpoint; 0 where there is none."""
        return self.found.place.epoch if self.found else 0

    def begin(self, model: Any, gather: Gather) -> bool:
        """Load the checkpoint into a model, its optimizer and its layers; a collective.

        Returns:
            Whether this training is kept: the first of a run is.

        Raises:
            HpcmlError: the ranks found other checkpoints, the one found is of another model, or none could be saved.
            LeaseLost: a later execution of the run trains.
        """
        if self._state is not None:
            if self._rank == 0:
                self.warn("only the first model.fit() of a run is kept, this is another one")
            return False
        self._gather, self._saving = gather, Saving(self._store, gather, self._rank)
        newest = self.found
        if self._rank == 0:
            self._store.claim()
            newest = self._store.latest()
        self._check_found(newest)
        self._state = keras_state.of(model)
        self._looks = [type(model.optimizer).__name__, *self._state.looks()]
        if self.found is not None:
            self._load(self.found, self._state)
        elif self._rank == 0 and (layers := keras_state.unkept(model)):
            self.warn(f"the random numbers of {', '.join(layers)} can't be kept: after a restart they are other ones")
        self._heeded.enter_context(self._heeding())
        return True

    def _check_found(self, newest: Checkpoint | None) -> None:
        """Raise, on all ranks, where they found other checkpoints, or rank 0 finds another one now that it may save."""
        told = self._gather([*_told(self.found), *_told(newest)])
        if any(one != told[0][:3] * 2 for one in told):
            epochs = ", ".join(str(epoch) for epoch, *_ in told)
            raise HpcmlError(
                f"the checkpoints have changed while this execution began: its ranks found {epochs} epochs",
                origin=str(self._run.checkpoints),
                fix="hpcml resume, when no other execution of this run goes on",
            )

    def _load(self, found: Checkpoint, state: State) -> None:
        kept = json.loads((found.path / _LOOKS).read_text(encoding="utf-8"))
        if differ := keras_state.difference(kept, self._looks):
            raise HpcmlError(
                f"the checkpoint at {found.place} is of another model: {differ}",
                origin=str(found.path),
                fix="hpcml submit starts the changed model anew, in a run of its own",
            )
        otherwise = state.load(found.path, self._rank)
        if self._rank == 0:
            self._say("info", f"goes on from {found.place}" + (f"; {otherwise}" if otherwise else ""))

    def between(self, place: Place) -> None:
        """Save between two epochs where that is due, and leave where the run is asked to stop; a collective.

        Raises:
            Stopped: asked to stop, and saved.
        """
        stop = rundir.read_json(self._run.stop)
        told = self._gather([int(stop.get("restart") == self._restart), int(self._saving.due())])
        if any(asked for asked, _ in told):
            self._stop(place, str(stop.get("signal", "another rank's stop file")))
        if told[0][1]:
            self.save(place)

    def _stop(self, place: Place, signal: str) -> NoReturn:
        kept = f"a checkpoint is kept at {place}" if self.save(place) else "the checkpoint before is kept"
        text = f"stopped by {signal} after step {place.step}; {kept}"
        self._say("info", text)
        self.end()
        raise Stopped(text)

    def save(self, place: Place) -> bool:
        """Save now, all ranks together; returns whether it is kept."""
        return self._saving.save(place, self._write)

    def _write(self, folder: Path) -> str:
        """Write this rank's part; returns what went wrong."""
        assert self._state is not None
        try:
            if self._rank == 0:
                (folder / _LOOKS).write_text(json.dumps(self._looks), encoding="utf-8")
            self._state.write(folder, self._rank)
        except OSError as error:
            return why(error)
        return ""

    def end(self) -> None:
        """From now on a TERM ends the process again."""
        self._heeded.close()

    def warn(self, text: str) -> None:
        self._say("warning", text)

    def _say(self, level: str, text: str) -> None:
        self._journal.message(level, text)
        print(f"hpcml: {text}", file=sys.stderr if level == "warning" else sys.stdout, flush=True)


class Kept:
    """What a ``Recorder`` calls for a training that is kept.

    It saves when the next epoch begins: then all callbacks have had the last one's end, and what they changed is kept.
    """

    def __init__(self, keeper: Keeper, gather: Callable[[Any], Gather]) -> None:
        """Args: gather: returns the collective of the strategy that a model was built in."""
        self._keeper, self._gather = keeper, gather
        self._first: int | None = None
        self._keeps = False

    def begin(self, model: Any) -> None:
        self._keeps = self._keeper.begin(model, self._gather(model.distribute_strategy))
        self._first = self._keeper.epochs_done

    def begin_epoch(self, model: Any, epoch: int) -> None:
        """Args: epoch: from 0."""
        if not self._keeps:
            return
        if self._first is None:
            self._keeper.between(Place(int(model.optimizer.iterations.numpy()), epoch))
        elif epoch != self._first:
            self._keeper.end()
            raise HpcmlError(
                f"model.fit() begins with epoch {epoch + 1}, but {self._first or 'none'} are done",
                origin="run.callbacks(keep=True)",
                fix="model.fit(…, initial_epoch=run.epochs_done), and data whose order follows from the epoch",
            )
        self._first = None

    def end(self) -> None:
        self._keeper.end()


def gather_of(strategy: Any) -> Gather:
    """Return the collective of a strategy of TensorFlow: each worker's numbers (int64), by rank."""
    resolver = strategy.cluster_resolver
    # MultiWorkerMirroredStrategy in a single process, without TF_CONFIG, has a cluster without workers.
    world = len(resolver.cluster_spec().as_dict().get("worker", ())) if resolver is not None else 1
    if world <= 1:
        return lambda values: [list(values)]
    rank, here = resolver.task_id, strategy.num_replicas_in_sync // world

    import numpy as np
    import tensorflow as tf

    # strategy.reduce, called from outside a graph, makes a new one each time: 4 ms of a core instead of 1.5.
    @tf.function  # type: ignore[untyped-decorator]
    def total(rows: Any) -> Any:
        def mine(own: Any) -> Any:
            # What comes from outside lies on no device yet, and all_reduce asks where it is.
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(own))

        return strategy.run(mine, args=(rows,))

    def gather(values: Sequence[int]) -> list[list[int]]:
        def mine(context: Any) -> Any:
            rows: Any = np.zeros((world, len(values)), np.int64)
            if context.replica_id_in_sync_group % here == 0:
                rows[rank] = values
            return tf.constant(rows)

        told = total(strategy.experimental_distribute_values_from_function(mine))
        return strategy.experimental_local_results(told)[0].numpy().tolist()  # type: ignore[no-any-return]

    return gather


def _told(found: Checkpoint | None) -> list[int]:
    """Return what ranks tell one another of a checkpoint: its epoch, its step, and 48 bits of its manifest's digest."""
    if found is None:
        return [0, 0, 0]
    digest = hashlib.sha256((found.path / "checkpoint.json").read_bytes()).digest()
    return [found.place.epoch, found.place.step, int.from_bytes(digest[:6], "big")]
