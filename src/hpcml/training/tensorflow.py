"""TensorFlow, thinly: devices and precision before it starts, a check of the replicas, and numbers into the journal.

The strategy itself stays in the notebook as plain TensorFlow; this module only compares what it does with what the job
was given. TensorFlow is imported inside the functions.
"""

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import HpcmlError
from ..tracking.journal import Journal

_CALLS = {
    "original": "no strategy",
    "mirrored": "tf.distribute.MirroredStrategy()",
    "multiworker": "tf.distribute.MultiWorkerMirroredStrategy()",
}
_CHATTER = re.compile(
    rb"WARNING: All log messages before absl|I0000 |To enable the following instructions|E0000 .*failed call to cuInit"
)
_HEADLINES = ("val_accuracy", "accuracy", "val_loss", "loss")


@dataclass(frozen=True)
class Expected:
    """What this process was given, and so what TensorFlow must use.

    Attributes:
        strategy: ``original``, ``mirrored`` or ``multiworker``.
        world: tasks of the job.
        gpus_per_task: GPUs given to this task.
        virtual: whether this is a rehearsal on virtual CPU devices.
        virtual_devices: logical CPU devices of this task in a rehearsal.
    """

    strategy: str
    world: int = 1
    gpus_per_task: int = 0
    virtual: bool = False
    virtual_devices: int = 1

    @property
    def devices(self) -> int:
        """Devices of this task, at least the CPU."""
        return max(1, self.virtual_devices if self.virtual else self.gpus_per_task)


def configure(expected: Expected, *, precision: str, seed: int | None = None) -> list[str]:
    """Give TensorFlow its devices and Keras its precision and seed, before TensorFlow's runtime starts.

    Args:
        precision: a Keras mixed precision policy: ``float32``, ``mixed_float16`` or ``mixed_bfloat16``.
        seed: for Python, NumPy and TensorFlow; None leaves them alone.

    Returns:
        The names of this task's devices, such as ``GPU:0``, ``GPU:1``.

    Raises:
        HpcmlError: TensorFlow doesn't see the GPUs that were given, or has already started.
    """
    with _without_chatter():
        import tensorflow as tf

        tf.config.list_physical_devices()
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "0":
        tf.get_logger().setLevel("WARNING")  # INFO is a line for each tensor that is reduced
    if expected.virtual or not expected.gpus_per_task:
        names = [f"CPU:{index}" for index in range(expected.devices)]
        logical = [tf.config.LogicalDeviceConfiguration() for _ in names]
        try:
            tf.config.set_visible_devices([], "GPU")
            tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
        except RuntimeError as error:
            raise HpcmlError(
                f"TensorFlow has already started in this process, its devices can't be set any more: {error}",
                fix="restart the kernel and call hpcml.begin() before anything that uses TensorFlow",
            ) from None
    else:
        seen = tf.config.list_physical_devices("GPU")
        if len(seen) != expected.gpus_per_task:
            raise _gpus_differ(len(seen), expected.gpus_per_task, tf.test.is_built_with_cuda())
        names = [f"GPU:{index}" for index in range(len(seen))]
    tf.keras.mixed_precision.set_global_policy(precision)
    if seed is not None:
        tf.keras.utils.set_random_seed(seed)
    return names


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Leave out what TensorFlow tells everyone while it is imported; anything else reaches stderr afterwards.

    Before its logs are set up it heeds no TF_CPP_MIN_LOG_LEVEL; 0 shows everything here too.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            told = b"".join(line for line in caught if not _CHATTER.match(line))
            if told:
                os.write(2, told)


def expected_replicas(expected: Expected) -> int:
    """Return how many replicas train in sync when the strategy uses everything that it can.

    On virtual CPU devices MultiWorkerMirroredStrategy takes one for each process: it looks for several GPUs in a
    process, never for several CPUs.
    """
    if expected.strategy == "original":
        return 1
    if expected.strategy == "mirrored":
        return expected.devices
    return expected.world * (1 if expected.virtual else expected.devices)


def check_replicas(expected: Expected, in_sync: int) -> None:
    """Raise where a model is not trained by all the devices that its strategy should use.

    Args:
        in_sync: replicas that the model's strategy keeps in sync.

    Raises:
        HpcmlError: devices are left out, or each of several tasks trains the whole job by itself.
    """
    right = expected_replicas(expected)
    if expected.world > 1 and in_sync <= expected.devices and (expected.strategy != "multiworker" or in_sync != right):
        raise HpcmlError(
            f"each of the {expected.world} tasks trains the whole job by itself: "
            f"{in_sync} replicas in sync, all of them in this process",
            origin=f"strategy {expected.strategy!r}",
            fix=f"create {_CALLS['multiworker']} right after hpcml.begin(strategy='multiworker') and build and compile "
            "the model in its scope; or ask for one task",
        )
    if in_sync != right:
        raise HpcmlError(
            f"the model trains on {in_sync} replicas in sync, not on {right}",
            origin=f"strategy {expected.strategy!r}",
            allowed=f"{expected.world} tasks × {expected.devices} devices: {right} replicas",
            fix=f"use {_CALLS[expected.strategy]}, without a list of devices, and build and compile the model in its "
            "scope; or give hpcml.begin() the strategy that you use",
        )


def advice(expected: Expected, in_sync: int) -> list[str]:
    """Return what a person should know about a run that is allowed but not what it may seem."""
    told = []
    if expected.strategy == "original" and expected.devices > 1:
        kind = "virtual CPU devices" if expected.virtual else "GPUs"
        told.append(f"without a strategy 1 of {expected.devices} {kind} trains and the rest idle")
    if expected.strategy == "multiworker" and expected.virtual and expected.world == 1:
        told.append(
            "on CPUs MultiWorkerMirroredStrategy has one replica for each process: "
            "to rehearse two, run two tasks (tasks_per_node = 2)"
        )
    if expected.virtual and in_sync > 1:
        told.append(
            "virtual CPU devices share this machine's cores: they show that it works, not how fast; no speed-up"
        )
    return told


def callbacks(journal: Journal, expected: Expected, *, global_batch: int, began: float, rank: int) -> list[Any]:
    """Return the Keras callbacks that check the replicas and keep the numbers of a ``model.fit``.

    They work with Keras 2 (tf-keras) and Keras 3 and add no work to a batch. For each epoch, counted from 1, the
    journal gets what Keras measured and ``lr``, ``epoch_time_s`` (without validation), ``samples_per_s`` (of the whole
    job) and ``step_time_ms``; once, as step 0, ``time_to_first_step_s``. The first epoch holds the building of the graph.
    ``samples_per_s`` also joins Keras's own logs and so ``History``.

    Args:
        global_batch: samples of one step on all replicas together.
        began: ``time.perf_counter()`` when the run began.
        rank: of this task; rank 0 speaks for all.
    """
    import tensorflow as tf

    base = tf.keras.callbacks.Callback  # Keras 2 and 3 each want their own, known only now
    kind = type("Recorder", (_Recorder, base), {"legacy": base.__module__.startswith("tf_keras.")})
    return [kind(journal, expected, global_batch, began, rank)]


class _Recorder:
    """The hooks; ``model`` and ``params`` are set by Keras.

    No hook for batches: Keras 2 then skips its per-batch calls altogether, and Keras 3 may make them in the background.
    """

    legacy: bool
    model: Any
    params: dict[str, Any]

    def __init__(self, journal: Journal, expected: Expected, global_batch: int, began: float, rank: int) -> None:
        super().__init__()
        self._journal = journal
        self._expected = expected
        self._global_batch = global_batch
        self._began: float | None = began
        self._rank = rank
        self._epoch_began = 0.0
        self._trained_s: float | None = None
        self._steps_before = 0
        self._warned = False

    def on_train_begin(self, logs: Any = None) -> None:
        strategy = self.model.distribute_strategy
        in_sync = strategy.num_replicas_in_sync
        self._journal.write(
            "replicas",
            in_sync=in_sync,
            expected=expected_replicas(self._expected),
            devices=_devices(strategy),
            virtual=self._expected.virtual,
        )
        check_replicas(self._expected, in_sync)
        if self._began is None:
            return
        if self._rank == 0:
            for text in advice(self._expected, in_sync):
                self._journal.message("warning", text)
                print(f"hpcml: {text}", flush=True)
        if callable(self.model.train_function):
            self.model.train_function = self._timed(self.model.train_function)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._trained_s = None
        self._steps_before = self._iterations()
        self._epoch_began = time.perf_counter()

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

    def _record(self, epoch: int, logs: dict[str, Any]) -> None:
        import numpy as np

        trained_s = self._trained_s or 0.0
        values = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        values["lr"] = _learning_rate(self.model.optimizer)
        values["epoch_time_s"] = trained_s
        steps = self._iterations() - self._steps_before or self.params.get("steps") or 0
        if steps and trained_s > 0:
            values["samples_per_s"] = logs["samples_per_s"] = steps * self._global_batch / trained_s
            values["step_time_ms"] = 1000 * trained_s / steps
        self._journal.metric(epoch, values)
        if self._rank == 0:
            total = self.params["epochs"]
            headline = next((f" {name} {values[name]:.3f}" for name in _HEADLINES if name in values), "")
            text = f"epoch {epoch}/{total}{headline}"
            self._journal.write("progress", done=epoch, total=total, unit="epoch", text=text)

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
            _wait_for(logs)
            if self._began is not None:
                self._journal.metric(0, {"time_to_first_step_s": time.perf_counter() - self._began})
                self._began = None
            return logs

        return first

    def _end_training_part(self) -> None:
        if not self.legacy:  # Keras 3 gets here before the GPU is done; Keras 2 has read its metrics by then
            _wait_for([metric.result() for metric in self.model.metrics[:1]])
        self._trained_s = time.perf_counter() - self._epoch_began

    def _iterations(self) -> int:
        counter = getattr(getattr(self.model, "optimizer", None), "iterations", None)
        return 0 if counter is None else int(counter.numpy())


def _devices(strategy: Any) -> list[str]:
    import tensorflow as tf

    try:
        return list(strategy.extended.worker_devices)
    except RuntimeError:  # the default strategy has none of its own; TensorFlow then places the model on the first
        found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return [device.name for device in found[:1]]


def _wait_for(results: Any) -> None:
    """Wait until a GPU has computed this: TensorFlow returns as soon as the work is queued."""
    import numpy as np
    import tensorflow as tf

    for value in tf.nest.flatten(results)[:1]:
        np.asarray(value)


def _learning_rate(optimizer: Any) -> float:
    rate = optimizer.learning_rate
    rate = rate(optimizer.iterations) if callable(rate) else rate  # a schedule, in tf.keras.optimizers.legacy
    return float(rate.numpy() if hasattr(rate, "numpy") else rate)


def _gpus_differ(seen: int, given: int, built_with_cuda: bool) -> HpcmlError:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    origin = f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "CUDA_VISIBLE_DEVICES is not set"
    what = f"TensorFlow sees {seen} GPUs, this task was given {given}"
    if seen > given:
        return HpcmlError(
            what, origin=origin, fix="set CUDA_VISIBLE_DEVICES to the GPUs of this task, or ask for all that it uses"
        )
    if not built_with_cuda:
        what += "; this TensorFlow is built for CPUs only and cannot see any"
    return HpcmlError(
        what,
        origin=origin,
        allowed="GPUs that were allocated must be used: never a silent run on CPUs",
        fix="pip install 'tensorflow[and-cuda]' into the environment of the job, and check that nvidia-smi lists the "
        "GPUs there; or HPCML_DEVICES=cpu for a rehearsal on virtual CPU devices",
    )
