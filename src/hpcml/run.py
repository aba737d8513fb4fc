"""The ``Run`` that ``hpcml.begin()`` returns: what a notebook or script records, asks for and ends."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from . import bare, steps
from .errors import HpcmlError, nearest
from .job import WORK_SETTINGS, Scalar
from .node import exits
from .node.devices import Devices
from .node.topology import Topology
from .plan import NEVER_CHECKED
from .rundir import RunDir
from .tracking import course
from .tracking.journal import Journal

if TYPE_CHECKING:
    import torch

    from .training.common import Expected

Batch = TypeVar("Batch")


@dataclass
class Run:
    """A run in progress, as seen by one rank.

    Attributes:
        dir: its run directory.
        strategy: the strategy it was begun with, None for none.
        topology: this rank among all.
        devices: the devices of this rank.
        params: the job's parameters laid over the work's defaults.
        precision: Keras's mixed precision policy.
        restart: which execution of the run this is, from 0.
        tuning: the job's settings for speed; the work asks for them by ``tuned``.
        profile: the first and last step to profile.
        session: where no worker started it: what it does for itself, above all its own end marker.
    """

    dir: RunDir
    strategy: str | None
    topology: Topology
    devices: Devices
    params: Mapping[str, Scalar | None]
    precision: str
    journal: Journal
    restart: int = 0
    profile: tuple[int, int] | None = None
    tuning: Mapping[str, Scalar] = field(default_factory=dict)
    session: bare.Session | None = None
    began: float = field(default_factory=time.perf_counter)
    finished: bool = False
    _logged: dict[str, Any] = field(default_factory=dict)
    _training: Any = None
    _stop: Any = None
    _kept: Any = None
    _capture: contextlib.AbstractContextManager[None] | None = None

    def log(self, /, *at: int, **metrics: float) -> bool:
        """Record metrics in the run's journal, as ``log(step, loss=…)`` or ``log(step=…, loss=…)``. Never raises.

        Returns:
            False where one of them could not be kept: it is no number, or the disk is full.
        """
        step = at[0] if at else metrics.pop("step", None)  # beside a positional step, `step` is a metric as any other
        if len(at) > 1:
            metrics["(no name)"] = at[1:]  # type: ignore[assignment]  # no number: it is told of, and left out
        self._logged = metrics
        return self.journal.metric(step, metrics)  # type: ignore[arg-type]  # None is told of too

    def step(self, name: str) -> RunDir:
        """Return the run directory of a step that comes before this one in its chain: ``.path``, ``.model``, ``.artifacts``.

        Raises:
            HpcmlError: no such step before this one, or this run is no step of a chain.
        """
        return steps.find(name)

    def tuned(self, **defaults: Any) -> dict[str, Any]:
        """Return settings for the speed of input and training step: the job's ``[tuning]``, else the defaults given here.

        The work hands them to its framework itself: ``prefetch`` to the data set, ``steps_per_execution`` and
        ``jit_compile`` to ``model.compile``, ``data_threads`` to ``tf.data``'s private threads or a DataLoader's workers.
        ``hpcml tune`` searches over those that are asked for; the journal keeps which values held.

        Raises:
            HpcmlError: a name is none of these.
        """
        for name in defaults:
            if name not in WORK_SETTINGS:
                fix = nearest(name, WORK_SETTINGS) or "threads are set before the work starts: [tuning] in the job file"
                raise HpcmlError(
                    f"no setting {name!r}", origin="run.tuned()", allowed=", ".join(WORK_SETTINGS), fix=fix
                )
        chosen = {name: self.tuning.get(name, default) for name, default in defaults.items()}
        told = {f"tuned.{name}": "default" if value is None else value for name, value in chosen.items()}
        self.journal.write("params", values=told)
        return chosen

    @property
    def device(self) -> "torch.device":
        """This rank's device for torch: its own GPU, ``cuda:0``, or ``cpu`` in a rehearsal.

        Raises:
            HpcmlError: torch doesn't see the GPU that was given.
        """
        from .training import torch as training

        return training.device(self.expected())

    def epochs(
        self, count: int, model: Any, global_batch: int | None = None, keep: Sequence[Any] | None = None
    ) -> Iterator[int]:
        """Yield the numbers of a torch training's epochs, from 1, and keep what each took; fewer where it is stopped.

        With ``keep`` the training survives: it saves checkpoints into the run's directory, between epochs, within long
        ones, and when a signal asks it to stop, and a run that is requeued or resumed goes on after the step at which it
        was saved, with the same data order and random numbers.

        Args:
            model: wrapped in DistributedDataParallel, or shared out by ``fully_shard``; its weights are compared across the ranks.
            global_batch: samples a step over all ranks; by default the parameter of that name.
            keep: what else has a state: the optimizer, a scheduler, a gradient scaler.

        Raises:
            HpcmlError: the ranks don't train together, the global batch can't be shared by them, or something of
                ``keep`` has no state.
            Stopped: asked to stop, and saved; a ``SystemExit``, so that the work ends here.
        """
        from .training import torch as training

        self._training = training.Training(
            self.journal, self.expected(), self.device, model=model, epochs=count,
            global_batch=self._global_batch(global_batch, "epochs"), began=self.began, rank=self.topology.rank,
            stop=self._stopping(), logged=lambda: self._logged, profile=self.profile, folder=self.dir.profile,
            ranks=self._ranks(), keeper=None if keep is None else self._keeper(model, keep),
        )  # fmt: skip
        return self._training.epochs()  # type: ignore[no-any-return]

    def steps(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield a DataLoader's batches inside ``epochs``: counts them, compares the ranks, ends where all agree to stop."""
        if self._training is None:
            raise HpcmlError("run.steps() outside of run.epochs()", fix="for epoch in run.epochs(epochs, model): …")
        return self._training.steps(loader)  # type: ignore[no-any-return]

    def should_stop(self) -> bool:
        """Whether all ranks agree to stop, for a torch loop without ``steps``: call it once a step on every rank."""
        return bool(self._stopping().asked())

    def check_in_sync(self, weights: Sequence[Any], step: int) -> None:
        """Compare the ranks' weights in a ``tf.GradientTape`` loop under Horovod; a collective, after the first step say.

        Raises:
            HpcmlError: they differ, so each rank trains alone.
        """
        from .training import horovod_tape

        horovod_tape.check(self.journal, self.expected(), self.topology.rank, weights, step)

    @property
    def samples_per_s(self) -> list[float]:
        """Speed of the whole job in each epoch of ``epochs`` so far."""
        return list(self._training.samples_per_s) if self._training else []

    @property
    def history(self) -> dict[str, list[float]]:
        """What this rank has recorded: each metric's values in the order of their steps, those of earlier restarts too.

        Of a step that a restart has repeated the last value counts. What belongs to no epoch (step 0) is left out.
        """
        return course.of(self.dir.events, self.topology.rank)

    def _stopping(self) -> Any:
        if self._stop is None:
            from .training import ddp

            self._stop = ddp.Stop(self.dir.stop, self.restart, gather=self._ranks().gather)
        return self._stop

    def _keeper(self, model: Any, others: Sequence[Any]) -> Any:
        from .training import checkpoint, torch_checkpoint

        torch_checkpoint.check(model, others)
        store = checkpoint.Store(self.dir, self.restart, torch_checkpoint.looks(model, others), self._warn)
        return torch_checkpoint.Keeper(
            store, self._ranks(), self.topology.rank, model, others, self.device, watched=self.session is None
        )

    def _keras_keeper(self) -> Any:
        """Made once: what it finds then is what the training goes on from."""
        if self._kept is None:
            from .training import keras_checkpoint

            place = self.dir, self.journal, self.restart, self.topology.rank
            self._kept = keras_checkpoint.Keeper(*place, watched=self.session is None)
        return self._kept

    def _warn(self, text: str) -> None:
        self.journal.message("warning", text)
        print(f"hpcml: {text}", file=sys.stderr, flush=True)

    def _ranks(self) -> Any:
        """How this strategy's torch processes tell one another numbers."""
        from .training import ddp, horovod

        return horovod.RANKS if self.strategy == "horovod" else ddp.DDP

    def _global_batch(self, given: int | None, where: str) -> int:
        size = given if given is not None else self.params.get("global_batch")
        if not isinstance(size, int) or size < 1:
            raise HpcmlError(f"global_batch = {size!r} is no number of samples", fix=f"run.{where}(…, global_batch=…)")
        return size

    def capture_mlflow(self) -> contextlib.AbstractContextManager[None]:
        """Turn ``mlflow.log_metric`` and its like to the run's journal: from now to the run's end, or for a ``with``.

        Scripts that log with MLflow's fluent API stay as they are, and training waits for no server: the journal is
        delivered to MLflow like everything else of the run. Files of ``log_artifact`` are copied to the run's
        directory. What can't be captured (models, figures, autologging) is left out, said once. ``MlflowClient`` is
        captured where it names this run. Without a step each metric's steps count up from 0.

        Raises:
            HpcmlError: MLflow is not installed, or the run has ended.
        """
        if self.finished:
            raise HpcmlError(f"run {self.dir.id} has ended", fix="run = hpcml.begin(), then run.capture_mlflow()")
        if self._capture is not None:
            return contextlib.nullcontext()  # the first one decides when it ends
        from .tracking import capture

        files = self.dir.artifacts / (f"rank_{self.topology.rank}" if self.topology.rank else "")
        captured = capture.Capture(self.journal, self.dir.id, files, on_end=lambda: setattr(self, "_capture", None))
        self._capture = captured
        return captured

    def log_model(self, model: Any, example: Any = None, flavor: str | None = None) -> bool:
        """Save a trained model with its signature into the run; all ranks call it, rank 0 writes. Never raises.

        Args:
            model: of Keras, torch, or anything with ``predict`` that MLflow has a flavour for.
            example: a few rows of input, for the signature.
            flavor: of MLflow, where it can't be told from the model.
        """
        from .tracking import models

        return models.log(self.dir, self.journal, self.topology.rank, model, example, flavor)

    def callbacks(self, global_batch: int | None = None, keep: bool = False) -> list[Any]:
        """Return the Keras callbacks of this run, for ``model.fit(callbacks=…)``.

        They check the replicas in sync when training begins, and record each epoch. With ``keep`` the training survives:
        between two epochs checkpoints of weights, optimizer and random numbers are saved into the run's directory; asked
        to stop it ends with its epoch, and a run that is requeued or resumed goes on with the next. ``model.fit`` then needs
        ``initial_epoch=run.epochs_done``, and data whose order follows from the number of the epoch. What other callbacks
        remember is theirs to keep.

        Args:
            global_batch: samples a step over all replicas; by default the parameter of that name.

        Raises:
            HpcmlError: the global batch is known from neither, or the run was begun without a strategy.
            Stopped: in ``fit``, asked to stop, and saved; a ``SystemExit``, so that the work ends here.
        """
        from .training import tensorflow

        return tensorflow.callbacks(
            self.journal, self.expected(), global_batch=self._global_batch(global_batch, "callbacks"), began=self.began,
            rank=self.topology.rank, profile=self.profile, folder=self.dir.profile,
            keeper=self._keras_keeper() if keep else None,
        )  # fmt: skip

    @property
    def epochs_done(self) -> int:
        """Epochs of a Keras training that its newest checkpoint has done, the same on every rank; 0 without one."""
        return int(self._keras_keeper().epochs_done)

    def finish(self, state: str = "COMPLETED", reason: str = "") -> None:
        """End the run. A bare run writes its end marker and delivers to MLflow; under hpcml the worker does both."""
        self.end(state, reason, 0 if state == "COMPLETED" else 1)

    def end(self, state: str, reason: str, exit_code: int) -> None:
        """End the run as its process does: ``finish`` with the exit code that goes into a bare run's marker."""
        if self.finished:
            return
        self.finished = True
        if self._capture is not None:
            self._capture.__exit__(None, None, None)
        self.journal.write("finish", state=state, reason=reason)
        self.journal.close()
        if self.session is None:
            return
        exits.unwatch()
        if state == "COMPLETED" and self.strategy and not course.was_checked(self.dir.events, self.topology.rank):
            exit_code, reason = 1, NEVER_CHECKED.format(strategy=self.strategy)
            print(f"hpcml: {reason}", file=sys.stderr, flush=True)
        bare.end(self.session, exit_code, reason, self.journal.untold)

    def expected(self) -> "Expected":
        """Return what this rank was given, as the helpers of the frameworks compare it with what is used.

        Raises:
            HpcmlError: the run was begun without a strategy.
        """
        from .training import common

        return common.expected(self.strategy, self.topology.world, len(self.devices.gpus), self.devices.virtual)
