"""What a Keras callback does at the ends of a training and of each epoch: check the replicas, keep the numbers.

TensorFlow is imported inside the functions.
"""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..tracking.journal import Journal
from .beats import steps_a_call
from .common import Expected, tell_epoch
from .profile import ProfiledSteps
from .tensorflow import advice, check_replicas, expected_replicas, wait_for

if TYPE_CHECKING:
    from . import keras_checkpoint


class Recorder:
    """The hooks; ``model`` and ``params`` are set by Keras.

    No hook for batches: Keras 2 then skips its per-batch calls altogether, and Keras 3 may make them in the background.
    """

    legacy: bool
    model: Any
    params: dict[str, Any]

    def __init__(
        self,
        journal: Journal,
        expected: Expected,
        global_batch: int,
        began: float,
        rank: int,
        profile: ProfiledSteps | None = None,
        kept: "keras_checkpoint.Kept | None" = None,
    ) -> None:
        super().__init__()
        self._kept = kept
        self._journal = journal
        self._expected = expected
        self._global_batch = global_batch
        self._began: float | None = began
        self._rank = rank
        self._epoch_began = 0.0
        self._trained_s: float | None = None
        self._steps_before = 0
        self._warned = False
        self._timing = False
        self._profile = profile
        self._watched: Callable[[Any], Any] | None = None
        self._unwatched: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._check()
        if self._kept is not None:
            self._kept.begin(self.model)

    def _check(self) -> None:
        strategy = self.model.distribute_strategy
        in_sync = strategy.num_replicas_in_sync
        self._journal.write(
            "replicas",
            in_sync=in_sync,
            expected=expected_replicas(self._expected),
            devices=devices_of(strategy),
            virtual=self._expected.virtual,
        )
        check_replicas(self._expected, in_sync)
        if self._began is None:
            return
        if self._rank == 0:
            for text in advice(self._expected, in_sync):
                self._journal.message("warning", text)
                print(f"hpcml: {text}", flush=True)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._kept is not None:
            self._kept.begin_epoch(self.model, epoch)
        self._trained_s = None
        self._steps_before = self._iterations()
        self._epoch_began = time.perf_counter()
        if self._profile is not None:
            self._watch(self._profile, self.params["epochs"] - epoch)
        if self._began is not None and not self._timing and callable(self.model.train_function):
            self._timing = True
            self.model.train_function = self._timed(self.model.train_function)

    def on_test_begin(self, logs: Any = None) -> None:
        if self._trained_s is None:
            self._end_training_part()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._trained_s is None:
            self._end_training_part()
        try:
            self._record(epoch + 1, {} if logs is None else logs)
        except Exception as error:  # what can't be recorded must not end the training
            self._warn(error)

    def on_train_end(self, logs: Any = None) -> None:
        if self._kept is not None:
            self._kept.end()

    def _record(self, epoch: int, logs: dict[str, Any]) -> None:
        import numpy as np

        trained_s = self._trained_s or 0.0
        values = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        values["lr"] = _learning_rate(self.model.optimizer)
        values["epoch_time_s"] = trained_s
        steps = self._iterations() - self._steps_before or self.params.get("steps") or 0
        if self._profile is not None and self._profile.left_out_steps:
            values["profiled_steps"] = self._profile.left_out_steps
            if self._profile.left_out_steps < steps:
                steps -= self._profile.left_out_steps
                trained_s -= self._profile.left_out_s
        if steps and trained_s > 0:
            speed = steps * self._global_batch / trained_s
            values["samples_per_s"], logs["samples_per_s"] = speed, _readable(speed)
            values["step_time_ms"] = 1000 * trained_s / steps
        self._journal.metric(epoch, values)
        if self._rank == 0:
            tell_epoch(self._journal, epoch, self.params["epochs"], values)

    def _warn(self, error: Exception) -> None:
        text = f"an epoch's numbers are not recorded: {type(error).__name__}: {error}"
        if self._journal.message("warning", text) and not self._warned:
            print(f"hpcml: warning: {text}", file=sys.stderr, flush=True)
        self._warned = True

    def _timed(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap the training step for its first call only; a batch hook would cost something at every batch."""

        def first(iterator: Any) -> Any:
            self.model.train_function = function
            logs = function(iterator)
            wait_for(logs)
            if self._began is not None:
                self._journal.metric(0, {"time_to_first_step_s": time.perf_counter() - self._began})
                self._began = None
            return logs

        return first

    def _watch(self, profile: ProfiledSteps, epochs: int) -> None:
        """Wrap the training step for the epoch of the profile; in all others it stays as it is, and costs nothing."""
        self._unwatch()  # of an epoch that was interrupted
        train = self.model.train_function
        if not profile.begin_epoch(self.params.get("steps") or None, epochs, steps_a_call(self.model)):
            return

        def watched(iterator: Any) -> Any:
            result = profile.watched(lambda: train(iterator))
            if profile.over:
                self._unwatch()
            return result

        self._unwatched, self._watched = train, watched
        self.model.train_function = watched

    def _unwatch(self) -> None:
        if self._watched is not None and self.model.train_function is self._watched:
            self.model.train_function = self._unwatched
        self._watched = None

    def _end_training_part(self) -> None:
        if not self.legacy:  # Keras 3 gets here before the GPU is done; Keras 2 has read its metrics by then
            wait_for([metric.result() for metric in self.model.metrics[:1]])
        if self._profile is not None:
            self._profile.end_epoch()
            self._unwatch()
        self._trained_s = time.perf_counter() - self._epoch_began

    def _iterations(self) -> int:
        counter = getattr(getattr(self.model, "optimizer", None), "iterations", None)
        return 0 if counter is None else int(counter.numpy())


def devices_of(strategy: Any) -> list[str]:
    """Return the names of the devices that a strategy trains on."""
    import tensorflow as tf

    try:
        return list(strategy.extended.worker_devices)
    except RuntimeError:  # the default strategy has none of its own; TensorFlow then places the model on the first
        found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return [device.name for device in found[:1]]


def _learning_rate(optimizer: Any) -> float:
    rate = optimizer.learning_rate
    rate = rate(optimizer.iterations) if callable(rate) else rate  # a schedule, in tf.keras.optimizers.legacy
    return float(rate.numpy() if hasattr(rate, "numpy") else rate)


def _readable(speed: float) -> float:
    """A speed for Keras to print, with four decimals whatever it is: none of its digits but these mean anything."""
    return float(f"{speed:.4g}") if speed < 1000 else float(round(speed))
